"""TRL: reinforcement learning at toy size, on a machine without a GPU.

This module is what the main process and the driver need, without torch; train.py is the program that trains.
"""

import sys
from pathlib import Path

from nemoflow.engines.trl.checkpoints import states
from nemoflow.environments import Environment
from nemoflow.errors import NemoflowError

__all__ = [
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

REFUSED = {
    "grpo.bf16": "the model is trained in float32 on a CPU",
    "grpo.do_eval": "rewards are measured on what is sampled in training",
    "grpo.eval_strategy": "rewards are measured on what is sampled in training",
    "grpo.fp16": "the model is trained in float32 on a CPU",
    "grpo.ignore_data_skip": "a resume would train on other prompts than an uninterrupted run",
    "grpo.logging_dir": "measurements go to metrics.jsonl",
    "grpo.logging_strategy": "measurements go to metrics.jsonl",
    "grpo.max_steps": "write the stage's horizon",
    "grpo.model_init_kwargs": "the model is what the stage starts from",
    "grpo.num_train_epochs": "write the stage's horizon",
    "grpo.output_dir": "checkpoints live in the trajectory's directory",
    "grpo.push_to_hub": "nothing is uploaded",
    "grpo.report_to": "measurements go to metrics.jsonl",
    "grpo.restore_callback_states_from_checkpoint": "the workflow resumes from the newest complete checkpoint",
    "grpo.resume_from_checkpoint": "the workflow resumes from the newest complete checkpoint",
    "grpo.save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "grpo.save_steps": "write the stage's save_interval, which is not part of its identity",
    "grpo.save_strategy": "the workflow decides which states are kept",
    "grpo.save_total_limit": "the workflow decides which states are kept",
    "grpo.shuffle_dataset": "the order of the prompts follows from the seed",
    "grpo.trust_remote_code": "never needed",
    "grpo.use_cpu": "the engine takes the device there is",
    "grpo.use_vllm": "this engine samples with transformers",
}


def check(overrides: dict, where: str) -> None:
    """Raise NemoflowError for an override that is not of GRPOConfig; its fields are checked when the stage starts."""
    for key in overrides:
        if not key.startswith("grpo."):
            raise NemoflowError(
                f"{where}.{key}: no section of this engine; write grpo.NAME, NAME a field of GRPOConfig"
            )


def check_algorithm(algorithm: str, overrides: dict, where: str) -> None:  # noqa: ARG001
    """Raise NemoflowError for an algorithm that is not trained here."""
    if algorithm != "grpo":
        raise NemoflowError(f"{where}.algorithm: {algorithm!r}: engine trl trains grpo")


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
    return key in {"grpo.dataloader_num_workers", "grpo.logging_steps", "grpo.disable_tqdm"}


def tokens_per_iteration(_: dict) -> int | None:
    """None: how many tokens a step trains on is known only once they are sampled."""
    return None


def schedule_horizon(_: dict) -> int | None:
    """None: a recipe writes the horizon itself."""
    return None


def command(request: Path) -> list[str]:
    """The program that trains what the request says."""
    return [sys.executable, "-m", "nemoflow.engines.trl.train", str(request)]
