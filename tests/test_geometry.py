"""Layouts over GPUs: the impossible named with the nearest possible, and nothing accepted that Megatron refuses."""

import re

import pytest

from nemoflow.engines.megatron_bridge import geometry, keys

pytest_plugins = ["megatron_fixtures"]

NANO = "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_{}_config"
QWEN = "megatron.bridge.recipes.qwen.qwen3.qwen3_8b_{}_config"
QWEN_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TP, PP, CP, EP = (
    f"model.{name}"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
)


def nano(overrides: dict | None = None, gpus: int = 8, gpu: str | None = "h100", pack: int | None = None, **more):
    kind = "sft" if pack else "pretrain"
    resources = {"nodes": 1, "gpus_per_node": gpus, "gpu": gpu}
    return geometry(NANO.format(kind), overrides or {}, resources, None, kind, pack, **more)


def qwen(overrides: dict | None = None, gpus: int = 8, hf_config: dict | None = QWEN_8B, pack: int | None = None):
    kind = "sft" if pack else "pretrain"
    resources = {"nodes": 1, "gpus_per_node": gpus, "gpu": "h100"}
    return geometry(QWEN.format(kind), {TP: 1, **(overrides or {})}, resources, hf_config, kind, pack)


def only(found: tuple[str, list[str]]) -> str:
    _, problems = found
    assert len(problems) == 1, problems
    return problems[0]


def test_what_the_checker_accepts_megatron_accepts(server):
    seen = server.call("geometry_cases:run", 500)
    assert seen["accepted"] > 80
    assert seen["refused"] > 80
    assert seen["built"] == 30


def test_published_recipes_fit_the_gpus_they_name():
    """All but those whose precision the hardware in their names cannot compute in."""
    refused, fitting = set(), 0
    for name, entry in keys.table()["functions"].items():
        found = re.search(r"_(\d+)gpu_(h100|gb200)_", name)
        if found:
            kind = "pretrain" if entry["dataset"] == "GPTDatasetConfig" else "sft"
            pack = entry["values"]["dataset.seq_length"] if kind == "sft" else None
            resources = {"nodes": 1, "gpus_per_node": int(found[1]), "gpu": found[2]}
            _, problems = geometry(keys.RECIPES + name, {}, resources, None, kind, pack)
            problems = [p for p in problems if "asks the hub" not in p]
            fitting += not problems
            refused |= {p.split(":")[0] for p in problems if found[2] != "h100" or "needs Blackwell" not in p}
    assert fitting > 150
    assert refused == set()


def test_the_layout_in_a_line():
    line, problems = nano({TP: 2, PP: 4, "model.sequence_parallel": True}, gpus=64)
    assert problems == []
    assert line == "1 x 64 h100, TP 2 PP 4 EP 8 DP 8, batch 1024 as 8 x 1 x 128"
    line, _ = nano({"mixed_precision": "bf16_with_fp8_subchannel_scaling_mixed"}, gpu=None)
    assert line == "1 x 8 GPUs, EP 8 DP 8, batch 1024 as 8 x 1 x 128, fp8 blockwise"


