"""How a source's files are cut into shards, and the shards dealt out to jobs.

Pure functions of sizes: the same files give the same plan everywhere. A shard is a list of units, as readers of a
source know them: `[file]`, a whole file, or `[file, first, end]`, row groups of a Parquet file, `end` excluded. Shards
follow each other in the order of the files, so reading them in turn reads the source once and in order.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

Unit = list[int]
Plan = list[list[Unit]]

JOB_BYTES = 32 * 2**30
"""Raw bytes one job should read: minutes to an hour of tokenizing, beside which starting a job is nothing."""


def shards(sizes: Sequence[int], row_groups: Mapping[int, Sequence[Sequence[int]]], shard_size: int) -> Plan:
    """Cut files of `sizes` bytes, in order, into shards of at most `shard_size` bytes where they can be cut.

    row_groups: number of a Parquet file -> [rows, compressed bytes] of each of its row groups. Files larger than
    `shard_size` are divided between row groups; those without an entry stay whole. A shard larger than `shard_size` is
    one such file or one row group. No shard is empty; no files give no shards.
    """
    plan: Plan = []
    filled = 0

    def add(unit: Unit, size: int) -> None:
        nonlocal filled
        if plan and filled + size <= shard_size:
            last = plan[-1][-1]
            if len(unit) == 3 and len(last) == 3 and last[0] == unit[0]:
                last[2] = unit[2]
            else:
                plan[-1].append(unit)
            filled += size
        else:
            plan.append([unit])
            filled = size

    for number, size in enumerate(sizes):
        groups = row_groups.get(number, ())
        if size <= shard_size or len(groups) < 2:
            add([number], size)
            continue
        for index, (_, compressed) in enumerate(groups):
            add([number, index, index + 1], compressed)
        if plan[-1][-1] == [number, 0, len(groups)]:
            plan[-1][-1] = [number]
    return plan


def jobs(plan: Plan, files: Sequence[dict], job_bytes: int = JOB_BYTES) -> list[tuple[int, int]]:
    """Deal the shards of a plan out to jobs of about equal size: (first shard, number of shards) of each, in order.

    files: {"size": bytes, ...} of each file of the plan. A job reads at most `job_bytes`, give or take one shard. Row
    groups count as equal parts of their file, which is close enough here and needs no footers.
    """
    groups: dict[int, int] = {}
    for unit in (u for shard in plan for u in shard if len(u) == 3):
        groups[unit[0]] = max(unit[2], groups.get(unit[0], 0))

    def size_of(unit: Unit) -> int:
        size = files[unit[0]]["size"]
        return size if len(unit) == 1 else size * (unit[2] - unit[1]) // groups[unit[0]]

    sizes = [sum(map(size_of, shard)) for shard in plan]
    total = sum(sizes)
    wanted = -(-total // job_bytes)
    starts, before, previous = [], 0, None
    for shard, size in enumerate(sizes):
        job = (2 * before + size) * wanted // (2 * total) if total else 0  # the job in whose share the middle falls
        if job != previous:
            starts.append(shard)
            previous = job
        before += size
    return [(first, end - first) for first, end in pairwise([*starts, len(plan)])]
