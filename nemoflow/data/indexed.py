"""Text that others tokenized: Megatron's .bin/.idx, whose format shards.py describes, read document by document.

Where a document has several sequences they are read as one.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from nemoflow.errors import NemoflowError

_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
"""Code in the .idx -> type of ids; of Megatron-Core's DType those that are written for text."""

_TOKENS = 1 << 22
"""Tokens read at a time, or one longer document."""


class Documents(NamedTuple):
    """Some documents: their ids one after the other, how many each has, and xxh3_64 of each one's ids as stored."""

    ids: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray


def read(bin_: Path, origin: str, vocab_size: int, eod: int | None) -> Iterator[Documents]:
    """All documents of a .bin with the .idx beside it, in order; with `eod` each ends with it, also if it did not.

    origin: what the .bin is called in messages.

    Raises NemoflowError for an index that is damaged or not of this .bin, and for an id the tokenizer does not have.
    """
    dtype, ends = _index(bin_, origin)
    if not len(ends):
        return
    ids = np.memmap(bin_, dtype, "r")
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + _TOKENS, "right")))
        own = np.asarray(ids[begin : int(ends[last - 1])])
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < vocab_size:
            wrong = int(own.max()) if own.max() >= vocab_size else int(own.min())
            raise NemoflowError(
                f"{origin}: has the id {wrong:,}, the tokenizer has {vocab_size:,}; it was made with another tokenizer"
            )
        bounds = ends[first:last] - begin
        pieces = np.split(own, bounds[:-1])
        hashes = np.fromiter((xxh3_64_intdigest(piece.tobytes()) for piece in pieces), np.uint64, len(pieces))
        if eod is not None:
            pieces = [piece if piece[-1] == eod else np.append(piece.astype("<i4"), np.int32(eod)) for piece in pieces]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        yield Documents(np.concatenate(pieces), lengths, hashes)
        first = last


def _index(bin_: Path, origin: str) -> tuple[np.dtype, np.ndarray]:
    """Type of the ids, and where each document ends, in ids."""
    path = bin_.with_suffix(".idx")
    name = f"{origin.removesuffix('.bin')}.idx"
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(b"MMIDIDX\x00\x00"):
        raise NemoflowError(f"{name}: is no index of Megatron's")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in _TYPES:
        raise NemoflowError(f"{name}: version {version}, ids of type {code}; version 1 with int32 or uint16 is read")
    size, wanted = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
    if size != wanted:
        raise NemoflowError(f"{name}: has {size:,} bytes, its header says {wanted:,}; it is cut off, or multimodal")
    lengths = np.fromfile(path, "<i4", sequences, offset=_HEADER.size)
    bounds = np.fromfile(path, "<i8", documents, offset=_HEADER.size + 12 * sequences)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    held = bin_.stat().st_size
    if held != int(ends[-1]) * _TYPES[code].itemsize:
        raise NemoflowError(
            f"{origin}: has {held:,} bytes, its .idx says {int(ends[-1]) * _TYPES[code].itemsize:,}; they do not "
            "belong together, or one is cut off"
        )
    if not len(bounds) or bounds[0] or bounds[-1] != sequences or (np.diff(bounds) < 0).any() or (lengths < 0).any():
        raise NemoflowError(f"{name}: its documents do not follow each other; it is damaged")
    found = ends[bounds][1:]
    return _TYPES[code], found[np.diff(ends[bounds]) > 0]
