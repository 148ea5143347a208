"""Slurm jobs by the names people know: `squeue` shows Snakemake's uuids."""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from nemoflow import slurm
from nemoflow.errors import NemoflowError
from nemoflow.store import read_json

TAIL_BYTES = 4096
"""Of a trajectory's metrics, in which its last whole line is found."""


@dataclass(frozen=True)
class Row:
    """A Slurm job and the artifact that it is for."""

    id: int
    state: str
    title: str
    progress: str
    nodes: str
    directory: Path | None
    """The artifact's, or the trajectory's; None when it is gone."""

    @property
    def log(self) -> str:
        attempts = sorted((self.directory / "attempts").glob("*.log"), key=lambda p: p.stat().st_mtime)
        return str(attempts[-1]) if attempts else ""


def waiting_and_running(store: Path) -> list[Row]:
    """This user's jobs that Snakemake submitted from this directory. Raises Unreachable when Slurm does not answer."""
    here = os.path.realpath(".")
    return [
        _row(job, *found, store)
        for job in slurm.mine()
        if os.path.realpath(job.workdir) == here and (found := _of(job.comment))
    ]


def of_id(id: int, store: Path) -> Row:
    """The job with this id, also after its end. Raises NemoflowError for one that nothing here was made by."""
    try:
        job = slurm.job(id)
    except slurm.Unreachable:
        job = None
    if job is not None and (found := _of(job.comment)):
        return _row(job, *found, store)
    for path in sorted(store.glob("*/*/run.json")):
        for attempt in reversed(read_json(path)["attempts"]):
            if attempt.get("job", {}).get("id") == id:
                title = _title(path.parent, attempt.get("at"))
                state = attempt.get("outcome", "killed")
                return Row(id, state, title, _progress(path.parent), ",".join(attempt.get("nodes", [])), path.parent)
    raise NemoflowError(f"{id}: no Slurm job of this directory has this id")


def table(rows: list[Row]) -> str:
    """A line per job, with its log below."""
    if not rows:
        return "no Slurm job of this directory waits or runs"
    cells = [("job", "state", "what", "progress", "nodes")]
    cells += [(str(r.id), r.state.lower(), r.title, r.progress, r.nodes) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    logs = ["", *(f"{' ' * widths[0]}  {r.log}" if r.directory and r.log else "" for r in rows)]
    return "\n".join(line for pair in zip(lines, logs, strict=True) for line in pair if line)


def _of(comment: str) -> tuple[str, str, int | None] | None:
    """Rule, identity and state of a job, from the comment that Snakemake's plugin gives it; None of other jobs."""
    match = re.fullmatch(r"rule_(\w+?)_wildcards_(.+_)?(?P<id>[0-9a-f]{12,})(_(?P<at>\d+))?", comment)
    return (match[1], match["id"], int(match["at"]) if match["at"] else None) if match else None


def _row(job: slurm.Job, rule: str, identity: str, at: int | None, store: Path) -> Row:
    directory = next(store.glob(f"*/*-{identity}"), None)
    title = _title(directory, at) if directory else f"{rule} {identity}"
    state = job.state
    if job.live and job.restarts:
        state += f", slot {job.restarts + 1}"
    if job.live and job.end:
        state += f", {max(0, job.end - time.time()) / 60:.0f} min left"
    return Row(job.id, state, title, _progress(directory) if directory else "", ",".join(job.nodes), directory)


def _title(directory: Path, at: int | None) -> str:
    launch = directory / "launch.json"
    title = read_json(launch).get("title") if launch.exists() else None
    name, _, _ = directory.name.rpartition("-")
    return (title or f"{directory.parent.name} {name}") + (f" to {at}" if at is not None else "")


def _progress(directory: Path) -> str:
    """The newest iteration of a training; empty of anything else."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line break is being written
    return f"iteration {json.loads(lines[-1])['iteration']}" if lines else ""
