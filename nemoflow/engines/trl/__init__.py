"""TRL: reinforcement learning at toy size, on a machine without a GPU.

This module is what the main process and the driver need, without torch; train.py is the program that trains.
"""

import sys
from pathlib import Path

from nemoflow.engines.trl.checkpoints import states
from nemoflow.environments import Environment
from nemoflow.errors import NemoflowError

__all__ = [
    "NOT_EXPORTED",
    "REFUSED",
    "STARTS_FROM",
    "check",
    "check_algorithm",
    "command",
    "environments",
    "outside",
    "schedule_horizon",
    "states",
    "tokens_per_iteration",
]

STARTS_FROM = "export"
CARRIES = ("weights",)
ONE_PROCESS = True

SECTIONS = {"grpo": ("grpo",), "dapo": ("grpo", "dapo"), "dpo": ("dpo",), "rm": ("rm",)}
"""Algorithm -> sections of its overrides. grpo.NAME, dpo.NAME and rm.NAME are fields of TRL's GRPOConfig, DPOConfig and
RewardConfig; dapo.overlong_cache are the last tokens of an answer in which it is punished for its length, a fifth of
max_completion_length by default."""

SET = {"grpo": {}, "dapo": {"epsilon_high": 0.28, "beta": 0.0, "loss_type": "dapo"}, "dpo": {}, "rm": {}}
"""Algorithm -> settings that it means, which overrides may change. DAPO's are those of its paper, section 3
(arXiv 2503.14476). TRL has no dynamic sampling: groups that are all right or all wrong are trained on, with advantage
zero."""

USUAL = {"math_with_judge_simple_agent": {"verifier": "number"}}
"""What judges the rows of a stage that names no environments."""

NOT_EXPORTED = ("rm",)
"""A reward model is no model that generates; transformers has no class for NemotronH's."""

_REFUSED = {
    "bf16": "the model is trained in float32 on a CPU",
    "do_eval": "rewards are measured on what is sampled in training",
    "eval_strategy": "rewards are measured on what is sampled in training",
    "fp16": "the model is trained in float32 on a CPU",
    "ignore_data_skip": "a resume would train on other prompts than an uninterrupted run",
    "logging_dir": "measurements go to metrics.jsonl",
    "logging_strategy": "measurements go to metrics.jsonl",
    "max_steps": "write the stage's horizon",
    "model_init_kwargs": "the model is what the stage starts from",
    "num_train_epochs": "write the stage's horizon",
    "output_dir": "checkpoints live in the trajectory's directory",
    "push_to_hub": "nothing is uploaded",
    "report_to": "measurements go to metrics.jsonl",
    "restore_callback_states_from_checkpoint": "the workflow resumes from the newest complete checkpoint",
    "resume_from_checkpoint": "the workflow resumes from the newest complete checkpoint",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "save_steps": "write the stage's save_interval, which is not part of its identity",
    "save_strategy": "the workflow decides which states are kept",
    "save_total_limit": "the workflow decides which states are kept",
    "shuffle_dataset": "the order of the rows follows from the seed",
    "train_sampling_strategy": "the order of the rows follows from the seed",
    "trust_remote_code": "never needed",
    "use_cpu": "the engine takes the device there is",
    "use_vllm": "this engine samples with transformers",
}
REFUSED = {f"{section}.{name}": why for section in ("grpo", "dpo", "rm") for name, why in _REFUSED.items()}


def check(overrides: dict, where: str) -> None:
    """Raise NemoflowError for an override of no section; the fields are checked when the stage starts."""
    known = sorted({section for sections in SECTIONS.values() for section in sections})
    for key in overrides:
        section, _, name = key.partition(".")
        if section not in known:
            raise NemoflowError(
                f"{where}.{key}: no section of this engine; write SECTION.NAME, SECTION one of {', '.join(known)}"
            )
        if section == "dapo" and name != "overlong_cache":
            raise NemoflowError(f"{where}.{key}: dapo has overlong_cache; the rest of its settings are grpo.NAME")


def check_algorithm(algorithm: str, overrides: dict, where: str) -> None:
    """Raise NemoflowError for an algorithm that is not trained here, and for overrides of another one."""
    if algorithm not in SECTIONS:
        raise NemoflowError(f"{where}.algorithm: {algorithm!r}: engine trl trains {', '.join(SECTIONS)}")
    for key in overrides:
        if key.partition(".")[0] not in SECTIONS[algorithm]:
            sections = " or ".join(f"{section}.NAME" for section in SECTIONS[algorithm])
            raise NemoflowError(f"{where}.overrides.{key}: settings of {algorithm} are written {sections}")


def environments(found: dict[str, Environment], where: str) -> dict:
    """Agent -> what judges its rows' answers. Raises NemoflowError for an environment without a verifier."""
    frozen = {}
    for name, each in found.items():
        if each.verifier is None:
            raise NemoflowError(
                f"{where}: {name} has no `verifier` in its file, and engine trl starts no server; leave it out, or "
                "write the verifier that judges its answers"
            )
        frozen[each.agent] = each.model_dump(
            include={"verifier", "settings", "timeout", "on_error", "max_skipped"}, exclude_defaults=True
        )
    return frozen


def outside(key: str) -> bool:
    """Whether an override leaves the result as it is."""
    return key.partition(".")[2] in {"dataloader_num_workers", "logging_steps", "disable_tqdm"}


def tokens_per_iteration(_: dict) -> int | None:
    """None: how many tokens a step trains on is known only once they are sampled."""
    return None


def schedule_horizon(_: dict) -> int | None:
    """None: a recipe writes the horizon itself."""
    return None


def command(request: Path) -> list[str]:
    """The program that trains what the request says."""
    return [sys.executable, "-m", "nemoflow.engines.trl.train", str(request)]
