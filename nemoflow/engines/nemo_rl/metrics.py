"""What NeMo-RL measures, from its TensorBoard files into the trajectory's metrics.jsonl.

NeMo-RL writes no file of measurements that a machine could read but TensorBoard's. The script of each start writes one
of its own; those of a step that was trained again after a resume supersede the earlier ones.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

NAMES = {
    "train/loss": "loss",
    "train/reward": "reward",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/kl_penalty": "kl",
    "train/approx_entropy": "entropy",
    "train/token_mult_prob_error": "mismatch",
    "train/gen_kl_error": "generation_kl",
    "train/accuracy": "accuracy",
    "train/mean_gen_tokens_per_sample": "completion_tokens_each",
    "timing/train/total_step_time": "seconds",
}
"""TensorBoard's names -> ours. mismatch: mean of exp(|log p of training - log p of generation|) over sampled tokens, 1
where both agree. accuracy: share of the pairs whose chosen answer is preferred."""

_AGENT = "/reward/mean"


class Follower:
    """Reads the files of a directory as they grow."""

    def __init__(self, logs: Path):
        self._logs = logs
        self._loaders: dict[Path, object] = {}
        self._steps: dict[int, dict] = {}
        self._done = 0

    def read(self, last: bool = False) -> list[dict]:
        """Entries of the steps that are whole: those before the newest one, which may still be written to; that one too
        when it is the `last` call."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        seen: dict[int, dict[str, float]] = defaultdict(dict)
        for file in sorted(self._logs.rglob("events.out.tfevents.*")):
            loader = self._loaders.setdefault(file, EventFileLoader(str(file)))
            for event in loader.Load():
                for value in event.summary.value:
                    if (number := _number(value)) is not None:
                        seen[event.step][value.tag] = number
        for step, values in seen.items():
            entry = self._steps.setdefault(step, {})
            entry |= values
        newest = max(self._steps, default=0)
        whole = [step for step in sorted(self._steps) if last or step < newest]
        return [entry for step in whole if (entry := entry_of(step, self._steps.pop(step)))]


def _number(value) -> float | None:
    """The number of a scalar, as any writer stores it; None for what is none."""
    if value.HasField("simple_value"):
        return value.simple_value
    if value.HasField("tensor") and not value.tensor.tensor_shape.dim:
        held = value.tensor
        for kind in ("float_val", "double_val", "int_val", "int64_val", "bool_val"):
            if found := list(getattr(held, kind)):
                return float(found[0])
    return None


def entry_of(step: int, values: dict[str, float]) -> dict | None:
    """The line of a step: our names; `rewards` by agent; `validation`, by the names that NeMo-RL chooses checkpoints
    by (val:NAME). None for a step 0 without validation."""
    entry: dict = {"iteration": step}
    rewards = {}
    validation = {}
    for tag, value in sorted(values.items()):
        section, _, name = tag.partition("/")
        if tag in NAMES:
            entry[NAMES[tag]] = value
        elif not math.isfinite(value):
            continue  # of an environment without answers in this step
        elif section == "train" and name.endswith(_AGENT):
            rewards[name.removesuffix(_AGENT)] = value
        elif section == "validation":
            validation[f"val:{name}"] = value
        elif section.startswith("validation-"):  # of a data set, in dpo and rm
            validation[f"val:{section}_{name}"] = value
    if rewards:
        entry["rewards"] = rewards
    if validation:
        entry["validation"] = validation
    return entry if len(entry) > 1 else None


def write(file: Path, entries: list[dict]) -> None:
    """Append the lines. What is no number in JSON becomes null."""
    with file.open("a", encoding="utf-8") as stream:
        for entry in entries:
            stream.write(json.dumps(_finite(entry), sort_keys=True) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(file: Path) -> list[dict]:
    """The entries in a file, one a step, in order."""
    found: dict[int, dict] = {}
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):  # else cut off by a kill
            entry = json.loads(line)
            found.setdefault(entry["iteration"], {}).update(entry)
    return [found[step] for step in sorted(found)]


def best(entries: list[dict], steps: Collection[int]) -> int | None:
    """Of these steps the one that validation liked best, the earliest of equals; None where none was validated.

    By mean reward (val:accuracy, as NeMo-RL calls it) where answers are judged, else by mean loss over the data sets.
    """
    scores: dict[int, float] = {}
    for entry in entries:
        found = {k: v for k, v in entry.get("validation", {}).items() if v is not None}
        losses = [v for k, v in found.items() if k.startswith("val:validation-") and k.endswith("_loss")]
        if "val:accuracy" in found:
            scores[entry["iteration"]] = found["val:accuracy"]
        elif losses:
            scores[entry["iteration"]] = -sum(losses) / len(losses)
    known = [step for step in sorted(steps) if step in scores]
    return max(known, key=scores.__getitem__, default=None)
