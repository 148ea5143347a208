"""Cutting sources into shards and jobs: nothing is left out, read twice or out of order, and sizes are bounded."""

from hypothesis import given
from hypothesis import strategies as st

from nemoflow.data.plan import jobs, shards

GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=12)
FILES = st.lists(st.one_of(st.integers(0, 200), GROUPS), max_size=20)
"""Files: an integer is the size of one that cannot be divided, a list the row groups of a Parquet file."""


def described(files) -> tuple[list[int], dict]:
    sizes = [f if isinstance(f, int) else sum(b for _, b in f) for f in files]
    return sizes, {n: f for n, f in enumerate(files) if not isinstance(f, int)}


def pieces(plan, groups) -> list[tuple]:
    """What a reader of the plan reads, in its order: (file,) or (file, row group)."""
    read = []
    for unit in (unit for shard in plan for unit in shard):
        if len(unit) == 3:
            read += [(unit[0], index) for index in range(unit[1], unit[2])]
        elif len(groups.get(unit[0], ())) > 1:
            read += [(unit[0], index) for index in range(len(groups[unit[0]]))]
        else:
            read.append((unit[0],))
    return read


@given(FILES, st.integers(1, 300))
def test_every_file_and_row_group_is_read_once_and_in_order(files, shard_size):
    sizes, groups = described(files)
    plan = shards(sizes, groups, shard_size)
    wanted = [
        piece
        for n in range(len(files))
        for piece in ([(n, i) for i in range(len(groups[n]))] if len(groups.get(n, ())) > 1 else [(n,)])
    ]
    assert pieces(plan, groups) == wanted
    assert all(plan)


@given(FILES, st.integers(1, 300))
def test_a_shard_is_larger_than_asked_only_when_it_cannot_be_cut(files, shard_size):
    sizes, groups = described(files)

    def weight(unit) -> int:
        return sizes[unit[0]] if len(unit) == 1 else sum(b for _, b in groups[unit[0]][unit[1] : unit[2]])

    plan = shards(sizes, groups, shard_size)
    bulk = [sum(map(weight, shard)) for shard in plan]
    for shard, size in zip(plan, bulk, strict=True):
        whole = shard[0][0]
        uncut = len(shard) == 1 and (
            len(groups.get(whole, ())) < 2 if len(shard[0]) == 1 else shard[0][2] - shard[0][1] == 1
        )
        assert size <= shard_size or uncut
    for i in range(1, len(plan)):  # none is cut early: what follows would not have fitted
        first = plan[i][0]
        large = sizes[first[0]] > shard_size and len(groups.get(first[0], ())) > 1
        start = first[1] if len(first) == 3 else 0
        following = groups[first[0]][start][1] if large else weight(first)
        assert bulk[i - 1] + following > shard_size


@given(FILES, st.integers(1, 300), st.integers(1, 2000))
def test_jobs_take_all_shards_in_order_and_stay_near_their_size(files, shard_size, job_bytes):
    sizes, groups = described(files)
    plan = shards(sizes, groups, shard_size)
    found = jobs(plan, [{"size": size} for size in sizes], job_bytes)
    assert [shard for first, count in found for shard in range(first, first + count)] == list(range(len(plan)))
    assert all(count > 0 for _, count in found)
    ends = {unit[0]: unit[2] for shard in plan for unit in shard if len(unit) == 3}

    def weight(unit) -> float:
        return sizes[unit[0]] if len(unit) == 1 else sizes[unit[0]] * (unit[2] - unit[1]) / ends[unit[0]]

    bulk = [sum(map(weight, shard)) for shard in plan]
    for first, count in found:
        assert sum(bulk[first : first + count]) <= job_bytes + max(bulk) + len(sizes)


def test_large_parquet_is_divided_and_shares_shards_with_its_neighbours():
    groups = {1: [[10, 40]] * 5}
    assert shards([30, 200, 30], groups, 100) == [[[0], [1, 0, 1]], [[1, 1, 3]], [[1, 3, 5]], [[2]]]
    assert shards([30, 200, 10], groups, 1000) == [[[0], [1], [2]]]


def test_a_file_whose_row_groups_are_smaller_than_itself_says_so_whole():
    """A footer can be larger than all else: then the pieces fit one shard though the file did not."""
    assert shards([200], {0: [[1, 10], [1, 10]]}, 100) == [[[0]]]


def test_small_sources_are_one_job_and_large_ones_evenly_many():
    assert jobs([[[0]], [[1]]], [{"size": 1}, {"size": 2}]) == [(0, 2)]
    assert jobs([[[i]] for i in range(8)], [{"size": 10}] * 8, 50) == [(0, 4), (4, 4)]
    assert jobs([[[0, 0, 2]], [[0, 2, 4]]], [{"size": 100}], 50) == [(0, 1), (1, 1)]
    assert jobs([], []) == []
    assert jobs([[[0]]], [{"size": 0}]) == [(0, 1)]
