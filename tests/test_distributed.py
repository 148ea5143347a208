"""Training as several processes, forks over gloo: the same digits after a resume, whatever deals the model out, and
checkpoints that another number of processes goes on from and exports.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, Run, pretrain

pytest_plugins = ["megatron_fixtures"]

BASE = (
    MODEL
    | PRECISION
    | PRETRAIN
    | {
        # Every pipeline stage needs experts: Megatron-Core's report of the router's losses hangs where one has none
        "model.hybrid_layer_pattern": "ME*ME*",
        "model.num_layers": 6,
        "model.vocab_size": 384,  # or Megatron-Bridge pads to a multiple that follows from tensor parallelism
    }
)
DATA = {}
PLAIN = {"ddp.use_distributed_optimizer": False, "optimizer.use_distributed_optimizer": False}
EXPERT = {"model.expert_model_parallel_size": 2, "model.moe_token_dispatcher_type": "alltoall"}
PIPELINE = {"model.pipeline_model_parallel_size": 2}
TENSOR = {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}
WHOLE_TENSOR = TENSOR | {"model.expert_tensor_parallel_size": 2}
BFLOAT = {
    "mixed_precision": "bf16_mixed",
    "model.bf16": True,
    "model.params_dtype": "bfloat16",
    "model.pipeline_dtype": "bfloat16",
    "optimizer.bf16": True,
}


class World(Run):
    """A trajectory of several processes."""

    def begin(self, processes: int = 2, **changes) -> tuple[int, Path]:
        path = self.directory / "request.json"
        path.write_text(json.dumps(self.request | changes), encoding="utf-8")
        pid, log, _ = self.server.start("world:run", {"request": str(path), "processes": processes})
        return pid, log

    def fails(self, **changes) -> str:
        """The line with which they refuse; each of them may say it."""
        _, log = self.begin(**changes)
        code, text = self.server.end(), log.read_text()
        said = {line for line in text.splitlines() if line.startswith("nemoflow: error: ")}
        assert code == 1, text[-3000:]
        assert len(said) == 1, text[-3000:]
        return said.pop()


def world(server, data, directory: Path, settings: dict, **request) -> World:
    run = pretrain(server, data, directory, overrides=BASE | settings, **{"horizon": 12, "stop": 6} | request)
    return World(server, directory, **run.request)


def continued(run: World, directory: Path, settings: dict, at: int = 3, processes: int = 2) -> World:
    """A trajectory of its own that goes on from the state `at` of `run`."""
    changes = {"checkpoints": "checkpoints", "metrics": "metrics.jsonl", "config": "config", "scratch": "scratch"}
    own = {name: str(directory / place) for name, place in changes.items()}
    new = World(run.server, directory, **run.request | own | {"overrides": BASE | settings})
    shutil.copytree(run.checkpoint(at), new.checkpoint(at))
    return new.train(processes=processes)


def after(run: Run, at: int) -> dict[int, tuple]:
    return {n: d for n, d in run.digits().items() if n > at}


def close(one: dict[int, tuple], other: dict[int, tuple]) -> bool:
    """Whether losses and gradient norms agree but for the order of summing; the rest exactly."""
    assert list(one) == list(other)
    assert [(d[1], d[3]) for d in one.values()] == [(d[1], d[3]) for d in other.values()]
    return all(
        a[0] == pytest.approx(b[0], rel=1e-5) and a[2] == pytest.approx(b[2], rel=1e-3)
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.fixture(scope="module")
def single(server, data, tmp_path_factory) -> World:
    """Six iterations of one process; state 3 kept."""
    return world(server, data, tmp_path_factory.mktemp("single"), {}, wanted=[3]).train(processes=1)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DATA, id="data"),
        pytest.param(EXPERT, id="expert"),
        pytest.param(PIPELINE, id="pipeline"),
        pytest.param(TENSOR, id="tensor-and-sequence"),
        pytest.param(PLAIN, id="data-plain-optimizer", marks=pytest.mark.slow),
        pytest.param(WHOLE_TENSOR, id="tensor-of-experts-too", marks=pytest.mark.slow),
        pytest.param(BFLOAT, id="bfloat16", marks=pytest.mark.slow),
        pytest.param(BFLOAT | EXPERT, id="bfloat16-expert", marks=pytest.mark.slow),
    ],
)
def test_two_processes_go_on_with_the_same_digits(server, data, tmp_path, settings):
    run = world(server, data, tmp_path / "straight", settings, wanted=[3]).train()
    losses = [d[0] for d in run.digits().values()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3, "it learns"
    resumed = continued(run, tmp_path / "resumed", settings)
    assert after(resumed, 3) == after(run, 3)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param(({}, 1), (WHOLE_TENSOR, 2), id="1-to-tensor"),
        pytest.param((PIPELINE, 2), ({}, 1), id="pipeline-to-1"),
        pytest.param((DATA, 2), ({}, 1), id="data-to-1"),
        pytest.param(({}, 1), (PIPELINE, 2), id="1-to-pipeline", marks=pytest.mark.slow),
        pytest.param((WHOLE_TENSOR, 2), (PIPELINE, 2), id="tensor-to-pipeline", marks=pytest.mark.slow),
        pytest.param((EXPERT, 2), (TENSOR, 2), id="expert-to-tensor", marks=pytest.mark.slow),
        pytest.param(
            (EXPERT | {"model.expert_model_parallel_size": 4, "train.micro_batch_size": 1}, 4),
            (EXPERT, 2),
            id="four-expert-to-two",
            marks=pytest.mark.slow,
        ),
        pytest.param((PLAIN, 2), (WHOLE_TENSOR | PLAIN, 2), id="plain-to-tensor", marks=pytest.mark.slow),
    ],
)
def test_another_geometry_goes_on_with_the_same_numbers(server, data, tmp_path, single, before, now):
    """The numbers are those of the run that stayed as it was: weights, Adam's moments, counters and data came along."""
    if before[1] == 1:
        run = single
    else:
        run = world(server, data, tmp_path / "before", before[0], wanted=[3]).train(processes=before[1])
    resumed = continued(run, tmp_path / "now", now[0], processes=now[1])
    assert close(after(resumed, 3), after(run, 3))


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        (EXPERT, 2, "the experts have an optimizer of their own"),
        (PLAIN, 1, "saved with ddp.use_distributed_optimizer: true"),
    ],
)
def test_an_optimizer_that_cannot_be_dealt_out_is_refused(single, tmp_path, settings, processes, said):
    run = World(single.server, tmp_path, **single.request | {"checkpoints": str(tmp_path / "checkpoints")})
    shutil.copytree(single.checkpoint(3), run.checkpoint(3))
    (tmp_path / "config").mkdir()
    line = run.fails(processes=processes, overrides=BASE | settings, config=str(tmp_path / "config"))
    assert f"{run.checkpoint(3)}: saved with" in line
    assert said in line


def exported(run: Run, at: int) -> str:
    """The digest of the exported weights of a state."""
    out = run.directory / f"hf-{at}"
    if not out.exists():
        run.server.call("world:export", {"checkpoint": str(run.checkpoint(at)), "out": str(out)})
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        pytest.param(WHOLE_TENSOR, True, id="tensor"),
        pytest.param(EXPERT, False, id="expert"),
        pytest.param(DATA, True, id="data", marks=pytest.mark.slow),
        pytest.param(PIPELINE, True, id="pipeline", marks=pytest.mark.slow),
    ],
)
def test_what_two_processes_save_is_exported_to_the_byte(server, data, tmp_path, single, settings, alone):
    """Trained weights, loaded and saved by two processes that learn nothing, and then by one if it can."""
    still = {"optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "model.moe_router_bias_update_rate": 0.0}
    init = {"checkpoint": str(single.checkpoint(6)), "at": 6, "carry": "weights"}
    run = world(server, data, tmp_path / "run", settings | still, init=init, wanted=[1]).train(stop=1)
    assert exported(run, 1) == exported(single, 6)
    if alone:
        run.train(processes=1, stop=2, overrides=BASE | still)
        assert exported(run, 2) == exported(run, 1)
