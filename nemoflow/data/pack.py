"""Sequences put into packs of one size: best fit decreasing, as plain Python and as machine code."""

import bisect
import functools
import math
from collections.abc import Callable

import numpy as np

_COMPILE_FROM = 1_000_000
"""Sequences from which on loading the compiled packing takes less time than it saves."""


def best_fit(count: int) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """The form of best fit decreasing that takes less time for `count` lengths in all; the results are the same.

    Longest first, each length goes into the fullest bin that has room, of equally full ones the one filled last; equal
    lengths keep their order (Johnson 1973). Bins are in the order they were opened.

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
