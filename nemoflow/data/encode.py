"""Texts to ids: a fast engine that is held to the reference, id for id.

Engines, by the name in a recipe's `tokenizer.engine`; ids are the same, so the choice is no part of an identity:

    gigatoken    the default. Byte-level BPE at the speed of memory; what Megatron-LM's own fast preprocessing uses.
                 Young, hence everything below.
    tokenizers   the reference: the library that tokenizers are published for. Some 70 times slower.

What keeps gigatoken exact:
  * Before use, both engines read a probe of numbers, blanks, scripts and control tokens. Where they differ, or
    gigatoken cannot load the tokenizer, the reference does the work, and says so.
  * It knows a later Unicode than the reference, in which 4,699 more code points are letters or marks. Documents with
    one of these go to the reference (found by comparing both over all of Unicode; a test does it again).
  * A document that spells a control token is found by the id, and encoded again without that token. A second
    gigatoken that knows none does this; the reference, where there are few of them.
  * Whoever uses it has a sample of each shard read by both (`Sample`).

The reference is also quicker for less text than takes as long as to load gigatoken. gigatoken's cache of words grows
without bound; `Encoder` starts a new one when memory has grown.
"""

import contextlib
import ctypes
import heapq
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from nemoflow.data.tokenizer import Trained
from nemoflow.errors import NemoflowError

ENGINES = ("gigatoken", "tokenizers")
"""Names of the engines; the first is the default."""

_LOADING = 1 << 20
"""Bytes of text that the reference encodes in the time it takes to load gigatoken: 0.4 s for 131,072 ids."""

_MEMORY = 440 << 20
"""Bytes of memory of the process above which gigatoken's cache of words is dropped, if that may be what is large."""

_CACHE = 64 << 20
"""Bytes that the process has grown by since gigatoken was started, for that."""

_GROWTH = 192 << 20
"""The same, when it is more than there was text: then that is noise, of which every word is new, five bytes for one."""

