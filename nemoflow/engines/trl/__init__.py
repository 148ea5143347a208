"""TRL: reinforcement learning at toy size, on a machine without a GPU.

This module is what the main process and the driver need, without torch; train.py is the program that trains.
"""

import sys
from pathlib import Path

from nemoflow.engines.trl.checkpoints import states
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

STARTS_FROM = "export"
CARRIES = ("weights",)

REFUSED = {
    "grpo.max_steps": "write the stage's horizon",
    "grpo.output_dir": "checkpoints live in the trajectory's directory",
    "grpo.save_steps": "write the stage's save_interval, which is not part of its identity",
    "grpo.save_strategy": "the workflow decides which states are kept",
    "grpo.resume_from_checkpoint": "the workflow resumes from the newest complete checkpoint",
    "grpo.report_to": "measurements go to metrics.jsonl",
    "grpo.use_cpu": "the engine takes the device there is",
}


def check(overrides: dict, where: str) -> None:
    """Raise NemoflowError for an override that is not of GRPOConfig; its fields are checked when the stage starts."""
    for key in overrides:
        if not key.startswith("grpo."):
            raise NemoflowError(
                f"{where}.{key}: no section of this engine; write grpo.NAME, NAME a field of GRPOConfig"
            )


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
