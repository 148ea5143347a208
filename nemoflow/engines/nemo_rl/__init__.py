"""NeMo-RL: reinforcement learning on GPUs, over Ray, with vLLM.

This module is what the main process and the driver need; train.py is the program that runs beside Ray's head, in the
image, and starts NeMo-RL's own script with a configuration over one of the image's examples (overlay.py). What differs
between releases is in releases.py and keys.json.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemoflow.engines.nemo_rl import geometry as layout
from nemoflow.engines.nemo_rl import keys, releases
from nemoflow.engines.nemo_rl.checkpoints import states
from nemoflow.errors import NemoflowError

if TYPE_CHECKING:  # it needs more than the image has
    from nemoflow.environments import Environment

__all__ = [
    "FORM",
    "REFUSED",
    "STARTS_FROM",
    "check",
    "check_algorithm",
    "command",
    "environments",
    "geometry",
    "outside",
    "schedule_horizon",
    "states",
    "tokens_per_iteration",
]

STARTS_FROM = "export"
CARRIES = ("weights",)
FORM = "ray"

RELEASE = "nemo_rl.release"
"""The one override that is none of NeMo-RL: the release in the image, by its tag. It is not identity."""

_STEPS = "write the stage's horizon and until"
_PLACE = "checkpoints live in the trajectory's directory, and the workflow decides which are kept"
_DATA = "write the stage's data"
_MODEL = "write the stage's init"
_CHOICE = "name the state that goes on, init: {from, at}; what validation measured stands in metrics.jsonl"
_ADAPTERS = "adapters that NeMo-RL trains cannot be exported here"
_NODES = "write the stage's resources"

REFUSED = {
    **{f"{section}.max_num_steps": _STEPS for section in ("grpo", "dpo", "rm", "distillation")},
    **{f"{section}.max_num_epochs": _STEPS for section in ("grpo", "dpo", "rm", "distillation")},
    "checkpointing.checkpoint_dir": _PLACE,
    "checkpointing.checkpoint_must_save_by": "it follows from the end of the job",
    "checkpointing.enabled": _PLACE,
    "checkpointing.higher_is_better": _CHOICE,
    "checkpointing.keep_top_k": "write the stage's keep, milestones and until",
    "checkpointing.metric_name": _CHOICE,
    "checkpointing.pretrained_checkpoint.format": _MODEL,
    "checkpointing.pretrained_checkpoint.path": _MODEL,
    "checkpointing.save_optimizer": "a checkpoint without the optimizer cannot be resumed",
    "checkpointing.save_period": "write the stage's save_interval, which is not part of its identity",
    "cluster.gpus_per_node": _NODES,
    "data.dataset_name": _DATA,
    "data.default.dataset_name": _DATA,
    "data.train.data_path": _DATA,
    "data.train.dataset_name": _DATA,
    "data.train_data_path": _DATA,
    "data.train_jsonl_fpath": _DATA,
    "data.val_data_path": _DATA,
    "data.validation.data_path": _DATA,
    "data.validation.dataset_name": _DATA,
    "data.validation_jsonl_fpath": _DATA,
    "env.nemo_gym.config_paths": "write data: {environments: [...]}",
    "env.should_use_nemo_gym": "write data: {environments: [...]}",
    "grpo.max_val_samples": "validation is over all prompts that data.valid keeps for it",
    "logger.log_dir": "logs live in the trajectory's directory",
    "logger.tensorboard_enabled": "measurements are read from it",
    "policy.megatron_cfg.force_reconvert_from_hf": "the conversion is kept for each artifact, so it cannot be stale",
    "policy.dtensor_cfg.lora_cfg.enabled": _ADAPTERS,
    "policy.megatron_cfg.peft.enabled": _ADAPTERS,
    "policy.model_name": _MODEL,
    "policy.tokenizer.name": "write the recipe's tokenizer",
    "teacher.model_name": "write the stage's teacher",
    "teacher.tokenizer.name": "write the recipe's tokenizer",
}
"""Overrides that would break how stages are chained, counted, kept or resumed, with what to write instead."""

_OUTSIDE_SECTIONS = ("checkpointing", "cluster", "logger", "data_plane")
_OUTSIDE_ENDS = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "expert_parallel_size", "sequence_parallel"),
    *("tensor_parallel_size", "pipeline_parallel_size", "dp_replicate_size"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("activation_checkpointing", "recompute_granularity", "recompute_modules", "cpu_offload", "env_vars"),
    *("empty_unused_memory_level", "logprob_chunk_size", "refit_buffer_size_gb", "gpu_memory_utilization"),
    *("moe_token_dispatcher_type", "moe_enable_deepep", "moe_shared_expert_overlap", "moe_per_layer_logging"),
    *("overlap_grad_reduce", "overlap_param_gather", "use_distributed_optimizer", "offload_optimizer_for_logprob"),
    *("optimizer_cpu_offload", "optimizer_offload_fraction", "data_parallel_sharding_strategy", "num_workers"),
    *("train_micro_batch_size", "logprob_batch_size", "generation_batch_size", "enforce_eager", "track_moe_metrics"),
    *("port_range_low", "port_range_high", "calculate_advantages_on_gpu", "attention_backend"),
)
"""Last names of settings of a policy or a teacher that place and speed it up, and leave the result as it is."""


def release_of(overrides: dict, where: str) -> str:
    """The release a stage is written for. Raises NemoflowError for one that is not known."""
    release = overrides.get(RELEASE, releases.DEFAULT)
    if release not in releases.RELEASES:
        raise NemoflowError(
            f"{where}.{RELEASE}: {release!r}: this engine knows {' and '.join(releases.RELEASES)}, the tags of images"
        )
    return release


def check(overrides: dict, where: str) -> None:
    """Raise NemoflowError for overrides the release does not know, or whose values have a wrong type; all of them."""
    _check(release_of(overrides, where), None, overrides, where)


def _check(release: str, algorithm: str | None, overrides: dict, where: str) -> None:
    given = {k: v for k, v in overrides.items() if k != RELEASE}
    wrong = [(k, said) for k, v in given.items() if (said := keys.problem(release, algorithm, k, v))]
    if wrong:
        raise NemoflowError("; ".join(f"{where}.{key}: {said}" for key, said in wrong))


def check_algorithm(algorithm: str, overrides: dict, where: str) -> None:
    """Raise NemoflowError for an algorithm the release does not train, or for overrides of another one's sections."""
    release = release_of(overrides, f"{where}.overrides")
    if algorithm not in releases.RELEASES[release]:
        known = ", ".join(releases.RELEASES[release])
        raise NemoflowError(f"{where}.algorithm: {algorithm!r}: NeMo-RL {release} is run for {known}")
    _check(release, algorithm, overrides, f"{where}.overrides")


