"""Rendered chats to ids, each with whether the next one is learned.

The loss mask is shifted: it says of token k whether predicting token k + 1 from it is learned. That is how
Megatron-Bridge's own packing stores it and its reader takes it: of each sequence of n tokens, the reader feeds ids
0..n-2, with ids 1..n-1 as labels and mask 0..n-2 beside them. So the last token before an answer carries a 1, and the
end of the answer's turn, which is learned like its text, carries none. The reader must run with answer_only_loss, its
default; else it ignores the mask.

A token and its mask are one number: the id, and in the highest bit (LEARNED) the mask.

Which tokens are the assistant's is a matter of where they begin and end. The tokens of a byte-level BPE without
normalization are the bytes of the text, cut up: their lengths tell. That they add up to the text is checked for each
sequence; where they do not, and for other tokenizers, the reference says where each token comes from.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import models, pre_tokenizers
from xxhash import xxh3_64_intdigest

from nemoflow.data.encode import Encoder, Sample
from nemoflow.data.tokenizer import Trained

LEARNED = np.uint32(1 << 31)
"""The bit of a token that says that the next one is learned."""

Spans = list[tuple[int, int]]
"""Where the assistant speaks in a text: (first character, one past the last)."""


class Masked(NamedTuple):
    """Some sequences. tokens: of all, one after the other, uint32 with LEARNED. lengths: tokens in each, int64. size:
    bytes of text. by_reference: how many sequences only the reference engine is trusted with."""

    tokens: np.ndarray
    lengths: np.ndarray
    size: int
    by_reference: int


class Masker:
    """Turns rendered chats into ids and masks.

    `engine` is one of encode.ENGINES; `progress` is told when another has to be used. Control tokens that stand in the
    text become their ids.
    """

    def __init__(self, tokenizer: Trained, engine: str, progress: Callable[[str], None] = lambda _: None):
        self._reference = tokenizer.engine
        self._encoder = Encoder(tokenizer, engine, control="control", progress=progress)
        self._bytes = _byte_lengths(tokenizer)

    def mask(self, texts: Sequence[str], spans: Sequence[Spans], sample: Sample, place: Callable[[int], Any]) -> Masked:
        """The ids and masks of some texts, given where the assistant speaks in each; about a MB at a time is best.

        sample, place: as Sample.add takes them.
        """
        given = [text.encode() for text in texts]
        encoded = self._encoder.encode(given)
        hashes = np.fromiter(map(xxh3_64_intdigest, given), np.uint64, len(given))
        sample.add(given, hashes, encoded, place)
        ends = np.cumsum(encoded.lengths)
        if self._bytes is None:
            lossless = np.zeros(len(given), bool)
            spoken = np.zeros(len(encoded.ids), bool)
        else:
            token_ends = np.cumsum(self._bytes[encoded.ids], dtype=np.int64)
            text_ends = np.where(ends > 0, token_ends[ends - 1], 0) if len(token_ends) else ends
            sizes = np.diff(text_ends, prepend=0)
            lossless = sizes == np.fromiter(map(len, given), np.int64, len(given))
            spoken = _overlapping(
                np.concatenate([[0], token_ends[:-1]]),
                token_ends,
                [
                    (begin + first, begin + past)
                    for text, own, begin, whole in zip(
                        texts, spans, (text_ends - sizes).tolist(), lossless.tolist(), strict=True
                    )
                    if whole
                    for first, past in (own if text.isascii() else _in_bytes(text, own))
                ],
            )
        learned = np.zeros_like(spoken)
        learned[:-1] = spoken[1:]
        learned[ends[encoded.lengths > 0] - 1] = False
        tokens, lengths = encoded.ids.astype(np.uint32, copy=False) | learned * LEARNED, encoded.lengths
        if not lossless.all():
            pieces = np.split(tokens, ends[:-1])
            for number in np.flatnonzero(~lossless).tolist():
                pieces[number] = self._by_reference(texts[number], spans[number])
            tokens, lengths = np.concatenate(pieces), np.fromiter(map(len, pieces), np.int64, len(pieces))
        by_reference = np.union1d(encoded.by_reference, np.flatnonzero(~lossless))
        return Masked(tokens, lengths, sum(map(len, given)), len(by_reference))

    def differing(self, sample: Sample) -> Any | None:
        """The place of a sampled sequence whose ids are not the reference's, if there is one."""
        return None if self.engine == "tokenizers" else sample.differing(self._encoder)

    @property
    def engine(self) -> str:
        """The engine in use."""
        return self._encoder.engine

    def _by_reference(self, text: str, spans: Spans) -> np.ndarray:
        """The tokens of one text, by the reference engine's own account of where they come from."""
        self._reference.encode_special_tokens = False
        encoding = self._reference.encode(text, add_special_tokens=False)
        begin, end = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        learned = np.zeros(len(begin), bool)
        learned[:-1] = _overlapping(begin, end, spans)[1:]
        return np.array(encoding.ids, np.uint32) | learned * LEARNED


def _overlapping(begins: np.ndarray, ends: np.ndarray, spans: Spans) -> np.ndarray:
    """bool [tokens]: which tokens have something of a span in them. Both of a token's ends ascend, as do the spans."""
    first, past = np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2).T
    steps = np.zeros(len(begins) + 1, np.int8)
    np.add.at(steps, np.searchsorted(ends, first, "right"), 1)
    np.add.at(steps, np.searchsorted(begins, past, "left"), -1)
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


def _in_bytes(text: str, spans: Spans) -> Spans:
    """Spans of characters as spans of bytes of UTF-8."""
    found, at, size = [], 0, 0
    for span in spans:
        own = []
        for edge in span:
            size += len(text[at:edge].encode())
            at = edge
            own.append(size)
        found.append((own[0], own[1]))
    return found


def _byte_lengths(tokenizer: Trained) -> np.ndarray | None:
    """Bytes of text that each id stands for; None for tokenizers of which that cannot be said."""
    engine = tokenizer.engine
    cuts = str(engine.pre_tokenizer)
    if not isinstance(engine.model, models.BPE) or engine.normalizer is not None or "ByteLevel(" not in cuts:
        return None
    vocabulary = engine.get_vocab(with_added_tokens=True)
    if "add_prefix_space=True" in cuts or not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    # A byte-level vocabulary is spelled with one character for each byte; added tokens are spelled as they are.
    lengths[list(vocabulary.values())] = list(map(len, vocabulary))
    for number, token in engine.get_added_tokens_decoder().items():
        lengths[number] = len(token.content.encode())
    return lengths
