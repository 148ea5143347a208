"""Training as several processes, forks over gloo: the same digits after a resume, whatever deals the model out, and
checkpoints that another number of processes goes on from and exports.
"""

import shutil
from pathlib import Path

import contracts
import pytest
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, Run, pretrain
from world import Programs, World

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


def maker(server, data):
    def make(directory: Path, settings: dict, processes: int, **request) -> World:
        run = pretrain(server, data, directory, overrides=BASE | settings, **{"horizon": 12, "stop": 6} | request)
        return World(server, directory, processes, **run.request)

    return make


@pytest.fixture(scope="module")
def make(server, data):
    return maker(server, data)


@pytest.fixture(scope="module")
def single(make, tmp_path_factory) -> Run:
    """Six iterations of one process; state 3 kept."""
    return make(tmp_path_factory.mktemp("single"), {}, 1, wanted=[3]).train()


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
def test_two_processes_go_on_with_the_same_digits(make, tmp_path, settings):
    contracts.goes_on_with_the_same_digits(make, tmp_path, settings, 2)


@pytest.mark.slow
def test_programs_of_their_own_have_the_same_digits(make, data, tmp_path, monkeypatch):
    """As gpu/ runs them, where processes cannot be forked."""
    forks = make(tmp_path / "forks", EXPERT, 2).train()
    for name, value in {"NEMOFLOW_CPU": "1", "NEMOFLOW_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "server").mkdir()
    programs = maker(Programs(tmp_path / "server"), data)(tmp_path / "programs", EXPERT, 2).train()
    assert programs.digits() == forks.digits()
    assert contracts.exported(programs, 6) == contracts.exported(forks, 6)


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
def test_another_geometry_goes_on_with_the_same_numbers(make, tmp_path, single, before, now):
    run = single if before[1] == 1 else make(tmp_path / "before", *before, wanted=[3]).train()
    contracts.goes_on_dealt_out_anew(make, run, tmp_path / "now", *now)


@pytest.mark.slow
def test_dispatchers_of_tokens_agree(make, tmp_path):
    variants = {name: {"model.moe_token_dispatcher_type": name} for name in ("alltoall", "allgather")}
    contracts.agrees(make, tmp_path, EXPERT, variants, 2)


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        (EXPERT, 2, "the experts have an optimizer of their own"),
        (PLAIN, 1, "saved with ddp.use_distributed_optimizer: true"),
    ],
)
def test_an_optimizer_that_cannot_be_dealt_out_is_refused(make, single, tmp_path, settings, processes, said):
    run = make(tmp_path, settings, processes)
    shutil.copytree(single.checkpoint(3), run.checkpoint(3))
    line = run.fails()
    assert f"{run.checkpoint(3)}: saved with" in line
    assert said in line


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        pytest.param(WHOLE_TENSOR, True, id="tensor"),
        pytest.param(EXPERT, False, id="expert"),
        pytest.param(DATA, True, id="data", marks=pytest.mark.slow),
        pytest.param(PIPELINE, True, id="pipeline", marks=pytest.mark.slow),
    ],
)
def test_what_two_processes_save_is_exported_to_the_byte(make, tmp_path, single, settings, alone):
    """Trained weights, loaded and saved by two processes that learn nothing, and then by one if it can."""
    still = {"optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "model.moe_router_bias_update_rate": 0.0}
    init = {"checkpoint": str(single.checkpoint(6)), "at": 6, "carry": "weights"}
    run = make(tmp_path / "run", settings | still, 2, init=init, wanted=[1]).train(stop=1)
    assert contracts.exported(run, 1) == contracts.exported(single, 6)
    if alone:
        run.processes = 1
        run.train(stop=2, overrides=BASE | still)
        assert contracts.exported(run, 2) == contracts.exported(run, 1)
