"""The table of settings: as the installed release has it, and what it refuses in milliseconds."""

import subprocess
import sys
import time

import pytest

from nemoflow.engines import megatron_bridge as engine
from nemoflow.engines import refuse
from nemoflow.engines.megatron_bridge import keys
from nemoflow.errors import NemoflowError

pytest_plugins = ["megatron_fixtures"]

NANO = "megatron.bridge.recipes.nemotronh.nemotron_3_nano"


def refusal(key: str, value) -> str:
    with pytest.raises(NemoflowError) as error:
        engine.check({key: value}, "r.yaml: overrides")
    return str(error.value)


def test_the_table_is_that_of_the_installed_release(server):
    made = server.call("nemoflow.engines.megatron_bridge.keys:text", None)
    assert made == keys.FILE.read_text(), "run python -m nemoflow.engines.megatron_bridge.keys"


def test_checking_needs_neither_megatron_nor_torch():
    program = (
        "import sys; from nemoflow.engines import megatron_bridge as e; e.check({'train.global_batch_size': 4}, 'x');"
        f"e.geometry('{NANO}.nemotron_3_nano_pretrain_config', {{}}, {{'nodes': 1, 'gpus_per_node': 8, 'gpu': 'h100'}},"
        "None, 'pretrain', None); print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_thousands_of_overrides_are_checked_in_a_second():
    classes = keys.table()["classes"]
    overrides = {f"model.{name}": None for name in classes["HybridModelProvider"]}
    start = time.monotonic()
    for _ in range(10):
        engine.check(overrides, "x")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.seq_lenght", 8, "no setting 'seq_lenght' in model; did you mean 'model.seq_length'?"),
        ("optimiser.lr", 0.1, "no section of Megatron-Bridge's; did you mean 'optimizer'?"),
        ("optimizer.lr", "1e-3", "'1e-3' is text; it must be a float (YAML reads 1e-3 as text: write 0.001)"),
        ("optimizer.lr", True, "True is true or false; it must be a float"),
        ("model.num_layers", 4.0, "4.0 is a float; it must be an int"),
        ("model.num_layers.x", 4, "model.num_layers has no settings of its own"),
        ("train.global_batch_size", "four", "'four' is text; it must be an int"),
        (
            "scheduler.lr_decay_style",
            "wsd",
            "'wsd'; it must be one of constant, linear, cosine, inverse-square-root, WSD",
        ),
        ("model.attention_backend", "flsh", "'flsh'; it must be one of flash, fused, unfused, local, auto"),
        ("model.recompute_modules", "moe", "'moe' is text; it must be a list of text"),
        ("model.recompute_modules", ["moe", 1], "['moe', 1] is a list; it must be a list of text"),
        ("model.params_dtype", "fp32", "'fp32' is text; it must be one of bfloat16, float16, float32"),
        ("model.activation_func", "silu", "is a function of the recipe function's and cannot be given by name"),
        ("mixed_precision", "bf16_mix", "'bf16_mix' is no mixed precision recipe; did you mean 'bf16_mixed'?"),
        ("dataset.offline_packing_specs.pad_cu_seqlens", 1, "1 is an int; it must be true or false"),
        ("dataset.offline_packing_specs.pad_cu", True, "did you mean 'dataset.offline_packing_specs.pad_cu_seqlens'?"),
        ("train", {"global_batch_size": 4}, "is a section; set its keys, such as train."),
        ("env_vars.NCCL_DEBUG", ["INFO"], "it must be text or a number"),
        ("peft.dim", "16", "'16' is text; it must be an int"),
    ],
)
def test_refused_with_what_would_be_right(key, value, said):
    message = refusal(key, value)
    assert message.startswith(f"r.yaml: overrides.{key}: ")
    assert said in message
    assert "\n" not in message


def test_everything_wrong_is_said_at_once():
    with pytest.raises(NemoflowError, match=r"r: overrides\.model\.seq_lenght: .*; r: overrides\.optimizer\.lr: "):
        engine.check({"model.seq_lenght": 8, "train.micro_batch_size": 1, "optimizer.lr": "x"}, "r: overrides")


def test_every_section_can_be_set():
    engine.check(
        {
            "checkpoint.async_save": True,
            "comm_overlap.tp_comm_overlap": False,
            "comm_overlap.tp_comm_overlap_cfg": None,
            "dataset.num_workers": 2,
            "ddp.use_megatron_fsdp": True,
            "dist.distributed_timeout_minutes": 60,
            "env_vars.NCCL_DEBUG": "INFO",
            "ft.enable_ft_package": False,
            "inprocess_restart.enabled": False,
            "logger.wandb_project": "nano3",
            "mixed_precision": "bf16-with-mxfp8-mixed",
            "mixed_precision.fp8_param_gather": False,
            "model.cuda_graph_modules": ["attn", "mamba"],
            "model.pipeline_model_parallel_layout": "Et*4|t*4L",
            "model.recompute_modules": [],
            "model.rotary_base": 10_000,
            "nvrx_straggler": None,
            "nvrx_straggler.enabled": True,
            "optimizer.lr": 1,
            "optimizer.params_dtype": "float32",
            "peft.dim": 16,
            "peft.target_modules": ["linear_qkv"],
            "profiling.use_nsys_profiler": True,
            "rerun_state_machine.check_for_nan_in_loss": True,
            "rng.seed": 1,
            "scheduler.lr_decay_style": "WSD",
            "straggler.log_straggler": True,
            "tensor_inspect.enabled": False,
            "tokenizer.vocab_extra_ids": 0,
            "train.manual_gc": True,
            "validation.eval_iters": 4,
        },
        "x",
    )


def test_sections_that_a_function_leaves_out_can_be_set(server):
    overrides = {
        "comm_overlap.tp_comm_overlap": True,
        "env_vars.NCCL_DEBUG": "INFO",
        "ft.simulate_fault": False,
        "mixed_precision.fp8_recipe": "mxfp8",
        "nvrx_straggler.enabled": True,
        "tensor_inspect.enabled": False,
    }
    assert server.call("geometry_cases:sections", overrides) == overrides


def test_every_refused_key_exists_and_has_a_reason():
    for key, reason in engine.REFUSED.items():
        assert keys.problem(key, None) is None, key
        assert reason
    with pytest.raises(NemoflowError, match=r"train.rampup_batch_size: .*change it with edits"):
        refuse({"train.rampup_batch_size": [16, 16, 100]}, engine.REFUSED, "x")


def test_what_is_outside_the_identity_exists():
    known = keys.table()["sections"]
    for key in (*engine._OUTSIDE, *engine._INSIDE, *engine._NOT_INDEXED, *engine._INDEXED):
        assert keys.problem(key, None) is None, key
    assert set(known) >= engine._OUTSIDE_SECTIONS
    assert engine.outside("ddp.overlap_grad_reduce")
    assert not engine.outside("ddp.grad_reduce_in_fp32")


def test_functions_are_found_by_every_name_they_have():
    short, long = (
        "nemotron_3_nano_pretrain_config",
        "h100.nemotron_3_nano.nemotron_3_nano_pretrain_8gpu_h100_bf16_config",
    )
    found = keys.function(f"{NANO}.{short}")
    assert found == keys.function(f"megatron.bridge.recipes.nemotronh.{long}")
    assert found["values"]["model.num_moe_experts"] == 128
    assert found["hub"] is None
    tuned = keys.function(f"{NANO}.nemotron_3_nano_sft_config")
    assert tuned["hub"] == "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert "model.num_layers" not in tuned["values"], "what the hub knows is not in the table"
    assert keys.function("my.own.recipe_config") is None