@pytest.mark.parametrize(
    ("overrides", "gpus", "said"),
    [
        ({EP: 1, CP: 4}, 6, "resources: 6 GPUs cannot hold TP 1 x PP 1 x CP 4 = 4; 4 or 8 GPUs can"),
        (
            {"train.global_batch_size": 1200},
            12,
            "12 GPUs cannot hold EP 8 x ETP 1 x PP 1 = 8; 8 or 16 GPUs can, or EP 4",
        ),
        (
            {EP: 3, "train.global_batch_size": 1200},
            24,
            "model.expert_model_parallel_size: 3: must divide the 128 experts; 2 or 4 does",
        ),
        ({"train.global_batch_size": 100}, 8, "100: must be a multiple of micro batch 1 x DP 8 = 8; 96 or 104 is"),
        ({"train.global_batch_size": 48}, 32, "= 32; 32 or 64 is, or use 24 or 48 GPUs"),
        ({"validation.eval_global_batch_size": 4}, 8, "validation.eval_global_batch_size: 4: must be a multiple of"),
        ({TP: 2}, 16, "model.sequence_parallel: Megatron trains experts with TP 2 only with sequence parallelism"),
        ({TP: 16, "model.sequence_parallel": True}, 128, "must divide the 64 heads and 8 groups of Mamba; 8 does"),
        (
            {"model.num_attention_heads": 12, TP: 8, "model.sequence_parallel": True},
            64,
            "divide the 12 attention heads; 6 or 12 does",
        ),
        (
            {"model.num_query_groups": 3, TP: 2, "model.sequence_parallel": True},
            16,
            "3 groups of keys and values or be a multiple; 1 is",
        ),
        ({CP: 128, "model.seq_length": 65536}, 1024, "must divide the 64 heads of Mamba on a rank (with TP 1)"),
        (
            {CP: 4, "model.seq_length": 8196},
            32,
            "model.seq_length: 8196: must be a multiple of 2 x CP 4; 8192 or 8200 is",
        ),
        ({TP: 8, "model.sequence_parallel": True, "model.seq_length": 8196}, 64, "must be a multiple of CP 1 x TP 8"),
        (
            {PP: 8},
            64,
            "must divide the 52 layers; 4 or 13 does, or say where stages end by | in",
        ),
        (
            {PP: 2, "model.hybrid_layer_pattern": "MEMEM*E|MEMEM*|EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"},
            16,
            "| makes 3 stages, and PP is 2",
        ),
        ({"model.hybrid_layer_pattern": "MEM*"}, 8, "model.num_layers: 52: the pattern has 4; write 4"),
        (
            {PP: 2, "model.hybrid_layer_pattern": "MEME|M*M*", "model.num_layers": 8, EP: 4},
            8,
            "pipeline stage 2 has no layer with experts (E), and each needs one",
        ),
        ({"model.hybrid_layer_pattern": "MEMX", "model.num_layers": 4}, 8, "X: layers are M (Mamba), * (attention)"),
        (
            {PP: 2, "model.virtual_pipeline_model_parallel_size": 2},
            16,
            "does not support it for hybrid models; write null",
        ),
        (
            {
                "model.moe_ffn_hidden_size": 1850,
                "model.expert_tensor_parallel_size": 4,
                TP: 4,
                "model.sequence_parallel": True,
            },
            32,
            "model.moe_ffn_hidden_size: 1850: must be a multiple of ETP 4; 1848 or 1852 is",
        ),
        ({"model.moe_router_topk": 200}, 8, "model.moe_router_topk: 200: the model has 128 experts"),
        (
            {"model.moe_router_num_groups": 5},
            8,
            "model.moe_router_num_groups: 5: must divide the 128 experts; 4 or 8 does",
        ),
        (
            {"mixed_precision": "bf16_with_mxfp8_mixed"},
            8,
            "mxfp8 needs Blackwell (b200, b300, gb200, gb300), not h100; it can compute delayed and tensorwise and",
        ),
        ({"mixed_precision": "bf16_with_nvfp4_mixed"}, 8, "mixed_precision.fp4: nvfp4 needs Blackwell"),
        (
            {
                "mixed_precision": "bf16_with_fp8_delayed_scaling_mixed",
                "model.recompute_modules": ["moe"],
                "mixed_precision.first_last_layers_bf16": True,
            },
            8,
            "delayed scaling keeps no layers in BF16",
        ),
        ({"ddp.use_megatron_fsdp": True}, 8, "checkpoint.ckpt_format: torch_dist: Megatron FSDP needs fsdp_dtensor"),
        (
            {"train.micro_batch_size": 2, "model.moe_router_load_balancing_type": "aux_loss"},
            8,
            "train.micro_batch_size: 2: the experts are balanced over a micro batch (aux_loss)",
        ),
        (
            {"train.micro_batch_size": 2, "model.moe_expert_capacity_factor": 1.0},
            8,
            "which tokens are dropped depends on micro batch 2",
        ),
        (
            {"train.micro_batch_size": 2, "dataset.eod_mask_loss": True},
            8,
            "with dataset.eod_mask_loss the loss depends on it",
        ),
        (
            {
                "model.recompute_granularity": "full",
                "model.cuda_graph_impl": "none",
                "model.recompute_method": "uniform",
            },
            8,
            "model.recompute_num_layers: must be given",
        ),
        ({TP: 0}, 8, "model.tensor_model_parallel_size: 0: TP must be 1 or more"),
        ({"dataset.seq_length": 4096}, 8, "dataset.seq_length: 4096 differs from model.seq_length, 8192; leave it out"),
    ],
)
def test_impossible_for_a_hybrid_model(overrides, gpus, said):
    assert said in only(nano(overrides, gpus))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({PP: 8}, "model.pipeline_model_parallel_size: 8: must divide the 36 layers; 6 or 9 does"),
        ({PP: 4, "model.virtual_pipeline_model_parallel_size": 2}, "must divide the 9 layers of a rank; 1 or 3 does"),
        (
            {PP: 4, "model.virtual_pipeline_model_parallel_size": 3, "train.global_batch_size": 6},
            "with VPP the 3 micro batches of a rank must be a multiple of 4; 8 makes them one",
        ),
        ({PP: 2, "model.pipeline_model_parallel_layout": "Et*18|t*17L"}, "has 35 of 36 layers"),
        ({PP: 2, "model.pipeline_model_parallel_layout": "Et*18|t*9|t*9L"}, "has 3 stages; PP 2 needs 2 or 4"),
        ({PP: 2, "model.num_layers_in_first_pipeline_stage": 36}, "leaves 0 of 36 layers for the other 1 stages"),
        ({EP: 2}, "model.expert_model_parallel_size: 2: the model has no experts; write 1"),
        ({TP: 8, "model.vocab_size": 1001}, "model.vocab_size: 1001: must be a multiple of TP 8; 1000 or 1008 is"),
    ],
)
def test_impossible_for_a_dense_model(overrides, said):
    assert said in only(qwen(overrides))


