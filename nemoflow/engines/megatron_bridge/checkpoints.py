"""Which of a trajectory's checkpoints are complete, and which of them are kept. Imports no torch.

Megatron writes a checkpoint into `iter_<N>` file by file: the tensors, their index, the counters, then the tracker in
the parent directory, and only after the tracker the run's configuration. A kill can fall between any two of these, or
in the middle of one, so neither a file's presence nor the tracker proves a checkpoint. Hence a file of our own,
`complete.json`, renamed into place after Megatron's save has returned: the names and sizes of all files, and the digest
of the index. A checkpoint is complete when it is there, and sound when every file still has its size.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from nemoflow.errors import NemoflowError

COMPLETE = "complete.json"
REQUIRED = (".metadata", "metadata.json", "train_state.pt", "run_config.yaml")
"""What every torch_dist checkpoint of a training run has, whoever wrote it."""

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the newest checkpoint; written when all of that checkpoint is."""

_REMOVED = ".removed"
_NAME = re.compile(r"iter_(\d{7,})")


def mark_complete(checkpoint: Path) -> None:
    """Declare `checkpoint` (`.../iter_0000060`) complete: to be called when the trainer has written all of it."""
    files = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    index = hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest()
    record = {"iteration": iteration(checkpoint), "index_sha256": index, "files": dict(sorted(files.items()))}
    temporary = checkpoint / f".{COMPLETE}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(checkpoint / COMPLETE)


def iteration(checkpoint: Path) -> int:
    """The N of `.../iter_<N>`. Raises NemoflowError for another name."""
    match = _NAME.fullmatch(checkpoint.name)
    if not match:
        raise NemoflowError(f"{checkpoint}: a checkpoint is a directory iter_<iteration>, such as iter_0000060")
    return int(match[1])


def states(checkpoints: Path) -> dict[int, Path]:
    """Iteration -> directory of every complete checkpoint in `checkpoints`, in order. Empty when there is none."""
    return {iteration(p): p for p in _directories(checkpoints) if (p / COMPLETE).is_file()}


def _directories(checkpoints: Path) -> list[Path]:
    return sorted((p for p in checkpoints.glob("iter_*") if _NAME.fullmatch(p.name)), key=iteration)


def remove_incomplete(checkpoints: Path) -> list[Path]:
    """Delete what a killed save has left, since Megatron would write into it, and what a killed `remove` has.

    Only under the stage's lock.
    """
    left = [p for p in _directories(checkpoints) if not (p / COMPLETE).is_file()]
    left += sorted(checkpoints.glob(f".iter_*{_REMOVED}"))
    for path in left:
        shutil.rmtree(path)
    return left


def saved(checkpoints: Path) -> int:
    """The iteration of the checkpoint that Megatron has finished writing last, by its tracker."""
    return int((checkpoints / TRACKER).read_text(encoding="utf-8"))


def size(checkpoint: Path) -> int:
    """Bytes of a complete checkpoint, as recorded."""
    record = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return sum(record["files"].values())


def prunable(complete: Collection[int], wanted: Collection[int], last: int = 2, every: int | None = None) -> list[int]:
    """Which of the `complete` checkpoints need not be kept, ascending.

    Kept are the `wanted` ones, the newest `last` but never fewer than two (the newest may turn out to be bad), and the
    multiples of `every`.
    """
    old = sorted(complete)[: -max(last, 2)]
    return [n for n in old if n not in wanted and not (every and n % every == 0)]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. At no moment does a part of it look like a complete one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}{_REMOVED}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def check(checkpoint: Path) -> None:
    """Raise NemoflowError, naming the file, unless `checkpoint` is all there: sizes where recorded, else presence."""
    if not checkpoint.is_dir():
        raise NemoflowError(f"{checkpoint}: no such checkpoint")
    record = checkpoint / COMPLETE
    sizes = json.loads(record.read_text(encoding="utf-8"))["files"] if record.is_file() else {}
    for name in sorted({*REQUIRED, *sizes}):
        path = checkpoint / name
        if not path.is_file():
            raise NemoflowError(
                f"{path}: missing, so the checkpoint cannot be loaded; restore it or choose another state"
            )
        if name in sizes and (size := path.stat().st_size) != sizes[name]:
            raise NemoflowError(
                f"{path}: {size} bytes where {sizes[name]} were saved: the checkpoint is damaged; "
                "restore it or choose another state"
            )
