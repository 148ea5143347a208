"""Layouts drawn at random, and Megatron's own word on each: runs where Megatron is imported (megatron_server.py)."""

import copy
import functools
import sys
import types
import warnings
from collections import Counter
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as examples
from hypothesis import strategies as st

from nemoflow import cpu
from nemoflow.engines.megatron_bridge.geometry import problems, settings

NANO = "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_{}_config"
QWEN = "megatron.bridge.recipes.qwen.qwen3.qwen3_8b_{}_config"
QWEN_MOE = "megatron.bridge.recipes.qwen.qwen3_moe.qwen3_30b_a3b_{}_config"

DENSE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
HYBRID = {
    "model.hybrid_layer_pattern": "MEM*EMEM",
    "model.num_layers": 8,
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 256,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 2,
    "model.kv_channels": 32,
    "model.mamba_num_heads": 16,
    "model.mamba_head_dim": 32,
    "model.mamba_state_dim": 16,
    "model.mamba_num_groups": 4,
    "model.num_moe_experts": 8,
    "model.moe_ffn_hidden_size": 64,
    "model.moe_shared_expert_intermediate_size": 128,
    "model.moe_router_topk": 2,
}
MODELS = {"hybrid": (NANO, None, HYBRID), "dense": (QWEN, DENSE, {}), "moe": (QWEN_MOE, MOE, {})}

SIZE = st.sampled_from([1, 1, 1, 2, 2, 4, 3, 8])


@st.composite
def layouts(draw) -> dict:
    """A case: what a recipe says, and the GPUs."""
    name, kind = draw(st.sampled_from(sorted(MODELS))), draw(st.sampled_from(["pretrain", "pretrain", "sft"]))
    function, hf, own = MODELS[name]
    tp, pp, cp, dp, ep = draw(SIZE), draw(SIZE), draw(SIZE), draw(SIZE), draw(SIZE)
    micro = draw(st.sampled_from([1, 1, 2])) if kind == "pretrain" else draw(st.sampled_from([1, 1, 1, 2]))
    overrides = {
        **own,
        "model.tensor_model_parallel_size": tp,
        "model.pipeline_model_parallel_size": pp,
        "model.context_parallel_size": cp,
        "model.expert_model_parallel_size": ep if name != "dense" else draw(st.sampled_from([1, 1, 1, 2])),
        "model.expert_tensor_parallel_size": draw(st.sampled_from([None, 1, 1, 1, 2])),
        "model.virtual_pipeline_model_parallel_size": draw(st.sampled_from([None] * 7 + [1, 2])),
        "model.sequence_parallel": draw(st.sampled_from([tp > 1] * 4 + [True, False])),
        "model.calculate_per_token_loss": draw(st.sampled_from([True, True, True, False])),
        "ddp.average_in_collective": draw(st.sampled_from([False, False, False, True])),
        "train.micro_batch_size": micro,
        "train.global_batch_size": draw(st.sampled_from([dp * micro, 2 * dp * micro, 8 * dp * micro, 8 * dp, 24])),
        "validation.eval_global_batch_size": draw(st.sampled_from([None] * 4 + [16])),
        "validation.eval_micro_batch_size": draw(st.sampled_from([None] * 3 + [1, 2])),
        "model.seq_length": draw(st.sampled_from([128, 128, 384, 96, 50])),
    }
    extra = {
        "mixed_precision": st.sampled_from(
            [None, "bf16_mixed"]
            + [f"bf16_with_{name}_mixed" for name in ("fp8_current_scaling", "fp8_delayed_scaling", "mxfp8", "nvfp4")]
        ),
        "mixed_precision.first_last_layers_bf16": st.just(True),
        "mixed_precision.num_layers_at_end_in_bf16": st.sampled_from([1, 3]),
        "ddp.use_megatron_fsdp": st.just(True),
        "checkpoint.ckpt_format": st.sampled_from(["fsdp_dtensor", "torch_dist"]),
        "dist.use_torch_fsdp2": st.booleans(),
        "ddp.fsdp_manual_registration": st.booleans(),
        "model.moe_token_dispatcher_type": st.sampled_from(["alltoall", "allgather", "flex"]),
        "model.moe_flex_dispatcher_backend": st.sampled_from(["deepep", "hybridep", "ncclep"]),
        "model.moe_shared_expert_overlap": st.booleans(),
        "model.moe_expert_capacity_factor": st.just(1.0),
        "model.moe_pad_expert_input_to_capacity": st.booleans(),
        "model.moe_router_load_balancing_type": st.sampled_from(["aux_loss", "seq_aux_loss", "sinkhorn", "none"]),
        "model.moe_router_num_groups": st.sampled_from([2, 3]),
        "model.moe_router_group_topk": st.sampled_from([1, 2, 4]),
        "model.recompute_granularity": st.sampled_from([None, "full", "selective"]),
        "model.recompute_method": st.sampled_from([None, "uniform"]),
        "model.recompute_num_layers": st.sampled_from([None, 1]),
        "model.recompute_modules": st.sampled_from([["core_attn"], ["shared_experts"], ["moe"], ["moe_act"]]),
        "model.cuda_graph_impl": st.sampled_from(["none", "transformer_engine"]),
        "model.num_attention_heads": st.sampled_from([4, 6]),
        "model.num_query_groups": st.sampled_from([1, 3, 8]),
        "model.num_layers_in_first_pipeline_stage": st.sampled_from([1, 2, 3]),
        "model.num_layers_in_last_pipeline_stage": st.sampled_from([2, 4]),
        "model.account_for_embedding_in_pipeline_split": st.booleans(),
        "model.account_for_loss_in_pipeline_split": st.booleans(),
        "model.cp_comm_type": st.sampled_from(["p2p", "a2a", "a2a+p2p"]),
        "model.hierarchical_context_parallel_sizes": st.sampled_from([[2, 2], [2, 1]]),
        "comm_overlap.overlap_moe_expert_parallel_comm": st.booleans(),
        "model.cpu_offloading": st.booleans(),
        "model.pipeline_model_parallel_layout": st.sampled_from(["Et*4|t*4L", "Ett|(tt|)*2,ttL", "Et*8L", "Et*4|t*3L"]),
        "model.hybrid_layer_pattern": st.sampled_from(["MEM*|EMEM", "ME|M*|EM|EM", "MEM*EM", "MMMM|MMMM"]),
    }
    for key in draw(st.lists(st.sampled_from(sorted(extra)), max_size=2, unique=True)):
        if key == "model.hybrid_layer_pattern" and name != "hybrid":
            continue
        overrides[key] = draw(extra[key])
        if key == "model.hybrid_layer_pattern" and draw(st.booleans()):
            overrides["model.num_layers"] = len(overrides[key].replace("|", ""))
    pack = overrides.pop("model.seq_length") if kind == "sft" else None
    world = tp * pp * cp * dp + draw(st.sampled_from([0] * 6 + [1, tp]))
    return {
        "function": function.format(kind),
        "hf": hf,
        "overrides": overrides,
        "kind": kind,
        "pack": pack,
        "parents": [(function.format("pretrain"), own)],
        "world": world,
        "gpu": draw(st.sampled_from(["h100", "b200"])),
    }