_NEWER_LETTERS = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF)),
    *((0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7)),
    *((0x10EFA, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8)),
    *((0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2)),
    *((0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    (0x323B0, 0x33479),
)
"""Code points, first and last, of which gigatoken 0.10.0 thinks otherwise than tokenizers: letters, marks and digits of
Unicode 15 to 17."""

_PROBE = (
    "plain words, don't they'll WE'RE CamelCase snake_case",
    "0 12 345 6789 3.14159 1,000,000 0x7f v2.0.1 ٣٤ ५६ ½ Ⅷ",
    "  two  three   \t tab\t\tend \n\n\nlines\r\n \r x\u00a0nbsp\u2003em\u3000wide\u200bzero\x00nul\x0b\x0c\x85",
    "Ünïcödé ŉ ǅ İstanbul ß ﬁ ñ n\u0303 \u0301 ʰ ª º œuvre Ελλάς Москва",
    "中文字符 日本語テキスト 한국어 ภาษาไทย हिन्दी עברית العربية ქართული አማርኛ",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 → ∑∫√ «guillemets» … — “quotes” \U0001d400 \U00020000 \ue000 \ufffd \ufeff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n\n\tif x != 0 and y >= 1: pass;;; // <html></html>",
    " ",
    "\n",
    "a",
    "ab" * 300 + " " * 90 + "=" * 200 + "x" * 1000,
)


class Encoded(NamedTuple):
    """A batch of texts as ids.

    ids: of all texts one after the other, uint32 or int32, each followed by the id that ends a document when one is
    asked for. lengths: ids of each text, with that one, int64. spelled: numbers of the texts that spell a control
    token. by_reference: of those that only the reference is trusted with. Both are the same whatever the engine.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spelled: list[int]
    by_reference: list[int]


def _lead_patterns() -> list[tuple[bytes, re.Pattern[bytes]]]:
    """For each first byte of a code point in _NEWER_LETTERS, a pattern of all but the last: few other texts match."""
    tree: dict[bytes, dict[bytes, set[bytes]]] = {}
    for first, last in _NEWER_LETTERS:
        for point in {*range(first, last, 64), last}:
            lead, second, *rest = (bytes([b]) for b in chr(point).encode()[:-1])
            tree.setdefault(lead, {}).setdefault(second, set()).update(rest)

    def either(some: set[bytes]) -> bytes:
        return b"[" + b"".join(map(re.escape, sorted(some))) + b"]" if some else b""

    return [
        (lead, re.compile(lead + b"(?:" + b"|".join(s + either(t) for s, t in sorted(seconds.items())) + b")"))
        for lead, seconds in sorted(tree.items())
    ]


_LEADS = _lead_patterns()
_NEWER = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _NEWER_LETTERS) + "]")


def has_newer_letters(text: bytes) -> bool:
    """Whether a text in UTF-8 has a code point that the engines class differently. Costs next to nothing for most."""
    if text.isascii() or not any(lead in text and pattern.search(text) for lead, pattern in _LEADS):
        return False
    return _NEWER.search(text.decode()) is not None


def _resident() -> int:
    """Bytes of memory of this process."""
    with Path("/proc/self/statm").open("rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_memory() -> None:
    """Give back to the system what parsing a tokenizer has left: 100 MB that would be in use until the end."""
    with contextlib.suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64)


class _Gigatoken:
    """gigatoken with one tokenizer, held against the reference, and started anew when its cache has grown.

    `control` says whether it is to know control tokens; `expected` is texts and their ids by the reference.

    Raises NemoflowError with the reason when it cannot be used.
    """

    def __init__(self, tokenizer: Trained, control: bool, expected: dict[bytes, np.ndarray]):
        self._path = tokenizer.directory / "tokenizer.json"
        self._control = control
        try:
            self._load()
        except Exception as error:  # a young library: whatever it raises, the reference can do the work
            raise NemoflowError(f"cannot load this tokenizer ({' '.join(str(error).split())})") from None
        if not all(np.array_equal(self.encode(text), ids) for text, ids in expected.items()):
            raise NemoflowError("gives other ids than tokenizers on the probe text")

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json  # the package's own classes bring awkward arrays: 0.4 s

        content = self._path.read_bytes()
        if not self._control:
            parts = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
            added = [token for token in msgspec.json.decode(parts["added_tokens"]) if not token["special"]]
            content = msgspec.json.encode({**parts, "added_tokens": added})
        self.encode: Any = None  # first, so that there are never two
        self.encode = load_hf_json(content).encode  # from UTF-8 to an array of uint32
        del content
        _return_memory()
        self.began, self._encoded = _resident(), 0

    def bound(self, size: int) -> None:
        """Forget the cache when it has become large; to be told of all bytes encoded, now and then."""
        self._encoded += size
        now = _resident()
        grown = now - self.began
        if (now > _MEMORY and grown > _CACHE) or grown > max(_GROWTH, self._encoded):
            self._load()


class Encoder:
    """Encodes batches of texts with a tokenizer.

    `engine` is one of ENGINES; `control` says whether text that spells a control token becomes it ("control") or stays
    text ("plain"); `end` is the id to append to each text, if any. `progress` is told when the engine is not the one
    asked for; `engine` is then the one in use. `much` says that a lot of text will come.
    """

    def __init__(
        self,
        tokenizer: Trained,
        engine: str = ENGINES[0],
        control: str = "plain",
        end: int | None = None,
        progress: Callable[[str], None] = lambda _: None,
        much: bool = False,
    ):
        if engine not in ENGINES:
            raise NemoflowError(f"tokenizer.engine: {engine!r} is unknown; known: {', '.join(ENGINES)}")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whoever wants more processors starts more processes
        _return_memory()
        self.engine = engine
        self._tokenizer = tokenizer
        self._plain = control == "plain"
        self._end = end
        added = tokenizer.engine.get_added_tokens_decoder()
        self._control = {number: token.content for number, token in added.items() if token.special}
        self._low = np.uint32(min(self._control, default=0))
        self._span = np.uint32(max(self._control, default=0) - int(self._low))
        self._is_control = np.zeros(int(self._low) + int(self._span) + 1, dtype=bool)
        self._is_control[list(self._control)] = True
        self._separator_id = tokenizer.eod if end is None else end
        self._separator = _separator(self._separator_id, added)
        self._fast: _Gigatoken | None = None
        self._fast_plain: _Gigatoken | None = None
        self._spelled_bytes = _LOADING if much else 0
        if engine == "gigatoken":
            try:
                self._start()
            except NemoflowError as error:
                progress(f"tokenizer.engine: gigatoken {error}; using tokenizers, which is much slower")
                self.engine = "tokenizers"

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """The ids of texts in UTF-8. About a MB at a time is best."""
        if not self._fast:
            ids, lengths, spelled = self._one_by_one(texts, lambda text: self._by_reference(text, plain=False))
        elif self._separator:
            ids, lengths, spelled = self._joined(texts)
        else:
            ids, lengths, spelled = self._one_by_one(texts, self._fast.encode)
        by_reference = [number for number, text in enumerate(texts) if has_newer_letters(text)]
        instead = {number: self._as_text(texts[number]) for number in spelled} if self._plain else {}
        instead |= {number: self.reference(texts[number]) for number in by_reference}
        if instead:
            ids, lengths = _replaced(ids, lengths, dict(sorted(instead.items())))
        for fast in filter(None, (self._fast, self._fast_plain)):
            fast.bound(sum(map(len, texts)))
        return Encoded(ids, lengths, spelled, by_reference)

    def reference(self, text: bytes) -> np.ndarray:
        """The ids of one text by the reference engine, uint32, and the end."""
        return self._ended(self._by_reference(text, self._plain))

    def _by_reference(self, text: bytes, plain: bool) -> np.ndarray:
        engine = self._tokenizer.engine
        engine.encode_special_tokens = plain
        [encoding] = engine.encode_batch_fast([text.decode()], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def _as_text(self, text: bytes) -> np.ndarray:
        """The ids of a text in which control tokens are spelled, and the end."""
        self._spelled_bytes += len(text)
        if self._fast and not self._fast_plain and self._spelled_bytes > _LOADING:
            before = _resident()
            try:
                self._fast_plain = _Gigatoken(self._tokenizer, False, self._expected(plain=True))
                self._fast.began += _resident() - before
            except NemoflowError:
                self._spelled_bytes = -sys.maxsize  # the reference goes on
        return self._ended(self._fast_plain.encode(text)) if self._fast_plain else self.reference(text)

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        return ids if self._end is None else np.append(ids, np.uint32(self._end))

    def _expected(self, plain: bool) -> dict[bytes, np.ndarray]:
        """The probe, and some control tokens in it, by the reference."""
        texts = [*_PROBE, *(f"a{token} b {token}\n{token}{token}1" for token in list(self._control.values())[:20])]
        return {text.encode(): self._by_reference(text.encode(), plain) for text in texts}

    def _start(self) -> None:
        expected = self._expected(plain=False)
        self._fast = _Gigatoken(self._tokenizer, True, expected)
        if self._separator:  # the beginning of a text may be special to a tokenizer
            ids, lengths, _ = self._joined(list(expected))
            wanted = [self._ended(ids) for ids in expected.values()]
            if [len(w) for w in wanted] != lengths.tolist() or not np.array_equal(ids, np.concatenate(wanted)):
                self._separator = b""

    def _joined(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """All texts in one call, each followed by the end-of-document token as text, which is found among the ids."""
        ids = self._fast.encode(self._separator.join([*texts, b""]))
        at = self._control_positions(ids)
        ends = at[ids[at] == self._separator_id]
        if len(ends) > len(texts):  # some text spells the separator
            own = accumulate(text.count(self._separator) + 1 for text in texts)
            last = np.fromiter(own, np.int64, len(texts)) - 1
            ends = ends[last] if last[-1] == len(ends) - 1 else ends[:0]
        if len(ends) != len(texts):  # the engine and we disagree on what is a separator
            return self._one_by_one(texts, self._fast.encode)
        spelled = []
        if len(at) > len(ends):
            others = np.setdiff1d(at, ends, assume_unique=True)
            spelled = np.unique(np.searchsorted(ends, others)).tolist()
        lengths = np.diff(ends, prepend=-1)
        if self._end is None:
            return np.delete(ids, ends), lengths - 1, spelled
        return ids, lengths, spelled

    def _one_by_one(
        self, texts: Sequence[bytes], encode: Callable[[bytes], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        each = [encode(text) for text in texts]
        spelled = [number for number, ids in enumerate(each) if len(self._control_positions(ids))]
        each = [self._ended(ids) for ids in each]
        lengths = np.fromiter(map(len, each), np.int64, len(each))
        return np.concatenate(each or [np.zeros(0, np.uint32)]), lengths, spelled

    def _control_positions(self, ids: np.ndarray) -> np.ndarray:
        """Where control tokens are. Their ids are neighbours, mostly, so that one comparison finds few others."""
        at = np.flatnonzero((ids - self._low if self._low else ids) <= self._span)
        return at[self._is_control[ids[at]]]


def _replaced(ids: np.ndarray, lengths: np.ndarray, instead: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A batch with the ids of some texts, by number in ascending order, replaced."""
    ends = _ends(lengths)
    pieces, done = [], 0
    for number, own in instead.items():
        pieces += [ids[done : ends[number] - lengths[number]], own]
        done = ends[number]
    lengths = lengths.copy()
    lengths[list(instead)] = [len(own) for own in instead.values()]
    return np.concatenate([*pieces, ids[done:]]), lengths


def _separator(number: int, added: dict[int, Any]) -> bytes:
    """The text of control token `number` if it can be told apart wherever it stands between texts, else nothing."""
    token = added.get(number)
    if token is None or not token.special or token.normalized or token.lstrip or token.rstrip or token.single_word:
        return b""
    text = token.content
    starts = tuple(text[:length] for length in range(1, len(text)))
    others = [other.content for other in added.values() if other is not token]
    if text.endswith(starts) or any(text in other or other.endswith(starts) for other in others):
        return b""
    return text.encode()


class Sample:
    """Documents of a shard that are read by both engines at its end: the first, and those with the smallest hashes.

    At most COUNT, at most SIZE bytes in all, larger ones never. Which ones depends on the documents and their order
    alone, not on how they come in batches.
    """

    COUNT = 32
    SIZE = 128 << 10

    def __init__(self) -> None:
        self._kept: list[tuple[int, int, bytes, np.ndarray, Any]] = []  # a heap: largest key first
        self._bytes = self._seen = 0
        self._bound = (1 << 64) - 1

    def add(self, texts: Sequence[bytes], hashes: np.ndarray, encoded: Encoded, place: Callable[[int], Any]) -> None:
        """Consider a batch. hashes: 64 bits of each text's. place: of text `i` of the batch, for `differing`."""
        keys = hashes * np.uint64(0x9E3779B97F4A7C15)  # other bits than those that splits are made by
        ends = _ends(encoded.lengths)
        candidates = range(len(texts)) if not self._seen else np.flatnonzero(keys < np.uint64(self._bound)).tolist()
        for i in candidates:
            text, key = texts[i], int(keys[i]) if self._seen else -1
            if len(text) > self.SIZE or key >= self._bound:
                continue
            self._seen += 1
            ids = encoded.ids[ends[i] - encoded.lengths[i] : ends[i]].copy()
            heapq.heappush(self._kept, (-key, self._seen, text, ids, place(i)))
            self._bytes += len(text)
            while len(self._kept) > self.COUNT or self._bytes > self.SIZE:
                key, _, text, _, _ = heapq.heappop(self._kept)
                self._bound = -key
                self._bytes -= len(text)

    def differing(self, encoder: Encoder) -> Any | None:
        """The place of a document whose ids are not the reference's, if there is one."""
        for _, _, text, ids, place in self._kept:
            if not np.array_equal(ids, encoder.reference(text)):
                return place
        return None