def environments(found: "dict[str, Environment]", where: str) -> dict:
    """Agent -> NeMo-Gym's configuration, or the name of NeMo-RL's own environment, that judges its rows.

    Raises NemoflowError for an environment of neither, and for both kinds in one stage.
    """
    frozen = {}
    for name, each in found.items():
        if each.gym:
            frozen[each.agent] = {"gym": each.gym}
        elif each.nemo_rl in releases.OWN:
            frozen[each.agent] = {"nemo_rl": each.nemo_rl}
        else:
            raise NemoflowError(
                f"{where}: {name} has no `gym` in its file, and `nemo_rl` is none of {', '.join(releases.OWN)}; engine "
                "nemo_rl starts NeMo-Gym's servers, or NeMo-RL's own environments"
            )
    if len({next(iter(each)) for each in frozen.values()}) > 1:
        raise NemoflowError(f"{where}: NeMo-Gym's environments and NeMo-RL's own cannot judge in one stage")
    if sum("nemo_rl" in each for each in frozen.values()) > 1:
        raise NemoflowError(f"{where}: one of NeMo-RL's own environments judges all rows; keep one")
    return frozen


def geometry(
    function: str | None,  # noqa: ARG001
    overrides: dict,
    resources: dict,
    hf_config: dict | None,  # noqa: ARG001
    kind: str,  # noqa: ARG001
    pack_size: int | None,  # noqa: ARG001
    parents: list,  # noqa: ARG001
    payload: dict,
) -> tuple[str, list[str]]:
    """How a stage is laid out over its GPUs, in a line, and all that is impossible about it, in sentences."""
    release = release_of(overrides, "overrides")
    try:
        entry = releases.example(release, payload["algorithm"], payload.get("environments", {}))
    except NemoflowError as error:
        return "", [str(error)]
    known = keys.table(release)["defaults"][entry[1]] | releases.RELEASES[release][payload["algorithm"]].settings
    gym = releases.is_gym(payload.get("environments", {}))
    return layout.check(payload["algorithm"], known, overrides, resources, gym)


def outside(key: str) -> bool:
    """Whether an override leaves the result as it is: placement, speed, logging, the release. The rest is identity."""
    section, _, name = key.partition(".")
    model = section in ("policy", "teacher") and key.rpartition(".")[2] in _OUTSIDE_ENDS
    return key == RELEASE or section in _OUTSIDE_SECTIONS or model or ("colocated" in name and section == "policy")


def tokens_per_iteration(_: dict) -> int | None:
    """None: how many tokens a step trains on is known only once they are sampled."""
    return None


def schedule_horizon(_: dict) -> int | None:
    """None: a recipe writes the horizon itself."""
    return None


def command(request: Path) -> list[str]:
    """The program that trains what the request says."""
    return [sys.executable, "-m", "nemoflow.engines.nemo_rl.train", str(request)]
