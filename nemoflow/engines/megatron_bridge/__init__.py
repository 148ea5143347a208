"""Megatron-Bridge on Megatron-Core: pretraining and supervised fine-tuning.

This module is what the main process and the driver need, without torch; train.py is the program that trains, index.py
the one that makes index caches before.
"""

import math
import sys
from pathlib import Path

from nemoflow.engines.megatron_bridge.checkpoints import states
from nemoflow.errors import NemoflowError

__all__ = [
    "REFUSED",
    "STARTS_FROM",
    "check",
    "command",
    "index_command",
    "index_overrides",
    "outside",
    "padding",
    "schedule_horizon",
    "sequence_length",
    "states",
    "tokens_per_iteration",
]

STARTS_FROM = "checkpoint"
CARRIES = ("all", "weights", "weights+optimizer")

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
    "dataset.data_path": "write data: {blend: ...}",
    "dataset.path_to_cache": "index caches are an artifact",
    "dataset.per_dataset_sequences_path": "it names data by where they lie",
    "dataset.sequences_per_dataset": "it names data by where they lie",
    "scheduler.override_opt_param_scheduler": "a changed schedule must not be accepted in silence",
    "train.eval_interval": "write validation.eval_interval",
    "train.eval_iters": "write validation.eval_iters, by which the validation set is sized",
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
_NOT_INDEXED = {
    "dataset.create_attention_mask",
    "dataset.data_sharding",
    "dataset.dataloader_type",
    "dataset.defer_npy_index_mmap",
    "dataset.drop_last",
    "dataset.eod_mask_loss",
    "dataset.fast_cache_load",
    "dataset.inter_document_masking",
    "dataset.mmap_bin_files",
    "dataset.num_dataset_builder_threads",
    "dataset.pin_memory",
    "dataset.reset_attention_mask",
    "dataset.reset_position_ids",
    "dataset.skip_getting_attention_mask_from_dataset",
    "dataset.trust_remote_code",
}
"""Settings of the data that bear on how a sample is loaded or masked, not on which one comes when."""
_INDEXED = {
    "model.seq_length",
    "train.global_batch_size",
    "validation.eval_global_batch_size",
    "validation.eval_iters",
}
"""Settings outside the data's section that bear on the order: length of a sample, size of the validation set."""


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
    length, batch = sequence_length(overrides), overrides.get("train.global_batch_size")
    return batch * length if batch and length else None


def sequence_length(overrides: dict) -> int | None:
    """Tokens of a training sample; None where the recipe does not write it."""
    return overrides.get("dataset.seq_length", overrides.get("model.seq_length"))


def index_overrides(overrides: dict) -> dict:
    """Those overrides that index caches depend on: stages that differ only in others share one index.

    They are the tokenizer's, the data's (except those about loading and masking), the sequence length, and what the
    size of the validation set follows from: the training batch only where evaluation has no batch of its own. Of
    `rng.seed` they do not depend: the order's seed is dataset.random_seed.
    """
    found = {}
    for key, value in overrides.items():
        section = key.partition(".")[0]
        if key in _INDEXED or (section in ("dataset", "tokenizer") and key not in _NOT_INDEXED and not outside(key)):
            found[key] = value
    if found.get("validation.eval_global_batch_size"):
        found.pop("train.global_batch_size", None)
    return found


def padding(overrides: dict) -> int:
    """What the lengths of packed sequences must be multiples of: lcm(2 CP, CP TP with sequence parallelism).

    Context parallelism deals each sequence out in 2 CP pieces, and sequence parallelism the pieces over TP.
    """
    context = overrides.get("model.context_parallel_size") or 1
    if context == 1:
        return 1
    tensor = overrides.get("model.tensor_model_parallel_size") or 1
    return math.lcm(2 * context, context * tensor if overrides.get("model.sequence_parallel") else 1)


def schedule_horizon(overrides: dict) -> int | None:
    """Iterations of the learning-rate schedule, where the recipe writes them."""
    return overrides.get("scheduler.lr_decay_iters")


def command(request: Path) -> list[str]:
    """The program that trains what the request says."""
    return [sys.executable, "-m", "nemoflow.engines.megatron_bridge.train", str(request)]


def index_command(request: Path) -> list[str]:
    """The program that makes the index caches the request asks for."""
    return [sys.executable, "-m", "nemoflow.engines.megatron_bridge.index", str(request)]
