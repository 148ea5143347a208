"""Trainings of several processes on several nodes, of which one process dies or hangs."""

import json
import signal
from collections.abc import Iterator

import psutil
from box import Box, wait

NAME = "pretrain/demo@phase1"


def ranks(number: int, job: int) -> Iterator[tuple[str, psutil.Process]]:
    """(node, process) of a job's `number` ranks; fails when they do not come."""

    def found():
        there = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            environment, words = process.info["environ"] or {}, process.info["cmdline"] or []
            mine = environment.get("SLURM_JOB_ID") == str(job) and "RANK" in environment
            if mine and "sleep_engine" in words[1:3]:
                there.append((environment["SLURMD_NODENAME"], process))
        return there if len(there) == number else None

    return wait(found, f"{number} ranks", seconds=120)


def attempts(trajectory) -> list[dict]:
    return json.loads((trajectory / "run.json").read_text())["attempts"]


def test_a_rank_that_is_killed(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.3}, resources={"nodes": 2, "gpus_per_node": 2})
    before = slurm.jobs()
    child = demo.start(NAME)
    trajectory = demo.wait_for("pretrain", 8, seconds=180)
    (job,) = slurm.jobs().keys() - before.keys()
    found = ranks(4, job)
    assert len({node for node, _ in found}) == 2
    found[-1][1].send_signal(signal.SIGKILL)
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    died, done = attempts(trajectory)
    assert (died["outcome"], done["outcome"]) == ("died", "done")
    assert "killed" in died["reason"]
    assert len(died["nodes"]) == 2
    assert died["gpus"] == 4
    assert slurm.jobs().keys() - before.keys() == {job}
    demo.check_never_lost(trajectory)


def test_a_node_where_it_hangs_twice_is_left_out(slurm: Box, demo):
    demo.set(
        "phase1",
        overrides={"sleep.seconds": 0.3},
        resources={"nodes": 2, "gpus_per_node": 2},
        guard={"hang_least": "12s"},
    )
    before = slurm.jobs()
    child = demo.start(NAME)
    node = None
    for slot, iteration in enumerate((7, 12)):
        trajectory = demo.wait_for("pretrain", iteration, seconds=180)
        (job,) = slurm.jobs().keys() - before.keys()
        found = dict(ranks(4, job))  # a rank of each node
        node = node or max(found)
        found[node].suspend()
        wait(lambda: attempts(trajectory)[slot].get("outcome"), "word that it hangs", seconds=180)  # noqa: B023
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    first, second, last = attempts(trajectory)
    assert [a["outcome"] for a in (first, second, last)] == ["hung", "hung", "done"]
    assert first["suspect"] == second["suspect"] == node
    assert node in first["nodes"]
    assert node not in last["nodes"]
    assert f"{node} is where it hangs, again" in said
    assert slurm.jobs().keys() - before.keys() == {job}
    demo.check_never_lost(trajectory)
