"""Kind `shards`: a source in a tokenizer's ids, as Megatron's .bin/.idx, split into train, valid and test.

The format is that of megatron.core.datasets.indexed_dataset (version 1, not multimodal), written in one pass with
numpy. `.bin` is the ids of all documents one after the other; `.idx`, little endian:

    9 bytes   MMIDIDX, 0, 0
    uint64    1, the version
    uint8     type of the ids: 4 is int32, 8 is uint16
    uint64    sequences; here each document is one
    uint64    documents plus one
    int32[]   ids in each sequence
    int64[]   byte offset of each sequence in .bin
    int64[]   first sequence of each document, and the end
"""

import re
import struct
from array import array
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path

import numpy as np

from nemoflow.data.rows import SPLITS, Broken, Split, read, shards_of, text_of
from nemoflow.data.tokenizer import Trained, load
from nemoflow.errors import NemoflowError

_BATCH = 1000
"""Documents encoded at once: enough to keep the encoder busy, and all that is held in memory."""


def id_type(vocab_size: int) -> np.dtype:
    """Type of the ids in .bin; the bound is Megatron-Core's DType.optimal_dtype."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """Writes PREFIX.bin as documents come and PREFIX.idx at the end; holds four bytes a document in memory."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._prefix = prefix
        self._dtype = dtype
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 (closed by finish)
        self._lengths = array("i")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, ids: list[int]) -> None:
        """Append one document of at least one token."""
        self._bin.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self._lengths.append(len(ids))
        self.tokens += len(ids)

    def finish(self) -> None:
        """Write the index and close; without any document, leave no files, since Megatron refuses empty ones."""
        self._bin.close()
        if not self._lengths:
            Path(f"{self._prefix}.bin").unlink()
            return
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=offsets[1:])
        with Path(f"{self._prefix}.idx").open("wb") as index:
            code = {"<u2": 8, "<i4": 4}[self._dtype.str]
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write((offsets * self._dtype.itemsize).tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def _texts(shard: Path, field: str, broken: Broken) -> Iterator[str]:
    for place, _, row in read(shard, broken):
        try:
            yield text_of(row, field)
        except ValueError as error:
            broken.add(str(error), place)


def plain_text_encoder(tokenizer: Trained) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their ids in which no text becomes a control token: "</s>" in a document is spelled."""
    engine = load(tokenizer.directory).engine
    engine.encode_special_tokens = True
    return lambda texts: [e.ids for e in engine.encode_batch_fast(texts, add_special_tokens=False)]


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write SHARD.SPLIT.bin and .idx for each shard of inputs["source"], with inputs["tokenizer"].

    `payload` is {"valid", "test": shares as exact fractions, "text_field", "append_eod", "max_broken"}. A document's
    split depends on its text alone. A split without documents is not written.

    Returns {"eod", "dtype", "vocab_size", "prefixes": {split: [{"prefix", "documents", "tokens"}]}, "documents",
    "tokens": both of train, "broken": rows left out by reason, "control_strings": documents that spell a control
    token}.

    Raises NemoflowError when more than `max_broken` of the rows cannot be used, or none can.
    """
    tokenizer = load(inputs["tokenizer"])
    encode = plain_text_encoder(tokenizer)
    dtype = id_type(tokenizer.vocab_size)
    control = re.compile("|".join(map(re.escape, tokenizer.control_strings)) or r"(?!)")
    split = Split(payload["valid"], payload["test"])
    end = [tokenizer.eod] if payload["append_eod"] else []
    broken, spelled, used = Broken(), 0, 0
    prefixes: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for shard in shards_of(inputs["source"]):
        writers = {name: IndexedWriter(out / f"{shard.stem}.{name}", dtype) for name in SPLITS}
        for texts in batched(_texts(shard, payload["text_field"], broken), _BATCH):
            for text, ids in zip(texts, encode(list(texts)), strict=True):
                writers[split.of(text.encode())].add(ids + end)
                spelled += control.search(text) is not None
            used += len(texts)
        for name, writer in writers.items():
            writer.finish()
            if writer.documents:
                entry = {"prefix": f"{shard.stem}.{name}", "documents": writer.documents, "tokens": writer.tokens}
                prefixes[name].append(entry)
        progress(f"{shard.stem}: {used:,} documents so far")
    broken.check(used + broken.count, payload["max_broken"])
    if not prefixes["train"]:
        raise NemoflowError(
            f"{inputs['source']}: {used} usable documents, none in the train split; the corpus is empty"
        )
    return {
        "eod": tokenizer.eod,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "prefixes": prefixes,
        "documents": sum(entry["documents"] for entry in prefixes["train"]),
        "tokens": sum(entry["tokens"] for entry in prefixes["train"]),
        "broken": broken.measures(),
        "control_strings": spelled,
    }
