"""Packed files in Megatron-Bridge's schema, made of spools window by window.

A row is one pack, several sequences one after the other: `input_ids` list<int32>, `seq_start_id` list<int32> (where
each sequence begins), `loss_mask` list<int8>, shifted as module masks says.

Of a sequence of n tokens the reader makes n - 1 positions: the first n - 1 tokens as inputs, the last n - 1 as labels.
So a pack of size P holds sequences whose n - 1 add up to at most P, as Megatron-Bridge's own packing counts. Context
and sequence parallelism cut packs into parts, for which each sequence's positions must be a multiple of some m. It then
is followed by the end-of-document token, without loss, until n - 1 is one: by that token the reader (told
pad_seq_to_mult = m) knows padding, which it leaves out of attention.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.data.masks import LEARNED
from nemoflow.data.pack import best_fit
from nemoflow.data.shards import HashedFile
from nemoflow.data.spool import Window, windows

SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "seq_start_id")]).append(
    pa.field("loss_mask", pa.list_(pa.int8()))
)

WINDOW = 1 << 25
"""Tokens packed at a time: 134 MB, and so many packs that the last one, half empty, is nothing: 1,024 of 32,768."""

_ROW_GROUP = 1 << 21
"""Tokens in a row group, which the reader loads to get at one pack of it."""

_WRITING = {
    "compression": "zstd",
    "use_dictionary": ["loss_mask.list.element"],  # a dictionary of ids costs time, and saves a tenth of the space
    "write_statistics": False,
}


class _Sink(HashedFile):
    """A file that pyarrow can write to."""

    closed = False

    def flush(self) -> None:
        """There is no buffer."""

    def close(self) -> None:
        """The file goes on until `finish`."""


def write_packs(
    path: Path,
    spools: Path,
    numbers: Sequence[int],
    split: str,
    uses: int,
    tokens: int,
    payload: dict,
    pad: int,
    say: Callable[[int], None],
) -> tuple[dict, list[dict]]:
    """Pack what the spools with these numbers hold of a split: its measures, and the file as HashedFile.finish does.

    uses, tokens: how many there are. `payload` has "pack_size", "pad_multiple", "seed" and, if given, "window" in
    sequences. pad: id of the padding. `say` is told of tokens as they are written.

    Measures: {"sequences", "tokens", "loss_tokens", "padding" tokens, "packs", "fill": positions that are neither
    padding nor empty as a share of all, "longest": positions of the longest sequence, "most": sequences in the pack
    that has most, "least": positions of the emptiest pack}. Without sequences no file is written.
    """
    size, multiple = payload["pack_size"], payload["pad_multiple"]
    found = dict.fromkeys(("sequences", "tokens", "loss_tokens", "padding", "packs"), 0)
    found |= {"fill": 0.0, "longest": 0, "most": 0, "least": 0}
    if not uses:
        return found, []
    found["least"] = size
    fit = best_fit(uses)
    count = -(-uses // payload["window"]) if payload.get("window") else -(-tokens // WINDOW)
    random = np.random.PCG64(np.random.SeedSequence([payload["seed"], *split.encode()]))
    per_group = max(1, _ROW_GROUP // size)
    sink = _Sink(path)
    try:
        with pq.ParquetWriter(sink, SCHEMA, **_WRITING) as writer:
            for window in windows(spools, numbers, split, count):
                if not len(window.lengths):
                    continue
                room = -(-(window.lengths - 1) // multiple) * multiple
                members, ends = fit(room, size)
                filled = np.diff(np.cumsum(room[members])[ends - 1], prepend=0)
                found["sequences"] += len(room)
                found["tokens"] += int(window.lengths.sum())
                found["padding"] += int((room + 1 - window.lengths).sum())
                found["packs"] += len(ends)
                found["longest"] = max(found["longest"], int(room.max()))
                found["most"] = max(found["most"], int(np.diff(ends, prepend=0).max()))
                found["least"] = min(found["least"], int(filled.min()))
                packs = np.split(members, ends[:-1])
                shuffled = np.argsort(random.random_raw(len(packs)), kind="stable")  # the longest come first
                for first in range(0, len(packs), per_group):
                    table, learned = _table(window, room, [packs[p] for p in shuffled[first : first + per_group]], pad)
                    writer.write_table(table, row_group_size=per_group)
                    found["loss_tokens"] += learned
                say(int(window.lengths.sum()))
    except BaseException:
        sink.discard()
        raise
    found["fill"] = round((found["tokens"] - found["sequences"]) / (found["packs"] * size), 6)
    return found, [sink.finish()]


def _table(window: Window, room: np.ndarray, packs: list[np.ndarray], pad: int) -> tuple[pa.Table, int]:
    """The rows of some packs, and how many tokens of them are learned."""
    members = np.concatenate(packs)
    begins, lengths = window.starts[members], window.lengths[members]
    stored = room[members] + 1
    more = stored - lengths
    pieces = [window.tokens[a:b] for a, b in zip(begins.tolist(), (begins + lengths).tolist(), strict=True)]
    if more.any():
        padding = np.full(int(more.max()), pad, np.uint32)
        pieces = [part for piece, n in zip(pieces, more.tolist(), strict=True) for part in (piece, padding[:n])]
    joined = np.concatenate(pieces)
    mask = (joined >= LEARNED).view(np.int8)
    sequence_offsets = np.cumsum([0, *map(len, packs)])
    token_ends = np.concatenate([[0], np.cumsum(stored)])
    token_offsets = token_ends[sequence_offsets]
    starts = token_ends[:-1] - np.repeat(token_offsets[:-1], np.diff(sequence_offsets))

    def column(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(_array(offsets), _array(values))

    columns = [
        column(joined & ~LEARNED, token_offsets),
        column(starts, sequence_offsets),
        column(mask, token_offsets),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA), int(np.count_nonzero(mask))


def _array(values: np.ndarray) -> pa.Array:
    """int8 as it is, other numbers as int32. pyarrow's own way to do this imports pandas: half a second."""
    values = np.ascontiguousarray(values if values.dtype == np.int8 else values.astype(np.int32, copy=False))
    type_ = pa.int8() if values.dtype == np.int8 else pa.int32()
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(values)])
