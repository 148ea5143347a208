"""Tokenized chats put into packs of one size, and written as Megatron-Bridge reads them.

A row is one pack, several sequences one after the other, with `input_ids` list<int32>, `seq_start_id` list<int32>
(where each sequence begins) and `loss_mask` list<int8>, shifted: loss_mask[k] says whether predicting token k + 1 from
token k is learned.

The reader feeds the model all tokens of a sequence but the last, whose place is among the labels: a sequence of n
tokens takes n - 1 of a pack, which is what Megatron-Bridge's own packing counts too. Where context or sequence
parallelism cut a pack into parts, each sequence must be *fed* in a multiple of some number m of tokens: it is stored as
a multiple of m, and one more. Padding carries no loss. Megatron-Bridge (told pad_seq_to_mult = m) takes what the end
of text fills at the end of a sequence for padding and leaves it out of attention; hence that is what to pad with.
"""

import bisect
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.errors import NemoflowError
from nemoflow.store import file_digest

FILES = {"train": "training.idx.parquet", "valid": "validation.idx.parquet"}
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "seq_start_id")]).append(
    pa.field("loss_mask", pa.list_(pa.int8()))
)
ROW_GROUP = 500
"""Packs in a row group: what the reader loads to get at one of them."""

_WRITING = {
    "compression": "zstd",
    "use_dictionary": ["loss_mask.list.element"],  # of ids, a dictionary makes larger files
    "write_statistics": False,
}

WINDOW = 1 << 17
"""Sequences packed together. Each window leaves its last pack partly empty: of 32,768 tokens, it needs this many."""

_COMPILE_FROM = 1_000_000
"""Sequences from which on loading the compiled packing takes less time than it saves."""


class Sequences(NamedTuple):
    """Tokenized chats one after the other; sequence i is ids[starts[i]:starts[i + 1]]. Arrays or memory maps."""

    ids: np.ndarray
    """int32 [tokens]"""
    mask: np.ndarray
    """int8 [tokens]: the shifted loss mask, 0 or 1"""
    starts: np.ndarray
    """int64 [sequences + 1]"""


def pack(lengths: np.ndarray, size: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Put lengths into bins of at most `size`: (order, bins), bin b holding the lengths order[bins[b]:bins[b + 1]].

    Each `window` of consecutive lengths by best fit decreasing (Johnson 1973): longest first, each goes into the
    fullest bin that has room, of equally full ones the one filled last; equal lengths keep their order. Bins are in
    the order they were opened. `lengths` is an integer array [n], `order` int64 [n], `bins` int64 [bins + 1].

    Raises ValueError when a length is not between 1 and `size`, or the window is empty.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if window < 1:
        raise ValueError(f"a window of {window} sequences")
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()}, but bins hold 1 to {size}")
    fit = best_fit(len(lengths))
    orders, bins = [], [np.zeros(1, dtype=np.int64)]
    for begin in range(0, len(lengths), window):
        order, ends = fit(lengths[begin : begin + window], size)
        orders.append(order + begin)
        bins.append(ends + begin)
    return np.concatenate([*orders, np.empty(0, dtype=np.int64)]), np.concatenate(bins)


def best_fit(count: int) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """The form of best fit decreasing that takes less time for `count` lengths in all; the results are the same.

    It is called with the lengths of one window, int64 [n] between 1 and the size, and the size of bins: (order, ends),
    int64, bin b holding the lengths order[ends[b - 1]:ends[b]]. Without lengths there are no bins.
    """
    return _plain if count < _COMPILE_FROM else _compiled()