def test_an_sft_has_packed_rows():
    assert nano({CP: 2, "ddp.average_in_collective": False}, gpus=16, pack=4096)[1] == []
    assert "data.pack_size: 4098: must be a multiple of 2 x CP 2; 4096 or 4100 is" in only(nano({CP: 2}, 16, pack=4098))
    assert "train.micro_batch_size: 2: packed rows are trained on one at a time" in only(
        nano({"train.micro_batch_size": 2}, pack=4096)
    )
    token = {"model.calculate_per_token_loss": False}
    assert "model.calculate_per_token_loss: must be true" in only(nano({CP: 2, **token}, 16, pack=4096))
    assert "differs from data.pack_size, 4096" in only(nano({"model.seq_length": 2048}, pack=4096))
    assert "model.cuda_graph_impl" in only(nano({"model.cuda_graph_impl": "transformer_engine"}, pack=4096))


def test_an_sft_has_the_model_it_starts_from():
    small = {"model.num_moe_experts": 12, "model.moe_router_topk": 2}
    parents = [(NANO.format("pretrain"), small), (NANO.format("sft"), {})]
    problem = only(nano({}, pack=4096, parents=parents))
    assert "must divide the 12 experts; 6 or 12 does" in problem
    assert nano({EP: 4}, gpus=4, pack=4096, parents=parents)[1] == []
    assert "must divide the 128 experts" in only(nano({EP: 3, "train.global_batch_size": 129}, gpus=3, pack=4096)), (
        "nano3's, which the hub would have"
    )
    line, problems = geometry(
        QWEN.format("sft"), {}, {"nodes": 1, "gpus_per_node": 4, "gpu": "h100"}, None, "sft", 4096, [("toys.x", {})]
    )
    assert problems == []
    assert line.endswith("not checked: what toys.x sets, which is not among the recipe functions known here")


def test_a_model_that_only_the_hub_knows():
    assert qwen(gpus=8)[1] == []
    assert "asks the hub for Qwen/Qwen3-8B; write the recipe's hf_config" in only(qwen(hf_config=None))
    hybrid = {"layers_block_type": ["mamba", "moe", "attention"], "num_attention_heads": 4, "n_routed_experts": 8}
    function = "megatron.bridge.recipes.nemotronh.nemotron_3_super.nemotron_3_super_pretrain_config"
    _, problems = geometry(
        function, {PP: 2, EP: 1, TP: 1}, {"nodes": 1, "gpus_per_node": 8, "gpu": None}, hybrid, "pretrain", None
    )
    assert any("must divide the 3 layers; 1 or 3 does" in p for p in problems)


def test_an_unknown_function_is_checked_as_far_as_the_recipe_goes():
    resources = {"nodes": 1, "gpus_per_node": 6, "gpu": "h100"}
    line, problems = geometry("my.config", {TP: 4, PP: 1, CP: 1}, resources, None, "pretrain", None)
    assert "6 GPUs cannot hold TP 4 x PP 1 x CP 1 = 4; 4 or 8 GPUs can" in problems[0]
    assert line.endswith("not checked: what my.config sets, which is not among the recipe functions known here")
    assert geometry("my.config", {}, resources, None, "pretrain", None)[1] == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "nemotronh.nemotron_3_nano.nemotron_3_nano_pretrian_config",
            "did you mean 'nemotron_3_nano_pretrain_config'?",
        ),
        ("qwen.qwen33.qwen3_8b_pretrain_config", "did you mean 'megatron.bridge.recipes.qwen.qwen3.qwen3_8b_pretrain"),
    ],
)
def test_a_misspelt_function(function, said):
    resources = {"nodes": 1, "gpus_per_node": 8, "gpu": "h100"}
    problem = only(geometry(f"megatron.bridge.recipes.{function}", {}, resources, None, "pretrain", None))
    assert problem.startswith(f"function: megatron.bridge.recipes.{function}: no such recipe function")
    assert said in problem


def test_all_problems_at_once():
    _, problems = nano({TP: 3, PP: 5, "train.global_batch_size": 7, "mixed_precision": "bf16_with_mxfp8_mixed"}, 16)
    assert len(problems) > 4


@pytest.mark.parametrize("name", ["h100", "NVIDIA-H100-80GB-HBM3", "nvidia_h100_80gb_hbm3"])
def test_gpus_by_the_names_clusters_give_them(name):
    assert "not " + name in only(nano({"mixed_precision": "bf16_with_mxfp8_mixed"}, gpu=name))


def test_an_unknown_gpu_is_said():
    line, problems = nano({"mixed_precision": "bf16_with_mxfp8_mixed"}, gpu="x1000")
    assert problems == []
    assert line.endswith("not checked: the precision on x1000, a type of GPU that is not known here")


def test_dispatchers_and_their_gpus():
    assert nano(gpu="gb200")[1] == []
    deepep = {"model.moe_flex_dispatcher_backend": "deepep"}
    assert "deepep runs on Ampere, Hopper, B200 or B300, not on gb200" in only(nano(deepep, gpu="gb200"))
    assert "deepep needs experts on several GPUs" in only(nano(deepep | {EP: 1}, gpus=1))
