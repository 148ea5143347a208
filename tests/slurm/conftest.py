import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import Box
from graph import BASE, Work

PORT = int(os.environ.get("BOX_PORT", "16900"))


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Box]:
    """A running Slurm."""
    box = Box(tmp_path_factory.mktemp("box"), PORT)
    try:
        box.start()
        yield box
    finally:
        box.stop()


def losses(trajectory: Path) -> list[tuple[int, float]]:
    """(iteration, loss), in the order they were trained."""
    lines = map(json.loads, (trajectory / "metrics.jsonl").read_text().splitlines())
    return [(line["iteration"], line["loss"]) for line in lines if "loss" in line]


class OnSlurm(Work):
    """A work directory whose jobs go to Slurm; `digits`: iteration -> loss of an uninterrupted run without it."""

    digits: dict[int, float]

    def _command(self, *args: str) -> dict:
        found = super()._command(*args)
        return found | {"args": [*found["args"], "--profile", str(BASE / "profiles/slurm")]}

    def check_never_lost(self, trajectory: Path, interval: int = 5) -> None:
        """Fail when an iteration was trained again that a checkpoint, one every `interval`, held; or by its digits."""
        trained = self.iterations(trajectory)
        for before, after in itertools.pairwise(trained):
            assert after == before + 1 or after == before // interval * interval + 1, trained
        self.check_digits(trajectory)

    def check_digits(self, trajectory: Path) -> None:
        """Fail unless it is trained to the end, and each loss that of an uninterrupted run, digit by digit."""
        assert self.iterations(trajectory)[-1] == 20
        for n, loss in losses(trajectory):
            assert loss == self.digits[n], n


def on_slurm(work: Work, path: Path) -> OnSlurm:
    copy = work.copy(path)
    (path / "cluster.yaml").write_text("{gpu: h100, partition: batch, cpus_per_gpu: 1}\n")
    return OnSlurm(copy.path, copy.checkout)


@pytest.fixture(scope="session")
def with_data(tmp_path_factory) -> Work:
    """The demo with the data of its stages made, without Slurm: what is tested is training."""
    work = Work.new(tmp_path_factory.mktemp("data") / "work")
    work.run("data/demo")
    return work


@pytest.fixture(scope="session")
def digits(with_data: Work, tmp_path_factory) -> dict[int, float]:
    """Iteration -> loss of the demo's first stage, trained in one go on this machine."""
    work = with_data.copy(tmp_path_factory.mktemp("uninterrupted") / "work")
    work.run("pretrain/demo@phase1")
    found = losses(work.trajectory("pretrain/demo@phase1"))
    assert [n for n, _ in found] == list(range(1, 21))
    return dict(found)


@pytest.fixture
def demo(slurm: Box, with_data: Work, digits: dict[int, float], tmp_path: Path) -> OnSlurm:  # noqa: ARG001 - it runs
    """A copy of the demo with its data, to be trained through Slurm."""
    work = on_slurm(with_data, tmp_path / "work")
    work.digits = digits
    return work
