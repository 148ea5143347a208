"""Megatron-Bridge on Megatron-Core: pretraining and supervised fine-tuning.

This module is what the main process and the driver need, without torch; train.py is the program that trains.
"""

import sys
from pathlib import Path

from nemoflow.engines.megatron_bridge.checkpoints import states
from nemoflow.errors import NemoflowError

__all__ = [
    "REFUSED",
    "STARTS_FROM",
    "check",
    "command",
    "outside",
    "schedule_horizon",
    "states",
    "tokens_per_iteration",
]

STARTS_FROM = "checkpoint"
CARRIES = ("all", "weights")

SECTIONS = [
    "checkpoint",
    "comm_overlap",
    "dataset",
    "ddp",
    "dist",
    "ft",
    "logger",
    "mixed_precision",
    "model",
    "nvrx_straggler",
    "optimizer",
    "peft",
    "profiling",
    "rerun_state_machine",
    "rng",
    "scheduler",
    "straggler",
    "tensor_inspect",
    "tokenizer",
    "train",
    "validation",
]
"""Sections of Megatron-Bridge's ConfigContainer that a recipe may set."""

REFUSED = {
    "checkpoint.load": "the workflow chains and resumes checkpoints",
    "checkpoint.save": "checkpoints live in the trajectory's directory",
    "checkpoint.pretrained_checkpoint": "write init: {from, carry}",
    "checkpoint.finetune": "it would restart at step 0 from its own checkpoint in every slot",
    "checkpoint.ckpt_step": "write init: {from, at, carry}",
    "checkpoint.save_interval": "write the stage's save_interval, which is not part of its identity",
    "checkpoint.dist_ckpt_strictness": "a checkpoint of another architecture must not load in silence",
    "checkpoint.exit_on_missing_checkpoint": "a missing checkpoint must not become a silent restart",
    "dataset.blend": "write data: {blend: ...}",
    "dataset.blend_per_split": "write data: {blend: ...}",
    "dataset.path_to_cache": "training must not write into data artifacts",
    "scheduler.override_opt_param_scheduler": "a changed schedule must not be accepted in silence",
    "train.exit_interval": "write the stage's until",
    "train.train_iters": "write the stage's horizon",
    "train.train_samples": "write the stage's horizon",
    "tokenizer.tokenizer_model": "write the recipe's tokenizer",
    "tokenizer.tokenizer_type": "write the recipe's tokenizer",
}

_OUTSIDE_SECTIONS = {
    "checkpoint",
    "comm_overlap",
    "ddp",
    "dist",
    "ft",
    "logger",
    "nvrx_straggler",
    "profiling",
    "straggler",
}
_OUTSIDE = {
    "dataset.num_workers",
    "dataset.persistent_workers",
    "model.attention_backend",
    "model.context_parallel_size",
    "model.cuda_graph_impl",
    "model.cuda_graph_modules",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
    "model.moe_flex_dispatcher_backend",
    "model.moe_shared_expert_overlap",
    "model.moe_token_dispatcher_type",
    "model.pipeline_model_parallel_layout",
    "model.pipeline_model_parallel_size",
    "model.recompute_granularity",
    "model.recompute_method",
    "model.recompute_modules",
    "model.recompute_num_layers",
    "model.sequence_parallel",
    "model.tensor_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "optimizer.overlap_param_gather",
    "optimizer.use_distributed_optimizer",
    "train.exit_duration_in_mins",
    "train.manual_gc",
    "train.manual_gc_interval",
    "train.micro_batch_size",
}


def check(overrides: dict, where: str) -> None:
    """Raise NemoflowError for an override outside the sections of ConfigContainer.

    Keys within a section are checked against the real classes when the stage starts.
    """
    for key in overrides:
        if key.partition(".")[0] not in SECTIONS:
            raise NemoflowError(f"{where}.{key}: no section of Megatron-Bridge's; there are {', '.join(SECTIONS)}")


def outside(key: str) -> bool:
    """Whether an override leaves the result as it is: placement, speed, logging. Everything else is identity."""
    return key in _OUTSIDE or key.partition(".")[0] in _OUTSIDE_SECTIONS


def tokens_per_iteration(overrides: dict) -> int | None:
    """Global batch size x sequence length; None where the recipe does not write both."""
    length = overrides.get("dataset.seq_length", overrides.get("model.seq_length"))
    batch = overrides.get("train.global_batch_size")
    return batch * length if batch and length else None


def schedule_horizon(overrides: dict) -> int | None:
    """Iterations of the learning-rate schedule, where the recipe writes them."""
    return overrides.get("scheduler.lr_decay_iters")


def command(request: Path) -> list[str]:
    """The program that trains what the request says."""
    return [sys.executable, "-m", "nemoflow.engines.megatron_bridge.train", str(request)]
