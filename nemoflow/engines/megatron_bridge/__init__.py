"""Megatron-Bridge on Megatron-Core: pretraining and supervised fine-tuning.

This module is what the main process and the driver need, without torch; train.py is the program that trains, index.py
the one that makes index caches before.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from nemoflow.engines.megatron_bridge import geometry as layout
from nemoflow.engines.megatron_bridge import keys, size
from nemoflow.engines.megatron_bridge.checkpoints import states
from nemoflow.errors import NemoflowError

__all__ = [
    "REFUSED",
    "STARTS_FROM",
    "check",
    "checkpoint_needs",
    "command",
    "export_needs",
    "geometry",
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

_CHECKPOINTS = "the workflow chains and resumes checkpoints"
_COPIES = "checkpoints are kept by the stage's keep, until and milestones"
_BY_PATH = "it names data by where they lie"
_BLEND = "write data: {blend: ...}"
_CHATS = "write data: {chats: ..., pack_size: ...}"
_HORIZON = "write the stage's horizon"
_RECIPE_TOKENIZER = "write the recipe's tokenizer"
_BATCH = "how many samples an iteration has must be known in advance; change it with edits: [{at, overrides}]"
_SAMPLES = "schedules are counted in iterations here; write the key with _iters"
_DERIVED = "it follows from other settings"

REFUSED = {
    "checkpoint.auto_detect_ckpt_format": _CHECKPOINTS,
    "checkpoint.ckpt_convert_format": _CHECKPOINTS,
    "checkpoint.ckpt_convert_save": _CHECKPOINTS,
    "checkpoint.ckpt_step": "write init: {from, at, carry}",
    "checkpoint.custom_manager_class": _CHECKPOINTS,
    "checkpoint.dist_ckpt_optim_fully_reshardable": "optimizers are saved so that every geometry can load them",
    "checkpoint.dist_ckpt_strictness": "a checkpoint of another architecture must not load in silence",
    "checkpoint.exit_on_missing_checkpoint": "a missing checkpoint must not become a silent restart",
    "checkpoint.finetune": "it would restart at step 0 from its own checkpoint in every slot",
    "checkpoint.load": _CHECKPOINTS,
    "checkpoint.load_main_params_from_ckpt": "write init: {from, carry}",
    "checkpoint.load_optim": "write init: {from, carry}",
    "checkpoint.load_rng": "a stage goes on with the random numbers it stopped at",
    "checkpoint.most_recent_k": _COPIES,
    "checkpoint.non_persistent_ckpt_type": _COPIES,
    "checkpoint.non_persistent_global_ckpt_dir": _COPIES,
    "checkpoint.non_persistent_local_ckpt_algo": _COPIES,
    "checkpoint.non_persistent_local_ckpt_dir": _COPIES,
    "checkpoint.non_persistent_save_interval": _COPIES,
    "checkpoint.pretrained_checkpoint": "write init: {from, carry}",
    "checkpoint.save": "checkpoints live in the trajectory's directory",
    "checkpoint.save_interval": "write the stage's save_interval, which is not part of its identity",
    "checkpoint.save_optim": "a stage without its optimizer cannot be gone on from",
    "checkpoint.save_retain_interval": _COPIES,
    "checkpoint.save_rng": "a stage goes on with the random numbers it stopped at",
    "checkpoint.save_tokenizer_assets": "the tokenizer is an artifact of its own",
    "checkpoint.use_checkpoint_args": _CHECKPOINTS,
    "checkpoint.use_mp_args_from_checkpoint_args": "parallel sizes are the recipe's",
    "checkpoint.use_tokenizer_model_from_checkpoint_args": _RECIPE_TOKENIZER,
    "dataset.blend": _BLEND,
    "dataset.blend_per_split": _BLEND,
    "dataset.data_path": _BLEND,
    "dataset.dataloader_load": _CHECKPOINTS,
    "dataset.dataloader_save": _CHECKPOINTS,
    "dataset.dataset_root": _CHATS,
    "dataset.do_test": "the workflow keeps test data for evaluation",
    "dataset.do_validation": "write data: {valid: ...}",
    "dataset.enable_offline_packing": _CHATS,
    "dataset.hf_dataset": _CHATS,
    "dataset.hf_output_root": _CHATS,
    "dataset.hf_rewrite": _CHATS,
    "dataset.hf_test_dataset": _CHATS,
    "dataset.hf_validation_dataset": _CHATS,
    "dataset.hf_validation_proportion": "write data: {valid: ...}",
    "dataset.max_train_samples": "write the shares in data: {chats: ...}",
    "dataset.mock": _BLEND,
    "dataset.multiple_validation_sets": "the loss of each source is measured at every evaluation",
    "dataset.object_storage_cache_path": _BY_PATH,
    "dataset.offline_packing_specs.packed_metadata_path": _CHATS,
    "dataset.offline_packing_specs.packed_sequence_size": "write data: {pack_size: ...}",
    "dataset.offline_packing_specs.packed_train_data_path": _CHATS,
    "dataset.offline_packing_specs.packed_val_data_path": _CHATS,
    "dataset.offline_packing_specs.pad_seq_to_mult": "write data: {pad_multiple: ...}",
    "dataset.path_to_cache": "index caches are an artifact",
    "dataset.per_dataset_sequences_path": _BY_PATH,
    "dataset.sequence_length": "write model.seq_length",
    "dataset.sequences_per_dataset": _BY_PATH,
    "dataset.split": "write the recipe's held_out, which says what is validation and test",
    "dataset.split_matrix": "write the recipe's held_out, which says what is validation and test",
    "dataset.tokenizer": _RECIPE_TOKENIZER,
    "logger.tensorboard_dir": "curves live in the trajectory's directory",
    "scheduler.lr_decay_samples": _SAMPLES,
    "scheduler.lr_decay_steps": _DERIVED,
    "scheduler.lr_warmup_samples": _SAMPLES,
    "scheduler.lr_warmup_steps": _DERIVED,
    "scheduler.lr_wsd_decay_samples": _SAMPLES,
    "scheduler.max_steps": "write scheduler.lr_decay_iters and the stage's until",
    "scheduler.override_opt_param_scheduler": "a changed schedule must not be accepted in silence",
    "scheduler.use_checkpoint_opt_param_scheduler": "the schedule is the recipe's",
    "scheduler.wd_incr_steps": _DERIVED,
    "scheduler.wsd_decay_steps": _DERIVED,
    "tokenizer.tokenizer_model": _RECIPE_TOKENIZER,
    "tokenizer.tokenizer_type": _RECIPE_TOKENIZER,
    "train.decrease_batch_size_if_needed": _BATCH,
    "train.eval_interval": "write validation.eval_interval",
    "train.eval_iters": "write validation.eval_iters, by which the validation set is sized",
    "train.exit_interval": "write the stage's until",
    "train.iterations_to_skip": "write edits: [{at, skip}]",
    "train.num_epochs": _HORIZON,
    "train.rampup_batch_size": _BATCH,
    "train.skip_train": "a stage trains",
    "train.step_batch_size_schedule": _BATCH,
    "train.train_iters": _HORIZON,
    "train.train_samples": _HORIZON,
    "validation.full_validation": "validation is a fixed set of validation.eval_iters batches",
    "validation.multiple_validation_sets": "the loss of each source is measured at every evaluation",
    "validation.skip_train": "a stage trains",
    "validation.validation_set_names": "the loss of each source is measured at every evaluation",
}
"""Overrides that would break how stages are chained, counted, kept or resumed, with what to write instead."""

_OUTSIDE_SECTIONS = {
    "checkpoint",
    "comm_overlap",
    "ddp",
    "dist",
    "env_vars",
    "ft",
    "inprocess_restart",
    "logger",
    "nvrx_straggler",
    "profiling",
    "straggler",
}
_OUTSIDE = {
    "dataset.num_workers",
    "dataset.persistent_workers",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
    "model.attention_backend",
    "model.barrier_with_L1_time",
    "model.batch_p2p_comm",
    "model.batch_p2p_sync",
    "model.context_parallel_size",
    "model.cp_comm_type",
    "model.cpu_offloading",
    "model.cpu_offloading_activations",
    "model.cpu_offloading_double_buffering",
    "model.cpu_offloading_num_layers",
    "model.cpu_offloading_weights",
    "model.cuda_graph_impl",
    "model.cuda_graph_modules",
    "model.cuda_graph_scope",
    "model.cuda_graph_use_single_mempool",
    "model.cuda_graph_warmup_steps",
    "model.deallocate_pipeline_outputs",
    "model.defer_embedding_wgrad_compute",
    "model.delay_wgrad_compute",
    "model.distribute_saved_activations",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
    "model.fine_grained_activation_offloading",
    "model.hierarchical_context_parallel_sizes",
    "model.microbatch_group_size_per_vp_stage",
    "model.moe_deepep_num_sms",
    "model.moe_flex_dispatcher_backend",
    "model.moe_flex_dispatcher_num_sms",
    "model.moe_hybridep_num_sms",
    "model.moe_per_layer_logging",
    "model.moe_shared_expert_overlap",
    "model.moe_token_dispatcher_type",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.offload_modules",
    "model.overlap_moe_expert_parallel_comm",
    "model.overlap_p2p_comm",
    "model.overlap_p2p_comm_warmup_flush",
    "model.pipeline_model_parallel_comm_backend",
    "model.pipeline_model_parallel_layout",
    "model.pipeline_model_parallel_size",
    "model.recompute_granularity",
    "model.recompute_method",
    "model.recompute_modules",
    "model.recompute_num_layers",
    "model.sequence_parallel",
    "model.tensor_model_parallel_size",
    "model.tp_comm_bootstrap_backend",
    "model.tp_comm_overlap",
    "model.virtual_pipeline_model_parallel_size",
    "optimizer.optimizer_cpu_offload",
    "optimizer.optimizer_offload_fraction",
    "optimizer.overlap_cpu_optimizer_d2h_h2d",
    "optimizer.overlap_param_gather",
    "optimizer.overlap_param_gather_with_optimizer_step",
    "optimizer.pin_cpu_grads",
    "optimizer.pin_cpu_params",
    "optimizer.use_distributed_optimizer",
    "rerun_state_machine.check_for_nan_in_loss",
    "rerun_state_machine.check_for_spiky_loss",
    "rerun_state_machine.rerun_mode",
    "rerun_state_machine.spiky_loss_factor",
    "train.check_weight_hash_across_dp_replicas_interval",
    "train.empty_unused_memory_level",
    "train.exit_duration_in_mins",
    "train.exit_signal",
    "train.exit_signal_handler",
    "train.exit_signal_handler_for_dataloader",
    "train.exit_signal_handler_for_training",
    "train.gpu_sniff_test_interval",
    "train.manual_gc",
    "train.manual_gc_eval",
    "train.manual_gc_interval",
    "train.micro_batch_size",
    "train.train_sync_interval",
    "validation.eval_micro_batch_size",
}
_INSIDE = {
    "ddp.fp4_param_gather",
    "ddp.fp8_param_gather",
    "ddp.grad_reduce_in_fp32",
    "ddp.megatron_fsdp_grad_comm_dtype",
    "ddp.megatron_fsdp_main_grads_dtype",
    "ddp.megatron_fsdp_main_params_dtype",
    "ddp.param_name_patterns_for_fp32_local_accumulation",
    "ddp.reduce_scatter_with_fp32_accumulation",
}
"""Of the sections outside: in which precision gradients and parameters are summed and kept."""
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
    """Raise NemoflowError for overrides that Megatron-Bridge does not know, or whose values have a wrong type.

    The message has them all, each with the nearest known key or the right type. By a table of the pinned release
    (keys.py), in milliseconds and without Megatron; the job asks the real classes again.
    """
    wrong = [(key, problem) for key, value in overrides.items() if (problem := keys.problem(key, value))]
    if wrong:
        raise NemoflowError("; ".join(f"{where}.{key}: {problem}" for key, problem in wrong))


def geometry(
    function: str | None,
    overrides: dict,
    resources: dict,
    hf_config: dict | None,
    kind: str,
    pack_size: int | None,
    parents: Sequence[tuple[str | None, dict]] = (),
) -> tuple[str, list[str]]:
    """How a training is laid out over its GPUs, in a line, and all that is impossible about it, in sentences.

    parents: the recipe functions and overrides of the stages it starts from, first to last: an SFT has their model.
    In seconds, without Megatron; see geometry.py.
    """
    return layout.check(function, overrides, resources, hf_config, kind, pack_size, parents)


def export_needs(
    function: str | None,
    overrides: dict,
    hf_config: dict | None,
    kind: str,
    parents: Sequence[tuple[str | None, dict]],
    dtype: str,
) -> tuple[int, int] | None:
    """Bytes of memory an export holds and of weights it writes; None where the settings do not say the model's size."""
    found, _, _ = layout.settings(function, overrides, hf_config, kind, None, parents)
    count = size.parameters(found)
    return None if count is None else (size.MEMORY * count * size.BYTES[dtype], count * size.BYTES[dtype])


def checkpoint_needs(
    function: str | None,
    overrides: dict,
    hf_config: dict | None,
    kind: str,
    parents: Sequence[tuple[str | None, dict]],
) -> int | None:
    """Bytes of a checkpoint with its optimizer; None where the settings do not say the model's size."""
    found, _, _ = layout.settings(function, overrides, hf_config, kind, None, parents)
    count = size.parameters(found)
    return None if count is None else count * size.CHECKPOINT[bool(found.get("model.bf16", True))]


def outside(key: str) -> bool:
    """Whether an override leaves the result as it is: placement, speed, logging. Everything else is identity."""
    return key in _OUTSIDE or (key.partition(".")[0] in _OUTSIDE_SECTIONS and key not in _INSIDE)


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
