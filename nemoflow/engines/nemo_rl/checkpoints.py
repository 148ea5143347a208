"""Checkpoints of NeMo-RL: which ones are complete, which ones stay.

    step_N/training_info.json, config.yaml, train_dataloader.pt, policy/...

NeMo-RL writes tmp_step_N and renames it, so that a step_N was written to its end; but also for a run whose time was up,
which ends with exit code 0 like one that is done. Hence what a step is, is read from its training_info.json.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

PREFIX = "step_"
MEGATRON = Path("policy/weights/iter_0000000")
"""The policy of a Megatron backend below a step: a checkpoint of Megatron-Bridge, always by this name."""


def states(checkpoints: Path) -> dict[int, Path]:
    """Step -> directory of every complete checkpoint, ascending; empty when there are none."""
    found = {p.name.removeprefix(PREFIX): p for p in checkpoints.glob(f"{PREFIX}*") if p.is_dir()}
    steps = {int(step): path for step, path in found.items() if step.isdigit()}
    return {step: steps[step] for step in sorted(steps) if _complete(steps[step], step)}


def _complete(directory: Path, step: int) -> bool:
    try:
        info = json.loads((directory / "training_info.json").read_text(encoding="utf-8"))
        weights = any((directory / "policy" / "weights").iterdir())
    except (OSError, ValueError):
        return False
    # Asynchronous GRPO counts its steps in current_step, which else is the step within the epoch
    return isinstance(info, dict) and weights and step in (info.get("total_steps"), info.get("current_step"))


def prune(checkpoints: Path, keep: dict, wanted: Collection[int]) -> list[int]:
    """Delete the states that nothing asks for; the steps deleted.

    keep: {"last": the newest ones, "every": multiples of it, or None}. Only for the one process that trains here.
    """
    there = states(checkpoints)
    kept = {*list(there)[-keep["last"] :], *wanted}
    gone = [n for n in there if n not in kept and not (keep["every"] and n % keep["every"] == 0)]
    for step in gone:
        # Renamed first: half a checkpoint must not look like one
        shutil.rmtree(there[step].rename(there[step].with_name(f"old_{there[step].name}")))
    return gone
