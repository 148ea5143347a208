"""Kind `merge`: the shards of a source in few files, complete and split into train, valid and test.

Megatron looks at every prefix for each sample it draws, so a source of a thousand shards is read as one prefix, or as
few as its size allows. Here the splits are decided, too: shards keep apart a *pool* of documents, those whose text has
a small hash, and of the pool the smallest hashes are validation, the next ones test, and the rest joins the training
set. So the splits are sized in tokens, equal texts fall on one side, and how the source was cut into shards does not
matter: with one prefix, not even to the order of the bytes.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from nemoflow.data.made import Made
from nemoflow.data.rows import SPLITS
from nemoflow.data.shards import HashedFile, IndexedWriter, check_dropped
from nemoflow.data.sources import Source, open_source
from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, in_threads

RESUMES = True
"""The directory given to `make` may hold what an interrupted attempt finished."""

_HEADER_BYTES = 34
"""What stands before the lengths in an .idx: 9 bytes of name, version, type, sequences and documents."""

_CHUNK = 2 << 20
"""Tokens copied at a time."""

_MOST_DOCUMENTS = 2**31
"""Of one prefix: Megatron-Core numbers them in int32 (GPTDataset's document index)."""


@dataclass(frozen=True)
class Shard:
    """A shard, where it is, and its measures: see shards.make."""

    directory: Path
    measures: dict

    def path(self, name: str) -> Path:
        return self.directory / f"{self.measures['shard']:05d}.{name}"

    def lengths(self, half: str) -> np.ndarray:
        """Tokens of each document of `half`, "train" or "pool"; int32."""
        count = self.measures[half]["documents"]
        return (
            np.fromfile(self.path(f"{half}.idx"), "<i4", count, offset=_HEADER_BYTES) if count else np.zeros(0, "<i4")
        )


def _sealed(directory: Path) -> dict:
    try:
        return json.loads((directory / "sealed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NemoflowError(f"{directory}/sealed.json: cannot be read ({error}); the shards are incomplete") from None


def _complete(parts: Sequence[Path], source: Source) -> tuple[list[Shard], dict]:
    """All shards in order and what they have in common, having seen that they cover the source once.

    Raises NemoflowError for a missing or repeated shard, a file or row group that none or two of them read, and rows
    that were neither written nor dropped.
    """
    shards: list[Shard] = []
    units: list[tuple[int, ...]] = []
    common: dict = {}
    for part in parts:
        sealed = _sealed(part)
        measures, payload = sealed["measures"], sealed["payload"]
        for key in ("eod", "dtype", "vocab_size"):
            if common.setdefault(key, measures[key]) != measures[key]:
                raise NemoflowError(f"{part}: {key} is {measures[key]}, {common[key]} in the shards before")
        planned = range(len(shards), len(shards) + len(payload["shards"]))
        found = [shard["shard"] for shard in measures["shards"]]
        if payload.get("first", 0) != len(shards) or found != list(planned):
            raise NemoflowError(
                f"{part}: holds shards {found}, where {planned.start} to {planned.stop - 1} are planned"
            )
        shards += [Shard(part, shard) for shard in measures["shards"]]
        units += [tuple(unit) for shard in payload["shards"] for unit in shard]
    for shard in shards:
        counts, dropped = shard.measures, sum(shard.measures["dropped"].values())
        if counts["rows"] != counts["documents"] + dropped:
            raise NemoflowError(
                f"{shard.directory}: shard {counts['shard']}: {counts['rows']:,} rows, but {counts['documents']:,} "
                f"documents and {dropped:,} dropped; delete {shard.directory} to have it made again"
            )
    _covered(units, source)
    _all_rows(shards, source)
    return shards, common


def _covered(units: Sequence[tuple[int, ...]], source: Source) -> None:
    """Raise NemoflowError unless the units are all files of the source in order, each whole or in adjoining pieces."""
    at, group = 0, 0
    for unit in units:
        if unit[0] != at or (len(unit) == 3 and unit[1] != group) or (len(unit) == 1 and group):
            raise NemoflowError(
                f"{source.origin(min(at, source.count - 1))}: the shards do not read the source once and in order, at "
                f"their unit {list(unit)}; run `nemoflow lock` for a new plan"
            )
        group = unit[2] if len(unit) == 3 else 0
        if len(unit) == 1 or group == _row_groups(source.path(at)):
            at, group = at + 1, 0
    if at != source.count or group:
        raise NemoflowError(
            f"{source.origin(at)}: no shard reads {'all of this file' if group else 'this file'}; run `nemoflow lock` "
            "for a new plan"
        )


@cache
def _row_groups(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_row_groups


def _all_rows(shards: Sequence[Shard], source: Source) -> None:
    """Raise NemoflowError unless as many rows were read as Parquet files say they have."""
    if source.format != "parquet":
        return
    import pyarrow.parquet as pq

    read = sum(shard.measures["rows"] for shard in shards)
    there = sum(pq.read_metadata(source.path(number)).num_rows for number in range(source.count))
    if read != there:
        raise NemoflowError(f"{source.directory}: has {there:,} rows, of which the shards read {read:,}")


@dataclass(frozen=True)
class _Pool:
    """The documents kept apart, in order of hash: equal ones in the order of the source.

    shard, first, length: which shard each is in, its first token in pool.bin, and its tokens. hashes: ascending.
    """

    hashes: np.ndarray
    shard: np.ndarray
    first: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "_Pool":
        columns: list[tuple[np.ndarray, ...]] = [(np.zeros(0, "<u8"), *[np.zeros(0, np.int64)] * 3)]
        for number, shard in enumerate(shards):
            if shard.measures["pool"]["documents"]:
                lengths = shard.lengths("pool").astype(np.int64)
                hashes = np.fromfile(shard.path("pool.hashes"), "<u8")
                columns.append((hashes, np.full(len(lengths), number), np.cumsum(lengths) - lengths, lengths))
        hashes, *rest = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], *(column[order] for column in rest))

    def slices(self, valid: int, test: int) -> dict[str, slice]:
        """Documents of valid, test and what is left for train; no text is in two of them.

        `valid` and `test` are tokens: each split takes the documents with the smallest hashes left while they fit, and
        one text at least.
        """
        ends = np.append(np.flatnonzero(np.diff(self.hashes)) + 1, len(self.hashes))  # of the groups of equal hashes
        tokens = np.concatenate([[0], np.cumsum(self.length)])[ends]
        found, group, before = {}, 0, 0
        for name, wanted in (("valid", valid), ("test", test)):
            past = max(int(np.searchsorted(tokens, before + wanted, "right")), group + 1)
            past = min(past, len(ends))
            start = int(ends[group - 1]) if group else 0
            found[name] = slice(start, int(ends[past - 1]) if past else 0)
            group, before = past, int(tokens[past - 1]) if past else 0
        return {**found, "train": slice(found["test"].stop, len(self.hashes))}


def _pieces(shards: Sequence[Shard], rest: int, count: int) -> list[tuple[list[int], bool]]:
    """Which shards' training halves go into each of at most `count` prefixes, contiguous and about equal in tokens, and
    whether what is left of the pool, `rest` tokens, comes last. No prefix is empty."""
    sizes = [shard.measures["train"]["tokens"] for shard in shards] + [rest]
    total, before = sum(sizes), 0
    groups: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        if size:
            groups.setdefault((2 * before + size) * count // (2 * total), []).append(number)
        before += size
    return [([n for n in group if n < len(shards)], len(shards) in group) for group in groups.values()]


class _Work:
    """Writes the prefixes, in any order."""

    def __init__(self, out: Path, shards: Sequence[Shard], pool: _Pool, dtype: np.dtype, count: Callable[..., None]):
        self._out, self._shards, self._pool, self._dtype, self._count = out, shards, pool, dtype, count

    def write(self, name: str, shards: Iterable[int], pooled: slice) -> dict:
        """Write one prefix, train halves first, and its receipt; a finished one is kept. Returns the receipt."""
        receipt = self._out / f"{name}.json"
        if (found := _receipt(receipt)) is not None:
            self._count(size=found["files"][0]["size"], files=1, kept=True)
            return found
        writer = IndexedWriter(self._out / name, self._dtype)
        for number in shards:
            shard = self._shards[number]
            writer.add(np.zeros(0, self._dtype), shard.lengths("train"))
            for ids in self._chunks(shard):
                self._add(writer, ids, np.zeros(0, np.int32))
        for ids, lengths in self._documents(pooled):
            self._add(writer, ids, lengths)
        files = writer.finish()
        found = {"prefix": name, "documents": writer.documents, "tokens": writer.tokens, "files": files}
        file = HashedFile(receipt)
        file.write((json.dumps(found, indent=1) + "\n").encode())
        file.finish()
        self._count(files=1)
        return found

    def _add(self, writer: IndexedWriter, ids: np.ndarray, lengths: np.ndarray) -> None:
        writer.add(ids, lengths)
        self._count(size=ids.nbytes)

    def _chunks(self, shard: Shard) -> Iterator[np.ndarray]:
        """The ids of a shard's training half, some MB at a time. Raises NemoflowError when they are not as counted."""
        path, left = shard.path("train.bin"), shard.measures["train"]["tokens"]
        if (size := path.stat().st_size) != left * self._dtype.itemsize:
            raise NemoflowError(
                f"{path}: has {size:,} bytes, where {left:,} tokens were counted; delete {shard.directory} to have it "
                "made again"
            )
        while left:
            part = np.fromfile(path, self._dtype, _CHUNK, offset=size - left * self._dtype.itemsize)
            left -= len(part)
            yield part

    def _documents(self, pooled: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Documents of the pool, ids and lengths, some MB at a time."""
        pool, bins = self._pool, dict[int, np.ndarray]()
        ends = np.cumsum(pool.length[pooled])
        cuts = np.searchsorted(ends, np.arange(_CHUNK, int(ends[-1]) if len(ends) else 0, _CHUNK)).tolist()
        for begin, end in pairwise(sorted({0, *cuts, len(ends)})):
            ids = []
            for at in range(pooled.start + begin, pooled.start + end):
                number = int(pool.shard[at])
                if number not in bins:
                    bins[number] = np.memmap(self._shards[number].path("pool.bin"), self._dtype, "r")
                ids.append(bins[number][pool.first[at] : pool.first[at] + pool.length[at]])
            yield np.concatenate(ids), pool.length[pooled.start + begin : pooled.start + end]


def _receipt(path: Path) -> dict | None:
    """The receipt of a finished prefix whose files are there."""
    try:
        found = json.loads(path.read_bytes())
        whole = all(path.with_name(file["name"]).stat().st_size == file["size"] for file in found["files"])
    except (OSError, ValueError):
        return None
    return found if whole else None


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], threads: int = 1) -> Made:
    """Write train-00000, train-00001, ..., valid-00000 and test-00000, each .bin, .idx and .json, its receipt.

    `payload` is {"valid", "test": tokens, "cap": largest share of the source's tokens for each of the two, an exact
    fraction, "prefixes": of train}; inputs["parts"] are the shards in order, inputs["source"] what they were made from.

    Returns as measures {"eod", "dtype", "vocab_size", "prefixes": {split: [{"prefix", "documents", "tokens"}]},
    "shards": how many, and summed over them "rows", "documents", "tokens", "bytes" of text, "dropped": by reason,
    "control_strings", "by_reference", "lengths": as in shards.make}.

    Raises NemoflowError when shards are missing or do not add up to the source, and when there are too few documents
    for three splits.
    """
    source = open_source(inputs["source"])
    shards, common = _complete(inputs["parts"], source)
    measures = [shard.measures for shard in shards]
    check_dropped(source, measures, _sealed(inputs["parts"][0])["payload"].get("max_broken", "1/1000"))
    pool = _Pool.of(shards)
    tokens = sum(shard["tokens"] for shard in measures)
    cap = int(Fraction(payload["cap"]) * tokens)
    targets = {name: min(payload[name], cap) for name in ("valid", "test")}
    splits = pool.slices(**targets)
    outside = sum(shard["train"]["documents"] for shard in measures)
    if any(part.start == part.stop for part in splits.values()):
        if outside:
            raise NemoflowError(
                f"{source.directory}: only {int(pool.length.sum()):,} tokens were kept apart, too few for held_out: "
                f"valid {targets['valid']:,} and test {targets['test']:,}; lower these"
            )
        raise NemoflowError(
            f"{source.directory}: {len(np.unique(pool.hashes)):,} different usable documents, too few for train, valid "
            "and test; give the source more text"
        )
    dtype = np.dtype({"uint16": "<u2", "int32": "<i4"}[common["dtype"]])
    rest = int(pool.length[splits["train"]].sum())
    groups = _pieces(shards, rest, payload["prefixes"])
    wanted = [
        (f"train-{i:05d}", group, splits["train"] if pooled else slice(0, 0))
        for i, (group, pooled) in enumerate(groups)
    ]
    wanted += [(f"{name}-00000", [], splits[name]) for name in ("valid", "test")]
    for name, group, pooled in wanted:
        documents = sum(measures[n]["train"]["documents"] for n in group) + pooled.stop - pooled.start
        if documents > _MOST_DOCUMENTS:
            raise NemoflowError(
                f"{source.directory}: {documents:,} documents in {name}, of which Megatron can number "
                f"{_MOST_DOCUMENTS:,}; divide the source's files among several sources"
            )
    _remove_unfinished(out, {name for name, _, _ in wanted})
    meter = Progress(progress, len(wanted), tokens * dtype.itemsize)
    work = _Work(out, shards, pool, dtype, meter.add)
    receipts = in_threads(work.write, wanted, threads, meter)
    contents = [file for receipt in receipts for file in receipt["files"]]
    for receipt in receipts:
        path = out / f"{receipt['prefix']}.json"
        contents.append({"name": path.name, "size": path.stat().st_size, "blake3": _digest(path)})
    prefixes = {
        split: [{k: r[k] for k in ("prefix", "documents", "tokens")} for r in receipts if r["prefix"].startswith(split)]
        for split in SPLITS
    }
    written = sum(receipt["tokens"] for receipt in receipts)
    if written != tokens:
        raise NemoflowError(
            f"{out}: {written:,} tokens written of the {tokens:,} in the shards; delete it and run again"
        )
    summed = {key: sum(m[key] for m in measures) for key in _SUMMED}
    dropped = sum((Counter(m["dropped"]) for m in measures), Counter())
    return Made(
        {
            **common,
            "prefixes": prefixes,
            "shards": len(shards),
            **summed,
            "dropped": dict(sorted(dropped.items())),
            "lengths": np.sum([m["lengths"] for m in measures], axis=0).tolist(),
        },
        sorted(contents, key=lambda file: file["name"]),
    )


_SUMMED = ("rows", "documents", "tokens", "bytes", "control_strings", "by_reference")


def _digest(path: Path) -> str:
    from blake3 import blake3

    return blake3(path.read_bytes()).hexdigest()


def _remove_unfinished(out: Path, prefixes: set[str]) -> None:
    """Remove what belongs to no finished prefix of this plan."""
    keep = set()
    for name in prefixes:
        if (receipt := _receipt(out / f"{name}.json")) is not None:
            keep |= {f"{name}.json", *(file["name"] for file in receipt["files"])}
    for path in out.iterdir():
        if path.name not in keep:
            path.unlink()
