"""Kind `shards`: a source, or a part of one, in a tokenizer's ids, as Megatron's .bin/.idx.

A shard is a run of units of its source. Each has a receipt, NNNNN.json, renamed into place last: what an interrupted
job finished has one and is kept, the rest is made again, to the same bytes.

    00007.train.bin/.idx           documents in the order of the source
    00007.pool.bin/.idx/.hashes    those with the smallest hashes, apart, of which `merge` takes valid and test;
                                   .hashes is xxh3_64 of each text, uint64, little endian
    00007.json                     what was counted, and these files with sizes and digests

What would have no documents is not written. The format of .bin and .idx is that of
megatron.core.datasets.indexed_dataset (version 1, not multimodal). `.bin` is the ids of all documents one after the
other; `.idx`, little endian:

    9 bytes   MMIDIDX, 0, 0
    uint64    1, the version
    uint8     type of the ids: 4 is int32, 8 is uint16
    uint64    sequences; here each document is one
    uint64    documents plus one
    int32[]   ids in each sequence
    int64[]   byte offset of each sequence in .bin
    int64[]   first sequence of each document, and the end
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from nemoflow.data import indexed
from nemoflow.data.encode import ENGINES, Encoder, Sample
from nemoflow.data.made import Made
from nemoflow.data.processes import Speed, in_processes
from nemoflow.data.rows import Broken, Texts, texts
from nemoflow.data.sources import Source, open_source
from nemoflow.data.tokenizer import Trained, load
from nemoflow.errors import NemoflowError

RESUMES = True
"""The directory given to `make` may hold what an interrupted attempt finished."""

_HEADER = struct.Struct("<9sQBQQ")
_LONGEST = 2**31 - 1
"""Ids in the longest sequence an .idx can tell."""

_SMALL = 256 << 10
"""Bytes of files that the reference has encoded before a fast engine is loaded."""

_MUCH = 64 << 20
"""Bytes of files in which some documents spell control tokens, as a rule."""

_STEP = 1 << 20
"""Numbers taken at once from an index that is as long as there are documents."""


def id_type(vocab_size: int) -> np.dtype:
    """Type of the ids in .bin; the bound is Megatron-Core's DType.optimal_dtype."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class HashedFile:
    """A file that comes into being whole: written under a temporary name, its digest taken while it is written."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb", 0)
        self._digest = blake3()
        self._size = 0

    def write(self, data: Any) -> None:
        """Append a buffer."""
        rest = memoryview(data).cast("B")
        self._digest.update(rest)
        self._size += len(rest)
        while rest:  # one call writes 2 GiB at most
            rest = rest[self._file.write(rest) :]

    def finish(self) -> dict:
        """Put the file in its place, on the disk; returns {"name", "size" in bytes, "blake3"}."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return {"name": self._path.name, "size": self._size, "blake3": self._digest.hexdigest()}

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink()


