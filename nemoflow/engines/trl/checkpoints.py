"""Checkpoints of the TRL engine: which ones are complete. No torch here; the driver imports this.

A checkpoint is a directory checkpoint-<step> as transformers' Trainer writes it. The Trainer writes file after file, so
a kill leaves a directory that looks like one. Hence a marker, written last and atomically, that lists the files with
their sizes: a checkpoint is complete when the marker is there and every file is as long as it says.
"""

import json
import os
import shutil
from pathlib import Path

MARKER = "complete.json"
PREFIX = "checkpoint-"


def mark(checkpoint: Path) -> None:
    """Declare a checkpoint complete, once its files are on the disk."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    listed = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in files}
    temporary = checkpoint / f".{MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(listed, indent=2, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(checkpoint / MARKER)


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and nothing of it is missing or cut off."""
    try:
        listed = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in listed.items())
    except (OSError, ValueError, AttributeError):
        return False


def _steps(checkpoints: Path) -> dict[int, Path]:
    found = {p.name.removeprefix(PREFIX): p for p in checkpoints.glob(f"{PREFIX}*") if p.is_dir()}
    return {int(step): found[step] for step in sorted(found, key=lambda s: (len(s), s)) if step.isdigit()}


def states(checkpoints: Path) -> dict[int, Path]:
    """Step -> directory of every complete checkpoint, ascending; empty when there are none."""
    return {step: path for step, path in _steps(checkpoints).items() if complete(path)}


def remove_incomplete(checkpoints: Path) -> None:
    """Delete what a killed save left. Only for the one process that trains here."""
    for path in _steps(checkpoints).values():
        if not complete(path):
            shutil.rmtree(path)
