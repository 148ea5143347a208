"""The contracts of training with CUDA kernels, no shim: pytest -m "slow or not slow" tests/gpu

A model of nano3's architecture with its pattern's first eight layers and its kernels and precision, through what
test_distributed.py asks of the device shim, and what a CPU does not have: FP8, CUDA graphs, fused Adam, asynchronous
saves, other dispatchers of tokens, packed rows in Transformer Engine's attention and Mamba's kernels.
"""

import importlib.util
import json
from pathlib import Path

import contracts
import pytest
import yaml
from graph import Work
from megatron_fixtures import PRETRAIN, SFT, Run, make_data, pretrain, sft
from world import Programs, World

BASE = Path(__file__).resolve().parents[2]

MODEL = {
    "model.hybrid_layer_pattern": "MEM*EMEM",  # experts in both halves, for two pipeline stages
    "model.num_layers": 8,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 512,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 2,
    "model.kv_channels": 64,
    "model.mamba_num_heads": 16,
    "model.mamba_head_dim": 64,
    "model.mamba_state_dim": 128,
    "model.mamba_num_groups": 8,
    "model.num_moe_experts": 16,
    "model.moe_ffn_hidden_size": 256,
    "model.moe_shared_expert_intermediate_size": 512,
    "model.moe_router_topk": 4,
    "model.seq_length": 256,
    "model.vocab_size": 384,
}
PLACED = {
    # nano3's recipe asks for eight GPUs and a dispatcher of tokens that wants a library of its own
    "model.expert_model_parallel_size": 1,
    "model.moe_token_dispatcher_type": "alltoall",
    "model.moe_flex_dispatcher_backend": None,
    "model.cuda_graph_impl": "none",
    "model.cuda_graph_modules": [],
}
WIDE = MODEL | PLACED | PRETRAIN | {"optimizer.lr": 0.003, "optimizer.min_lr": 0.0003, "validation.eval_iters": 1}
EXPERT = {"model.expert_model_parallel_size": 2}
PIPELINE = {"model.pipeline_model_parallel_size": 2}
TENSOR = {
    "model.tensor_model_parallel_size": 2,
    "model.sequence_parallel": True,
    "model.expert_tensor_parallel_size": 2,
}
GRAPHS = {"model.cuda_graph_impl": "transformer_engine", "model.cuda_graph_modules": ["attn", "mamba"]}
FP8 = {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"}
ASYNC = {"checkpoint.async_save": True}
BFLOAT = {"loss": 5e-3, "norm": 5e-2}
"""How far numbers in bfloat16 go apart when sums are taken in another order, over six iterations."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("server"))
    yield programs
    programs.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def make(server, data):
    def trajectory(directory: Path, settings: dict, processes: int, **request) -> World:
        run = pretrain(server, data, directory, overrides=WIDE | settings, **{"horizon": 12, "stop": 6} | request)
        return World(server, directory, processes, **run.request)

    return trajectory


@pytest.fixture(scope="module")
def single(make, tmp_path_factory) -> Run:
    return make(tmp_path_factory.mktemp("single"), {}, 1, wanted=[3]).train()


@pytest.mark.slow
def test_the_demo(tmp_path):
    """nano3-tiny from raw text to its export, by the workflow."""
    recipe = yaml.safe_load((BASE / "config/recipes/nano3-tiny.yaml").read_text())
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["kind"] != "rl"]
    # In single precision, which the tiny model is trained in, Transformer Engine's fused attention does not compute
    recipe["overrides"]["megatron_bridge"] |= PLACED | {"model.attention_backend": "unfused"}
    work = Work(tmp_path)
    work.recipe("nano3-tiny").parent.mkdir(parents=True)
    work.recipe("nano3-tiny").write_text(yaml.safe_dump(recipe, sort_keys=False))
    work.run("hf_export/nano3-tiny")
    lines = map(json.loads, (work.trajectory("pretrain/nano3-tiny@phase1") / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1


def test_pretraining_resumed_then_sft_then_export(server, data, make, tmp_path):
    run = contracts.goes_on_with_the_same_digits(make, tmp_path, {}, 1)
    assert contracts.exported(run, 6, "bfloat16")
    settings = SFT | PLACED
    tuned = sft(server, data, tmp_path / "sft", run.checkpoint(6), overrides=settings)
    tuned = World(server, tmp_path / "sft", 1, **tuned.request).train()
    losses = [d[0] for d in tuned.digits().values()]
    assert losses[-1] < losses[0]
    assert contracts.exported(tuned, 6, "bfloat16") != contracts.exported(run, 6, "bfloat16")


def test_fused_adam_distributed_and_saved_asynchronously(make, tmp_path, single):
    """nano3's own optimizer; asynchronous saves hold what synchronous ones do."""
    contracts.goes_on_with_the_same_digits(make, tmp_path, ASYNC, 1)
    run = make(tmp_path / "again", ASYNC, 1, wanted=[3]).train()
    assert contracts.exported(run, 3) == contracts.exported(single, 3)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("settings", [{}, EXPERT, PIPELINE, TENSOR], ids=["data", "expert", "pipeline", "tensor"])
def test_two_gpus_go_on_with_the_same_digits(make, tmp_path, settings):
    contracts.goes_on_with_the_same_digits(make, tmp_path, settings, 2)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("settings", [{}, PIPELINE, TENSOR], ids=["data", "pipeline", "tensor"])
def test_another_geometry_goes_on_with_the_same_numbers(make, tmp_path, single, settings):
    contracts.goes_on_dealt_out_anew(make, single, tmp_path, settings, 2, **BFLOAT)


@pytest.mark.gpus(2)
def test_dispatchers_of_tokens_agree(make, tmp_path):
    variants = {name: {"model.moe_token_dispatcher_type": name} for name in ("alltoall", "allgather")}
    for backend, library in (("deepep", "deep_ep"), ("hybridep", "deep_ep")):
        if importlib.util.find_spec(library):
            variants[backend] = {
                "model.moe_token_dispatcher_type": "flex",
                "model.moe_flex_dispatcher_backend": backend,
            }
    contracts.agrees(make, tmp_path, EXPERT, variants, 2, **BFLOAT)


def test_cuda_graphs_change_nothing(make, tmp_path):
    contracts.agrees(make, tmp_path, {}, {"off": {}, "on": GRAPHS}, 1, **BFLOAT)


def test_fp8_goes_on_and_is_exported(make, tmp_path, single):
    run = contracts.goes_on_with_the_same_digits(make, tmp_path, FP8, 1)
    assert contracts.exported(run, 6, "bfloat16")
    contracts.assert_close(run.digits(), single.digits(), loss=5e-2, norm=0.5)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("settings", [{}, PIPELINE, TENSOR], ids=["data", "pipeline", "tensor"])
def test_what_two_gpus_save_is_exported_to_the_byte(make, tmp_path, single, settings):
    still = {"optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "model.moe_router_bias_update_rate": 0.0}
    init = {"checkpoint": str(single.checkpoint(6)), "at": 6, "carry": "weights"}
    run = make(tmp_path / "run", settings | still, 2, init=init, wanted=[1]).train(stop=1)
    assert contracts.exported(run, 1) == contracts.exported(single, 6)


def packed_logits(pattern: str) -> dict:
    """In a process of its own."""
    import torch
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.activations import squared_relu

    settings = MODEL | {"model.hybrid_layer_pattern": pattern, "model.num_layers": len(pattern), "model.seq_length": 64}
    provider = HybridModelProvider(
        **{key.removeprefix("model."): value for key, value in settings.items()},
        activation_func=squared_relu,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_router_dtype="fp32",
    )
    return contracts.packed_logits(provider, "cuda")


@pytest.mark.parametrize("pattern", ["M", "*", "ME*M"])
def test_packed_sequences_cannot_see_each_other(server, pattern):
    """Transformer Engine's attention and Mamba's kernels compute each sequence by itself; the experts see other rows
    beside, whose tiling may touch the last digits of bfloat16.
    """
    found = server.call("gpu.test_gpu:packed_logits", pattern)
    assert found["outside"] <= (1e-2 if "E" in pattern else 0) * found["inside"]
    assert found["outside_unpacked"] > 2e-2 * found["inside"], "and would be seen elsewhere, were the row not packed"
    assert found["alone"] <= 0.1 * found["inside"]
