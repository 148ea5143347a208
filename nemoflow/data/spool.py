"""Training sequences on the disk, between tokenizing and packing, so that packing sees them shuffled.

Each piece of the work has a spool, in files of numbers in little endian:

    00012.tokens         uint32, sequence after sequence
    00012.train.index    of each use of a sequence in training, in ascending order of its key: uint64 keys, then uint64
                         places of first tokens, then uint32 lengths
    00012.valid.index    the same for validation

The key of a use is a random number, drawn by the seed. The order of all keys is the shuffled order, so that a window,
a part of that order, is what has its keys in a range, in whatever spool. Sequences lie in the order of their keys too,
some millions of tokens at a time, so that a window is read in a few long strokes and not all over the disk.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemoflow.data.shards import HashedFile

SPLITS = ("train", "valid")

_RUN = 1 << 22
"""Tokens that are put in the order of their keys at a time: 16 MB."""


def sync(directory: Path) -> None:
    """Make sure that the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _Run:
    """Sequences that wait to be put in order."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.splits: list[int] = []
        self.uses: list[int] = []
        self.size = 0


class SpoolWriter:
    """Writes the spool of a piece. `seeds` is what its keys are drawn by."""

    def __init__(self, directory: Path, number: int, seeds: Sequence[int]):
        self._stem = directory / f"{number:05d}"
        self._random = np.random.PCG64(np.random.SeedSequence(list(seeds)))
        self._tokens = HashedFile(Path(f"{self._stem}.tokens"))
        self._written = 0
        self._run = _Run()
        self._index: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in SPLITS}

    def add(self, tokens: np.ndarray, split: str, uses: int) -> None:
        """Append a sequence, uint32, to be used that often, at least once, in a split."""
        run = self._run
        run.tokens.append(tokens)
        run.splits.append(SPLITS.index(split))
        run.uses.append(uses)
        run.size += len(tokens)
        if run.size >= _RUN:
            self._flush()

    def _flush(self) -> None:
        run, self._run = self._run, _Run()
        if not run.tokens:
            return
        uses = np.array(run.uses, np.int64)
        keys = self._random.random_raw(int(uses.sum()))
        order = np.argsort(np.minimum.reduceat(keys, np.cumsum(uses) - uses), kind="stable")
        self._tokens.write(np.concatenate([run.tokens[i] for i in order.tolist()]))
        lengths = np.fromiter(map(len, run.tokens), np.int64, len(run.tokens))
        starts = np.empty_like(lengths)
        starts[order] = self._written + np.cumsum(lengths[order]) - lengths[order]
        self._written += run.size
        used = np.repeat(np.arange(len(uses)), uses)
        splits = np.array(run.splits)[used]
        for number, name in enumerate(SPLITS):
            own = splits == number
            self._index[name].append((keys[own], starts[used[own]].astype("<u8"), lengths[used[own]].astype("<u4")))

    def finish(self) -> list[dict]:
        """Put the files in their places; returns them as HashedFile.finish does."""
        self._flush()
        files = [self._tokens.finish()]
        for name, parts in self._index.items():
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            if columns and len(columns[0]):
                order = np.argsort(columns[0], kind="stable")
                file = HashedFile(Path(f"{self._stem}.{name}.index"))
                for column in columns:
                    file.write(column[order])
                files.append(file.finish())
        sync(self._stem.parent)
        return files


class Window(NamedTuple):
    """Sequences in shuffled order. tokens: of all, in any order, uint32. starts, lengths: where in it each lies."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class _Index:
    """A spool's index, as far as it is looked at in memory."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = len(data) // 20
        self.tokens = path.with_name(f"{path.name.partition('.')[0]}.tokens")
        self.keys = np.frombuffer(data, "<u8", count)
        self._starts = np.frombuffer(data, "<u8", count, 8 * count)
        self._lengths = np.frombuffer(data, "<u4", count, 16 * count)

    def within(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, places and lengths of the uses with a key from `first` to `last`."""
        own = slice(
            int(np.searchsorted(self.keys, np.uint64(first), "left")),
            int(np.searchsorted(self.keys, np.uint64(last), "right")),
        )
        return self.keys[own], self._starts[own].astype(np.int64), self._lengths[own].astype(np.int64)


def windows(directory: Path, numbers: Sequence[int], split: str, count: int) -> Iterator[Window]:
    """All uses in a split of the spools with these numbers, in `count` windows of about the same size.

    Two uses with the same key are in the order of the numbers.
    """
    paths = [path for n in numbers if (path := directory / f"{n:05d}.{split}.index").exists()]
    indices = [_Index(path) for path in paths]
    bounds = [(i << 64) // count for i in range(count + 1)]
    for first, end in pairwise(bounds):
        parts = [index.within(first, end - 1) for index in indices]
        lengths = np.concatenate([part[2] for part in parts]) if parts else np.zeros(0, np.int64)
        tokens = np.empty(int(lengths.sum()), np.uint32)
        starts, at = [], 0
        for index, (_, places, own) in zip(indices, parts, strict=True):
            if len(places):
                size = int(own.sum())
                starts.append(at + _read(index.tokens, places, own, tokens[at : at + size]))
                at += size
        order = np.argsort(np.concatenate([part[0] for part in parts]), kind="stable") if parts else []
        yield (
            Window(tokens, np.concatenate(starts)[order], lengths[order])
            if starts
            else Window(tokens, lengths, lengths)
        )


def _read(path: Path, places: np.ndarray, lengths: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Fill `into` with sequences of a file, neighbours at once; returns where in it each begins."""
    order = np.argsort(places, kind="stable")
    places, lengths = places[order], lengths[order]
    ends = np.cumsum(lengths)
    starts = np.empty_like(ends)
    starts[order] = ends - lengths
    breaks = np.flatnonzero(places[1:] != places[:-1] + lengths[:-1]) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks, [len(places)]]) - 1
    target = memoryview(into).cast("B")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for begin, end, place in zip(
            (4 * (ends - lengths)[firsts]).tolist(),
            (4 * ends[lasts]).tolist(),
            (4 * places[firsts]).tolist(),
            strict=True,
        ):
            while begin < end:
                got = os.preadv(descriptor, [target[begin:end]], place)
                if not got:
                    raise OSError(f"{path}: ends too early")
                begin += got
                place += got
    finally:
        os.close(descriptor)
    return starts