class IndexedWriter:
    """Writes PREFIX.bin, and PREFIX.idx at the end, in bounded memory: the index grows on the disk."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._dtype = dtype
        self._index = Path(f"{prefix}.idx")
        self._bin = HashedFile(Path(f"{prefix}.bin"))
        self._lengths_path = self._index.with_name(f"{self._index.name}.{os.getpid()}.lengths.tmp")
        self._lengths = self._lengths_path.open("w+b")
        self.documents = self.tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids one after the other, of an integer type, and how many each has, at least one."""
        if self._dtype.itemsize == 4 and ids.dtype.itemsize == 4:
            ids = ids.view("<i4")
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype))
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4"))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> list[dict]:
        """Write the index; returns the files as HashedFile.finish does. Without documents there are none."""
        if not self.documents:
            self.discard()
            return []
        index = HashedFile(self._index)
        code = {"<u2": 8, "<i4": 4}[self._dtype.str]
        index.write(_HEADER.pack(b"MMIDIDX\x00\x00", 1, code, self.documents, self.documents + 1))
        for lengths in self._stored():
            index.write(lengths)
        offset = 0
        for lengths in self._stored():
            ends = np.cumsum(lengths, dtype="<i8") + offset
            index.write((ends - lengths) * self._dtype.itemsize)
            offset = int(ends[-1])
        for first in range(0, self.documents + 1, _STEP):
            index.write(np.arange(first, min(first + _STEP, self.documents + 1), dtype="<i8"))
        self._lengths.close()
        self._lengths_path.unlink()
        return [self._bin.finish(), index.finish()]

    def discard(self) -> None:
        """Leave nothing behind."""
        self._bin.discard()
        self._lengths.close()
        self._lengths_path.unlink()

    def _stored(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while part := self._lengths.read(4 * _STEP):
            yield np.frombuffer(part, "<i4")


class _Part:
    """One of a shard's two halves, train and pool."""

    def __init__(self, prefix: Path, dtype: np.dtype, hashes: bool):
        self.writer = IndexedWriter(prefix, dtype)
        self._hashes = HashedFile(Path(f"{prefix}.hashes")) if hashes else None

    def add(self, ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> None:
        if len(lengths):
            self.writer.add(ids, lengths)
            if self._hashes:
                self._hashes.write(hashes.astype("<u8"))

    def finish(self) -> list[dict]:
        files = self.writer.finish()
        if self._hashes and files:
            files.append(self._hashes.finish())
        elif self._hashes:
            self._hashes.discard()
        return files


class _Work:
    """What the shards of a job have in common, and how one is made."""

    def __init__(self, payload: dict, source: Source, encoder: Encoder | None, tokenizer: Trained, out: Path):
        self._payload, self._source, self._encoder, self._out = payload, source, encoder, out
        self._tokenizer, self._dtype = tokenizer, id_type(tokenizer.vocab_size)
        self._pool_below = math.ceil(Fraction(payload["pool"]) * 2**64)

    def make(self, number: int, count: Callable[[int, int, int], None]) -> None:
        """Write one shard, and its receipt. `count` is told of documents, bytes and tokens as they are written.

        Raises NemoflowError as the module's `make` does.
        """
        units = [tuple(unit) for unit in self._payload["shards"][number - self._payload["first"]]]
        stem = self._out / f"{number:05d}"
        parts = _Part(Path(f"{stem}.train"), self._dtype, False), _Part(Path(f"{stem}.pool"), self._dtype, True)
        counts = {"rows": 0, "bytes": 0, "control_strings": 0, "by_reference": 0}
        dropped: Counter[str] = Counter()
        first_dropped: list = []
        histogram = np.zeros(32, np.int64)
        batches = self._encoded(units, counts, dropped, first_dropped) if self._encoder else self._read(units, counts)
        for size, *documents in batches:
            for part, own in zip(parts, self._divided(*documents), strict=True):
                part.add(*own)
            ids, lengths, _ = documents
            histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=32)
            count(len(lengths), size, len(ids))
        files = [file for part in parts for file in part.finish()]
        _sync(self._out)
        receipt = {
            "shard": number,
            "rows": counts["rows"],
            "documents": sum(part.writer.documents for part in parts),
            "tokens": sum(part.writer.tokens for part in parts),
            "bytes": counts["bytes"],
            "dropped": dict(sorted(dropped.items())),
            "first_dropped": first_dropped or None,
            "control_strings": counts["control_strings"],
            "by_reference": counts["by_reference"],
            "lengths": histogram.tolist(),
            **{
                name: {"documents": part.writer.documents, "tokens": part.writer.tokens}
                for name, part in zip(("train", "pool"), parts, strict=True)
            },
            "files": files,
        }
        file = HashedFile(_receipt_path(self._out, number))
        file.write((json.dumps(receipt, indent=1, ensure_ascii=False) + "\n").encode())
        file.finish()

    def _encoded(self, units: list[tuple], counts: dict, dropped: Counter, first_dropped: list) -> Iterator[tuple]:
        """Batches of tokenized texts: bytes of text, ids, lengths, hashes of the texts. Adds to what is counted."""
        sample = Sample()
        for batch in texts(self._source, units, self._payload["text_field"]):
            counts["rows"] += len(batch.texts) + len(batch.dropped)
            for row, reason in batch.dropped:
                first_dropped[:] = first_dropped or [batch.file, row, reason]
                dropped[reason] += 1
            if not batch.texts:
                continue
            encoded = self._encoder.encode(batch.texts)
            self._check_lengths(encoded.lengths, batch)
            hashes = np.fromiter(map(xxh3_64_intdigest, batch.texts), np.uint64, len(batch.texts))
            sample.add(batch.texts, hashes, encoded, lambda i, batch=batch: (batch.file, batch.rows[i]))
            size = sum(map(len, batch.texts))
            counts["bytes"] += size
            counts["control_strings"] += len(encoded.spelled)
            counts["by_reference"] += len(encoded.by_reference)
            yield size, encoded.ids, encoded.lengths, hashes
        if self._encoder.engine != "tokenizers" and (place := sample.differing(self._encoder)):
            raise NemoflowError(
                f"{self._source.place(*place)}: {self._encoder.engine} gives this document other ids than tokenizers "
                "does; set tokenizer.engine: tokenizers, and tell the makers"
            )

    def _read(self, units: list[tuple], counts: dict) -> Iterator[tuple]:
        """The same of documents that others tokenized; bytes are those of their ids."""
        eod = self._tokenizer.eod if self._payload["append_eod"] else None
        for (number,) in units:
            path, origin = self._source.path(number), self._source.origin(number)
            for documents in indexed.read(path, origin, self._tokenizer.vocab_size, eod):
                counts["rows"] += len(documents.lengths)
                counts["bytes"] += documents.ids.nbytes
                yield documents.ids.nbytes, *documents

    def _check_lengths(self, lengths: np.ndarray, batch: Texts) -> None:
        if lengths.max() > _LONGEST:
            raise NemoflowError(
                f"{self._source.place(batch.file, batch.rows[int(lengths.argmax())])}: {lengths.max():,} tokens in one "
                f"document, of which Megatron's index can tell {_LONGEST:,}; divide it"
            )
        if not lengths.min():
            raise NemoflowError(
                f"{self._source.place(batch.file, batch.rows[int(lengths.argmin())])}: not one token in this document, "
                "which Megatron's index cannot hold; set append_eod: true"
            )

    def _divided(self, ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> Iterator[tuple]:
        """(ids, lengths, hashes) of a batch's documents that belong to train, then of those that belong to the pool."""
        nothing = ids[:0], lengths[:0], hashes[:0]
        pooled = hashes <= np.uint64(self._pool_below - 1) if self._pool_below else np.zeros(len(hashes), bool)
        if not pooled.any():
            yield from ((ids, lengths, hashes), nothing)
        elif pooled.all():
            yield from (nothing, (ids, lengths, hashes))
        else:
            runs = np.flatnonzero(np.diff(pooled)) + 1
            pieces = np.split(ids, np.cumsum(lengths)[runs - 1])
            for part in (False, True):
                of = pooled == part
                yield np.concatenate(pieces[int(pooled[0] != part) :: 2]), lengths[of], hashes[of]


def _sync(directory: Path) -> None:
    """Make sure that the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _receipt_path(out: Path, number: int) -> Path:
    return out / f"{number:05d}.json"


def _receipt(out: Path, number: int) -> dict | None:
    """The receipt of a finished shard whose files are all there."""
    try:
        receipt = json.loads(_receipt_path(out, number).read_bytes())
        whole = all((out / file["name"]).stat().st_size == file["size"] for file in receipt["files"])
    except (OSError, ValueError):
        return None
    return receipt if whole else None


def _remove_all_but(out: Path, receipts: Iterable[dict]) -> None:
    """Remove what belongs to no finished shard."""
    keep = {file["name"] for receipt in receipts for file in receipt["files"]}
    keep.update(_receipt_path(out, receipt["shard"]).name for receipt in receipts)
    for path in out.iterdir():
        if path.name not in keep:
            path.unlink()


def _broken(source: Source, receipt: dict) -> Broken:
    """The dropped rows of a shard."""
    broken = Broken()
    broken.reasons = dict(receipt["dropped"])
    if receipt["first_dropped"]:
        file, row, reason = receipt["first_dropped"]
        broken.first = f"shard {receipt['shard']}: {source.place(file, row)}: {reason}"
    return broken


def check_dropped(source: Source, receipts: Iterable[dict], max_broken: str) -> None:
    """Raise NemoflowError naming the worst shard when in one a larger share of the rows than `max_broken` was dropped.

    receipts: measures of shards, with "dropped", "first_dropped" and "rows".
    """
    worst = max(receipts, key=lambda r: Fraction(sum(r["dropped"].values()), max(r["rows"], 1)), default=None)
    if worst:
        _broken(source, worst).check(worst["rows"], max_broken)


def make(
    payload: dict,
    inputs: dict,
    out: Path,
    progress: Callable[[str], None],
    threads: int = 1,
    launch: dict | None = None,
) -> Made:
    """Write the shards of a job, in up to `threads` processes; those that `out` holds finished are kept.

    `payload` is {"text_field", "append_eod", "control_strings": "plain" or "control", "max_broken", "pool": share of
    the documents that go to the pool, an exact fraction, "first": number of the first shard, "shards": [[unit, ...],
    ...]}; inputs are "source" and "tokenizer"; `launch` may name the "engine". Bytes depend on none but payload and
    inputs.

    Returns as measures {"eod", "dtype", "vocab_size", "shards": [{"shard", "rows", "documents", "tokens", "bytes" of
    text, "dropped": rows left out by reason, "first_dropped": [file, row, reason] or null, "control_strings":
    documents that spell a control token, "by_reference": those encoded by the reference, "lengths": how many have
    2**k tokens or more but not 2**(k + 1), for k from 0 to 31, "train", "pool": {"documents", "tokens"}}]}.

    Raises NemoflowError when a file cannot be read, when in a shard more than `max_broken` of the rows cannot be used,
    and when the engine is found to differ from the reference.
    """
    source, tokenizer = open_source(inputs["source"]), load(inputs["tokenizer"])
    numbers = range(payload["first"], payload["first"] + len(payload["shards"]))
    receipts = {n: found for n in numbers if (found := _receipt(out, n))}
    _remove_all_but(out, receipts.values())
    todo = [n for n in numbers if n not in receipts]
    if todo:
        files = {unit[0] for number in todo for unit in payload["shards"][number - payload["first"]]}
        size = sum(source.path(file).stat().st_size for file in files)
        encoder = None
        if source.format != "megatron":
            engine = "tokenizers" if size < _SMALL else (launch or {}).get("engine", ENGINES[0])
            end = tokenizer.eod if payload["append_eod"] else None
            encoder = Encoder(tokenizer, engine, payload["control_strings"], end, progress, size > _MUCH)
        work = _Work(payload, source, encoder, tokenizer, out)
        try:
            for n in in_processes(work.make, todo, threads, Speed(progress, len(numbers), len(receipts))):
                receipts[n] = _receipt(out, n)
                check_dropped(source, receipts.values(), payload["max_broken"])
        except BaseException:
            _remove_all_but(out, receipts.values())  # it may be what filled the disk
            raise
    check_dropped(source, receipts.values(), payload["max_broken"])
    contents = []
    for number in numbers:
        path = _receipt_path(out, number)
        content = path.read_bytes()
        contents += receipts[number].pop("files")
        contents.append({"name": path.name, "size": len(content), "blake3": blake3(content).hexdigest()})
    measures = {
        "eod": tokenizer.eod,
        "dtype": id_type(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "shards": [receipts[number] for number in numbers],
    }
    return Made(measures, sorted(contents, key=lambda file: file["name"]))