def _plain(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For few lengths, which compiling would take longer for."""
    bins: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # free space -> bins that have it
    spaces: list[int] = []  # keys of with_space, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        else:
            space, chosen = size, []
            bins.append(chosen)
        chosen.append(index)
        space -= length
        if space:
            if space not in with_space:
                with_space[space] = []
                bisect.insort(spaces, space)
            with_space[space].append(chosen)
    order = np.array([i for chosen in bins for i in chosen], dtype=np.int64)
    return order, np.cumsum([len(chosen) for chosen in bins], dtype=np.int64)


@functools.cache
def _compiled() -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """`_best_fit` as machine code, kept on the disk where there is a place to keep it."""
    import numba  # half a second that small jobs do not need

    try:
        return numba.njit(cache=True)(_best_fit)
    except RuntimeError:  # neither the package's nor the user's cache directory can be written
        return numba.njit(_best_fit)


def _best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `_plain` does, in a form that numba compiles: in time O(lengths + size) but for the search in a bitmap."""
    count = len(lengths)
    # Longest first, by counting.
    at = np.zeros(size + 2, dtype=np.int64)
    for length in lengths:
        at[size - length + 1] += 1
    for i in range(1, size + 2):
        at[i] += at[i - 1]
    decreasing = np.empty(count, dtype=np.int64)
    for i in range(count):
        place = size - lengths[i]
        decreasing[at[place]] = i
        at[place] += 1
    # Bins with the same free space are a linked list. Bit s of `some` says whether there are any with space s, bit w of
    # `words` whether word w of `some` has a bit: 32 to a word, for exact lowest bits in signed numbers and in floats.
    first = np.full(size + 1, -1, dtype=np.int64)
    following = np.empty(count, dtype=np.int64)
    some = np.zeros((size >> 5) + 1, dtype=np.int64)
    words = np.zeros((size >> 10) + 1, dtype=np.int64)
    bin_of = np.empty(count, dtype=np.int64)
    opened = 0
    for k in range(count):
        length = lengths[decreasing[k]]
        word = length >> 5
        bits = some[word] >> (length & 31) << (length & 31)
        if bits == 0:
            block = (word + 1) >> 5
            if block < len(words):
                bits = words[block] >> ((word + 1) & 31) << ((word + 1) & 31)
                while bits == 0 and block + 1 < len(words):
                    block += 1
                    bits = words[block]
                if bits != 0:
                    word = (block << 5) + math.frexp(float(bits & -bits))[1] - 1
                    bits = some[word]
        if bits != 0:
            space = (word << 5) + math.frexp(float(bits & -bits))[1] - 1
            chosen = first[space]
            first[space] = following[chosen]
            if first[space] < 0:
                some[word] &= ~(1 << (space & 31))
                if some[word] == 0:
                    words[word >> 5] &= ~(1 << (word & 31))
        else:
            space = size
            chosen = opened
            opened += 1
        bin_of[k] = chosen
        space -= length
        if space > 0:
            following[chosen] = first[space]
            first[space] = chosen
            some[space >> 5] |= 1 << (space & 31)
            words[space >> 10] |= 1 << ((space >> 5) & 31)
    # Bin by bin, by counting.
    ends = np.zeros(opened + 1, dtype=np.int64)
    for chosen in bin_of:
        ends[chosen + 1] += 1
    for b in range(opened):
        ends[b + 1] += ends[b]
    order = np.empty(count, dtype=np.int64)
    for k in range(count):
        chosen = bin_of[k]
        order[ends[chosen]] = decreasing[k]
        ends[chosen] += 1  # at last where the bin ends
    return order, ends[:opened]


def write_packed(
    path: Path,
    sequences: Sequences,
    uses: np.ndarray,
    pack_size: int,
    window: int = WINDOW,
    seed: int = 0,
    pad_multiple: int = 1,
    pad: int = 0,
) -> dict:
    """Pack the sequences whose indices are in `uses`, each as often as it is there, and write them to `path`.

    No pack feeds more than `pack_size` tokens. Uses are shuffled, then packed in windows of `window`, then the packs
    are shuffled, all by `seed`. Every sequence is fed in a multiple of `pad_multiple` tokens, filled up with id `pad`
    (the end of text, see above). Memory: a row group, and five integers for each use.

    Returns {"packs", "tokens" and "loss_tokens" of all uses, "padding" tokens stored, "fill": fed tokens, without
    padding, as a share of what the packs hold, "file": {"name", "size" in bytes, "blake3"}}. Without uses no file is
    written: all are 0, "file" is None.

    Raises NemoflowError when the pack size is no multiple of `pad_multiple`, or a sequence has fewer than two tokens
    (nothing to predict) or more than fit in a pack.
    """
    if pad_multiple < 1 or pack_size % pad_multiple:
        raise NemoflowError(
            f"pack_size: {pack_size} is not a multiple of {pad_multiple}, the tokens to which context and sequence "
            f"parallelism pad each chat; take {max(pack_size // max(pad_multiple, 1), 1) * pad_multiple}"
        )
    if not len(uses):
        return {"packs": 0, "tokens": 0, "loss_tokens": 0, "padding": 0, "fill": 0, "file": None}
    random = np.random.Generator(np.random.PCG64(seed))
    uses = random.permutation(uses)  # so that the repeats of a chat, equally long, are not packed side by side
    sizes = np.diff(sequences.starts)[uses]
    if sizes.min() < 2 or sizes.max() > pack_size + 1:
        wrong = int(uses[(sizes < 2) | (sizes > pack_size + 1)][0])
        raise NemoflowError(
            f"{path}: sequence {wrong} has {np.diff(sequences.starts)[wrong]} tokens; a pack of {pack_size} takes 2 to "
            f"{pack_size + 1}"
        )
    fed = -(-(sizes - 1) // pad_multiple) * pad_multiple
    order, bins = pack(fed, pack_size, window)
    padding = fed + 1 - sizes
    shuffled = random.permutation(len(bins) - 1)  # packing leaves the longest chats first
    loss_tokens = 0
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, SCHEMA, **_WRITING) as writer:
            for begin in range(0, len(shuffled), ROW_GROUP):
                group = shuffled[begin : begin + ROW_GROUP]
                members = [order[bins[b] : bins[b + 1]] for b in group]
                counts = np.array([len(m) for m in members])
                flat = np.concatenate(members)
                table, learned = _table(sequences, uses[flat], padding[flat], counts, pad)
                writer.write_table(table, row_group_size=ROW_GROUP)
                loss_tokens += learned
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        digest = file_digest(temporary, "blake3")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {
        "packs": len(shuffled),
        "tokens": int(sizes.sum()),
        "loss_tokens": loss_tokens,
        "padding": int(padding.sum()),
        "fill": round(int((sizes - 1).sum()) / (len(shuffled) * pack_size), 6),
        "file": {"name": path.name, "size": path.stat().st_size, "blake3": digest},
    }


def _table(
    sequences: Sequences, members: np.ndarray, padding: np.ndarray, counts: np.ndarray, pad: int
) -> tuple[pa.Table, int]:
    """The rows of some packs, `counts` sequences each of `members`, each with its padding; and the 1s in the mask."""
    ids, mask = np.asarray(sequences.ids), np.asarray(sequences.mask)  # a slice of a memory map costs ten times as much
    begins, ends = sequences.starts[members], sequences.starts[members + 1]
    stored = ends - begins + padding
    sequence_offsets = np.concatenate([[0], np.cumsum(counts)])
    token_ends = np.concatenate([[0], np.cumsum(stored)])
    token_offsets = token_ends[sequence_offsets]
    starts = token_ends[:-1] - np.repeat(token_offsets[:-1], counts)
    spans = list(zip(begins.tolist(), ends.tolist(), padding.tolist(), strict=True))

    def joined(flat: np.ndarray, fill: int) -> np.ndarray:
        filler = np.full(padding.max(), fill, dtype=flat.dtype)
        if not len(filler):
            return np.concatenate([flat[begin:end] for begin, end, _ in spans])
        return np.concatenate([part for begin, end, more in spans for part in (flat[begin:end], filler[:more])])

    def column(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))

    learned = joined(mask, 0)
    columns = [
        column(joined(ids, pad), token_offsets),
        column(starts.astype(np.int32), sequence_offsets),
        column(learned, token_offsets),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA), int(np.count_nonzero(learned))