@functools.cache
def provider(hf: str | None):
    """The model that the hub would have: made from a config, or for `None` that of nano3's pretraining."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.recipes.nemotronh.nemotron_3_nano import nemotron_3_nano_pretrain_config
    from transformers import AutoConfig

    if hf is None:
        return nemotron_3_nano_pretrain_config().model
    config = dict(MODELS[hf][1])
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    return AutoBridge.from_hf_config(made).to_megatron_provider(load_weights=False)


def container(case: dict):
    """The ConfigContainer of a case, as a job makes it, but for kernels that this machine lacks."""
    import importlib

    from megatron.bridge.data.builders import GPTSFTDatasetConfig
    from megatron.bridge.data.packing import PackedSequenceSpecs
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    from nemoflow.engines.megatron_bridge.config import apply_overrides

    module, _, name = case["function"].rpartition(".")
    hf = next(name for name, (_, config, _) in MODELS.items() if config is case["hf"]) if case["hf"] else None
    model = copy.deepcopy(provider(hf))
    if case["kind"] == "sft" and case["parents"][0][1]:
        start = importlib.import_module(NANO.rpartition(".")[0]).nemotron_3_nano_pretrain_config()
        start.model = model
        apply_overrides(start, case["parents"][0][1])
    hub = types.SimpleNamespace(to_megatron_provider=lambda *_, **__: model)
    with mock.patch.object(AutoBridge, "from_hf_pretrained", return_value=hub):
        config = getattr(importlib.import_module(module), name)()
    if case["kind"] == "sft":
        config.dataset = GPTSFTDatasetConfig(
            seq_length=case["pack"],
            dataset_root="/nowhere",
            enable_offline_packing=True,
            offline_packing_specs=PackedSequenceSpecs(packed_sequence_size=case["pack"]),
        )
        config.model.seq_length, config.train.micro_batch_size = case["pack"], 1
    apply_overrides(config, case["overrides"])
    config.dataset.seq_length = config.model.seq_length
    config.train.train_iters, config.checkpoint.load, config.checkpoint.pretrained_checkpoint = 10, None, None
    config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_iters = 1, 10
    for kernel in ("apply_rope_fusion", "moe_permute_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion"):
        setattr(config.model, kernel, False)
    config.optimizer.use_precision_aware_optimizer = False
    return config


def place(model, world: int, build: bool) -> None:
    """Make the process groups of rank 0, over a backend that only pretends, and its part of the model if `build`."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with mock.patch.object(sys, "excepthook", sys.excepthook):  # which torch would wrap anew each time
        torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=model.tensor_model_parallel_size,
            pipeline_model_parallel_size=model.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
            context_parallel_size=model.context_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size,
            expert_tensor_parallel_size=model.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        if build:
            cpu.adapt_model(model, world)
            model.vocab_size, model.cpu_offloading = 512, False
            model._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
            model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
            stage = {"vp_stage": 0} if model.virtual_pipeline_model_parallel_size else {}
            model.provide(pre_process=True, post_process=True, **stage)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def judge(config, world: int, gpu: str, seen: Counter) -> None:
    """Whatever Megatron refuses, it refuses here: as a job is configured, its groups made, its layers dealt out, and
    for the first ones that a CPU can compute, its model built."""
    from megatron.bridge.training import config as upstream
    from megatron.bridge.training import mixed_precision
    from megatron.core.models.hybrid import hybrid_layer_allocation
    from megatron.core.transformer import transformer_config

    gpu = types.SimpleNamespace(major=10 if gpu == "b200" else 9, minor=0, name=f"NVIDIA {gpu.upper()}")
    with (
        # As with the Transformer Engine of the containers, which is newer than any that is asked for
        mock.patch.object(mixed_precision, "is_te_min_version", return_value=True),
        mock.patch.object(transformer_config, "is_te_min_version", return_value=True),
        mock.patch.object(upstream, "get_world_size_safe", return_value=world),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu),
    ):
        upstream.runtime_config_update(config)
    model = config.model
    share = config.train.micro_batch_size * config.data_parallel_size
    assert config.train.global_batch_size % share == 0, "init_num_microbatches_calculator"
    if world <= 64:  # making groups takes seconds beyond
        build = seen["built"] < 30 and model.context_parallel_size == 1 and not model.fp8 and not model.fp4
        place(model, world, build)
        seen["built"] += build
    if getattr(model, "hybrid_layer_pattern", None):
        size, dealt = model.pipeline_model_parallel_size, []
        for rank in range(size):
            with (
                mock.patch.object(torch.distributed, "get_rank", return_value=rank),
                mock.patch.object(torch.distributed, "get_world_size", return_value=size),
                mock.patch.object(hybrid_layer_allocation, "log_on_each_pipeline_stage"),
            ):
                dealt += hybrid_layer_allocation.select_pipeline_segment(
                    model.hybrid_layer_pattern,
                    object(),
                    None,
                    model.num_layers_in_first_pipeline_stage,
                    model.num_layers_in_last_pipeline_stage,
                )[0]
        assert "".join(dealt) == model.hybrid_layer_pattern.replace("|", ""), "layers are missing"


def run(count: int) -> dict:
    """Draw `count` layouts. Raises for the first, made small, that the checker accepts and Megatron does not.

    How many were accepted, how many of these built, and how many refused.
    """
    warnings.simplefilter("ignore")
    seen: Counter = Counter()

    @seed(0)
    @examples(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(layouts())
    def agree(case: dict) -> None:
        arguments = [case[key] for key in ("function", "overrides", "hf", "kind", "pack", "parents")]
        known, _, wrong = settings(*arguments)
        wrong += problems(known, case["world"], case["gpu"], case["kind"], case["pack"])
        seen["refused" if wrong else "accepted"] += 1
        if not wrong:
            judge(container(case), case["world"], case["gpu"], seen)

    agree()
    return dict(seen)


def sections(overrides: dict) -> dict:
    """What settings are after `overrides`, by their keys, in a configuration whose function leaves sections out."""
    from nemoflow.engines.megatron_bridge.config import apply_overrides, flatten, resolved

    config = container({"function": QWEN.format("pretrain"), "hf": DENSE, "kind": "pretrain", "overrides": {}})
    config.mixed_precision = "bf16_mixed"
    apply_overrides(config, overrides)
    found = flatten(resolved(config))
    return {key: found[key] for key in overrides}
