import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoflow.data import pack as module
from nemoflow.data.pack import best_fit


def lognormal(count, size, seed=0):
    """Lengths like those of chats: a mixture of short and long ones, the over-long clipped."""
    random = np.random.default_rng(seed)
    long = random.random(count) < 0.15
    return np.clip(np.where(long, random.lognormal(8, 1, count), random.lognormal(6.2, 0.9, count)), 2, size).astype(
        int
    )


def pack(lengths, size, window=1 << 17):
    """(order, bins) of lengths packed window by window: bin b holds the lengths order[bins[b]:bins[b + 1]]."""
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    fit = best_fit(len(lengths))
    orders, bins = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for begin in range(0, len(lengths), window):
        order, ends = fit(lengths[begin : begin + window], size)
        orders.append(order + begin)
        bins.append(ends + begin)
    return np.concatenate(orders), np.concatenate(bins)


# -- packing -----------------------------------------------------------------------------------------------------------

packings = st.integers(1, 300).flatmap(
    lambda size: st.tuples(st.lists(st.integers(1, size), max_size=300), st.just(size), st.integers(1, 400))
)


@given(packings)
@settings(max_examples=300)
def test_every_length_is_in_one_bin_and_no_bin_overflows(packing):
    lengths, size, window = packing
    order, bins = pack(np.array(lengths, dtype=np.int64), size, window)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert bins[0] == 0
    assert bins[-1] == len(lengths)
    assert (np.diff(bins) > 0).all()
    for a, b in pairwise(bins):
        members = order[a:b]
        assert sum(lengths[i] for i in members) <= size
        assert len({i // window for i in members.tolist()}) == 1


@given(packings)
@settings(max_examples=100)
def test_bins_are_few(packing):
    """Best fit decreasing needs at most 11/9 of the fewest possible bins and one (Johnson 1973), hence of the sum, or
    of the lengths of which no two go together; and no two of a window's bins could be one."""
    lengths, size, _ = packing
    order, bins = pack(np.array(lengths, dtype=np.int64), size, len(lengths) or 1)
    fills = sorted(sum(lengths[i] for i in order[a:b]) for a, b in pairwise(bins))
    if len(fills) > 1:
        assert fills[0] + fills[1] > size
    large = sum(2 * length > size for length in lengths)
    if all(3 * length > size for length in lengths):  # two in a bin at most: then it is optimal
        small = sorted(length for length in lengths if 2 * length <= size)
        rooms = sorted(size - length for length in lengths if 2 * length > size)
        beside = 0
        for room in rooms:
            beside += beside < len(small) and small[beside] <= room
        assert len(fills) == large + -(-(len(small) - beside) // 2)
    assert len(fills) >= max(large, -(-sum(lengths) // size))


def test_a_packing_by_hand():
    order, bins = pack(np.array([5, 7, 5, 2, 4, 2, 5, 1]), 10, 100)
    # 7 opens; 5 and 5 fill the second; 5 the third, where 4 fits best; of 7's three, 2 and 1; 2 opens the last.
    assert [order[a:b].tolist() for a, b in pairwise(bins)] == [[1, 3, 7], [0, 2], [6, 4], [5]]


@given(packings)
@settings(max_examples=300, deadline=None)  # the first compiles
def test_the_compiled_form_does_what_the_plain_one_does(packing):
    lengths, size, _ = packing
    lengths = np.array(lengths, dtype=np.int64)
    for plain, compiled in zip(module._plain(lengths, size), module._compiled()(lengths, size), strict=True):
        assert plain.dtype == compiled.dtype == np.int64
        assert plain.tolist() == compiled.tolist()


@pytest.mark.parametrize("size", [31, 32, 33, 1023, 1024, 1025, 4096, 8192, 32768, 131072])
def test_the_compiled_form_does_what_the_plain_one_does_at_size(size):
    for lengths in (lognormal(5000, size), np.random.default_rng(1).integers(1, size + 1, 5000)):
        for plain, compiled in zip(module._plain(lengths, size), module._compiled()(lengths, size), strict=True):
            assert np.array_equal(plain, compiled)


def test_large_jobs_are_compiled_small_ones_are_not(monkeypatch):
    lengths = lognormal(3000, 4096)
    expected = pack(lengths, 4096, 1000)
    plain = module._plain
    monkeypatch.setattr(module, "_plain", lambda *_: pytest.fail("plain"))
    monkeypatch.setattr(module, "_COMPILE_FROM", 3000)
    for a, b in zip(expected, pack(lengths, 4096, 1000), strict=True):
        assert np.array_equal(a, b)
    monkeypatch.setattr(module, "_plain", plain)
    monkeypatch.setattr(module, "_compiled", lambda: pytest.fail("compiled"))
    pack(lengths[:-1], 4096, 1000)


def test_compiling_needs_no_place_for_a_cache(tmp_path):
    """As with a package that cannot be written, and no home."""
    program = (
        "import sys; sys.dont_write_bytecode = True\n"
        "import numpy as np; from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from nemoflow.data import pack\n"
        "print(pack._compiled()(np.array([3, 2, 1]), 5)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[0, 1, 2]\n", done.stderr


def test_numba_is_not_imported_for_a_small_job():
    program = (
        "import sys, numpy as np; from nemoflow.data.pack import best_fit; best_fit(9)(np.full(9, 3), 8)\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("size", [4096, 8192, 32768])
def test_packs_of_chats_are_full(size):
    lengths = lognormal(300_000, size)
    _, bins = pack(lengths, size)
    assert lengths.sum() / ((len(bins) - 1) * size) >= 0.999
