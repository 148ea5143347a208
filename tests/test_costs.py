"""GPU-hours of a plan, budgets, and limits of partitions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nemoflow import costs, slurm
from nemoflow.cluster import Cluster
from nemoflow.costs import Cost
from nemoflow.errors import NemoflowError
from nemoflow.session import Session

RECIPES = [Path(__file__).resolve().parents[1] / "config/recipes"]
BATCH = slurm.Partition("batch", 4 * 3600, 64, 100, 96, 1_000_000, {"h100": 8}, default=True)
ASKED = {
    "mpi": "srun",
    "nodes": 2,
    "tasks_per_node": 8,
    "cpus_per_task": 4,
    "runtime": 240,
    "mem_mb": 900_000,
    "gres": "gpu:h100:8",
}


@pytest.fixture
def session(tmp_path) -> Session:
    """The toy recipe on a cluster, its first stage on 2 x 4 GPUs for at most 10 slots of 30 minutes."""
    stages = {"phase1": {"nodes": 2, "gpus_per_node": 4, "time": "30m", "slots": 10}}
    found = Session(tmp_path / "artifacts", RECIPES)
    found.cluster = Cluster(gpu="h100", stages=stages, budget=30)
    found.resolve(["pretrain/nano3-tiny@phase1"])
    return found


@pytest.fixture
def phase1(session):
    (target,) = session.names["pretrain/nano3-tiny@phase1"].values()
    session.store.freeze(target.stage.identity)
    target.stage.directory.mkdir(parents=True)
    return target.stage


def test_before_the_first_checkpoint_it_is_the_most_that_slots_allow(session, phase1):
    assert session.cost(phase1.identity, 90) == Cost(2 * 4 * 0.5 * 10, False)


def test_the_plan_says_so(session):
    """Of a stage that the overrides above leave alone."""
    session.resolve(["sft/nano3-tiny"])
    (target,) = session.names["sft/nano3-tiny"].values()
    line = session.plan(target.stage.identity, target.at)
    assert line.endswith("1 x 1 h100, slots of 4h, at most 200 GPU-hours")


def test_afterwards_it_is_measured_whatever_number_of_gpus_it_was_on(session, phase1, monkeypatch):
    attempts = [
        {"from": 0, "reached": 20, "seconds": 3600, "gpus": 8},
        {"from": 20, "reached": 20, "seconds": 900, "gpus": 8},  # of what saved nothing, nothing can be said
        {"from": 20, "reached": 40, "seconds": 1800, "gpus": 16},
    ]
    (phase1.directory / "run.json").write_text(json.dumps({"attempts": attempts}))
    monkeypatch.setattr("nemoflow.slots.reached", lambda _: 40)
    assert session.cost(phase1.identity, 90) == Cost(pytest.approx(16 / 40 * 50), True)


def test_nothing_is_said_of_gpus_where_there_are_none(session, phase1):
    session.cluster = Cluster(gpus_per_node=0)
    assert session.cost(phase1.identity, 90) is None
    session.cluster = None
    assert session.cost(phase1.identity, 90) is None


def test_a_budget_is_kept_unless_approved(session):
    session.check_budget([Cost(20, True)], 0)
    with pytest.raises(NemoflowError, match=r"at most 41 GPU-hours, and the budget in .* is 30; .*approve=41"):
        session.check_budget([Cost(20, True), Cost(21, False)], 0)
    session.check_budget([Cost(20, True), Cost(21, False)], 41)
    with pytest.raises(NemoflowError, match="--config approve=lots: write a number of GPU-hours"):
        session.check_budget([], "lots")
    session.cluster = Cluster()
    session.check_budget([Cost(1e6, False)], 0)


def test_numbers_are_rounded_to_what_is_known():
    assert [costs.rounded(h) for h in (0.034, 3.14, 12.3, 312.4, 406_912)] == ["0.034", "3.1", "12", "310", "410,000"]
    assert str(costs.total([Cost(1, True), Cost(2, False)])) == "at most 3 GPU-hours"


def test_what_fits_its_partition():
    assert costs.problems(ASKED, {"batch": BATCH}) == []
    assert costs.problems(ASKED, {"batch": replace(BATCH, max_time=None, max_nodes=None)}) == []


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"runtime": 300}, "time", "300 minutes, and partition batch has at most 240"),
        ({"nodes": 65}, "nodes", "65 nodes, and partition batch has at most 64"),
        ({"mem_mb": 2_000_000}, "memory", "2,000,000 MB a node, and partition batch has at most 1,000,000"),
        ({"cpus_per_task": 16}, "gpus_per_node", "128 processors a node (cpus_per_gpu each), and partition batch has"),
        ({"gres": "gpu:h100:16"}, "gpus_per_node", "16 GPUs a node, and partition batch has at most 8"),
        ({"gres": "gpu:b200:8"}, "gpu", "b200: partition batch has h100"),
        ({"slurm_partition": "gpu"}, "partition", "gpu: Slurm has no such partition; it has batch"),
    ],
)
def test_what_does_not(change, key, message):
    found = costs.problems(ASKED | change, {"batch": BATCH})
    assert [k for k, _ in found] == [key]
    assert found[0][1].startswith(message)


def test_a_stage_that_does_not_fit_is_named_before_anything_runs(session, phase1, monkeypatch):
    monkeypatch.setattr(slurm, "partitions", lambda: {"batch": replace(BATCH, max_time=600)})
    with pytest.raises(NemoflowError, match=r"pretrain phase1 of nano3-tiny: stages\[phase1\]\.resources\.time: 30 "):
        session.check_cluster([phase1.identity])

    def silent():
        raise slurm.Unreachable("scontrol: Slurm does not answer")

    monkeypatch.setattr(slurm, "partitions", silent)
    assert session.check_cluster([phase1.identity]) == (
        "not compared with the limits of partitions: scontrol: Slurm does not answer"
    )
