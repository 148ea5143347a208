"""What this program asks of Slurm, and tells it: the only module that runs squeue, scontrol, sinfo and scancel.

Every call has a timeout. A controller that does not answer is `Unreachable`, never "no such job": whoever takes silence
for an end starts a second job beside the first.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from nemoflow.errors import NemoflowError

LIVE = frozenset(
    [
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "CONFIGURING",
        "COMPLETING",
        "RESIZING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESV_DEL_HOLD",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "POWER_UP_NODE",
    ]
)
"""States of a job that is to run, runs, or whose processes may still be there."""

TIMEOUT_SECONDS = 30
"""Slurm's clients give up on a silent controller after MessageTimeout, 10 s unless configured otherwise."""

_FIELDS = ["%A", "%T", "%N", "%e", "%P", "%x", "%k", "%Z"]
_SEPARATOR = "\x1f"


class Unreachable(NemoflowError):
    """Slurm's controller does not answer, or its commands are not here."""


@dataclass(frozen=True)
class Job:
    """A job as the controller sees it; `nodes` and `end` (seconds since the epoch) are those of the present slot."""

    id: int
    state: str
    restarts: int
    nodes: list[str]
    end: float | None
    partition: str
    comment: str
    workdir: str
    excluded: list[str]

    @property
    def live(self) -> bool:
        return self.state in LIVE


@dataclass(frozen=True)
class Partition:
    """A partition's limits. CPUs, memory (MB) and GPUs are those of its largest node; GPUs without a type are ""."""

    name: str
    max_time: int | None
    max_nodes: int | None
    nodes: int
    cpus: int
    memory: int
    gpus: dict[str, int]
    default: bool = False


def _run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment)
    except FileNotFoundError:
        raise Unreachable(f"{command[0]}: is not on this machine's PATH; run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]}: Slurm did not answer within {TIMEOUT_SECONDS} s") from None


def _ask(*command: str) -> list[str]:
    """The lines a question to the controller is answered with. Raises Unreachable when it is not."""
    answer = _run(*command)
    if answer.returncode:
        raise Unreachable(f"{command[0]}: Slurm does not answer: {_said(answer)}")
    return answer.stdout.splitlines()


def _said(answer: subprocess.CompletedProcess) -> str:
    said = answer.stderr.strip().splitlines()
    return said[-1] if said else f"exit code {answer.returncode}"


# -- jobs ----------------------------------------------------------------------------------------------------------


def job(id: int) -> Job | None:
    """The job, also some minutes (MinJobAge) after its end; None when Slurm does not know it (any more)."""
    return next(iter(_jobs("--states=all", f"--jobs={id}")), None)


def mine() -> list[Job]:
    """This user's jobs that are to run or run, in the order of their ids."""
    # By number: users in a directory server may have no name on this machine
    return [j for j in known().values() if j.live]


def known() -> dict[int, Job]:
    """This user's jobs by id: those that are to run or run, and for some minutes (MinJobAge) those that have ended."""
    return {j.id: j for j in _jobs("--states=all", f"--user={os.getuid()}")}


def here() -> Job | None:
    """The job this process runs in; None outside of one, and in a container without Slurm's commands. Of its
    environment only the id is used: Snakemake's plugin drops most of the rest."""
    id = os.environ.get("SLURM_JOB_ID", "")
    return job(int(id)) if id.isdigit() and shutil.which("squeue") else None


def _jobs(*which: str) -> list[Job]:
    try:
        # First, so that a job that is requeued in between looks as if it ran on for a moment, not as if it had ended
        counts = _ask("squeue", "--noheader", *which, "--Format=JobID:20,RestartCnt:10")
        lines = _ask("squeue", "--noheader", *which, f"--format={_SEPARATOR.join(_FIELDS)}")
    except Unreachable as error:
        if "Invalid job id" in str(error):
            return []
        raise
    restarts = {int(id): int(count) for id, count in (line.split() for line in counts)}
    found = []
    for line in lines:
        fields = line.split(_SEPARATOR)
        if len(fields) != len(_FIELDS):
            continue  # half of a job that has a line break in its comment, which is not one of ours
        id, state, nodes, end, partition, excluded, comment, workdir = fields
        found.append(
            Job(
                id=int(id),
                state=state,
                restarts=restarts.get(int(id), 0),
                nodes=expand(nodes),
                end=float(end) if nodes and end.isdigit() else None,  # a waiting job's is a guess
                partition=partition,
                comment="" if comment == "(null)" else comment,
                workdir=workdir,
                excluded=expand(excluded),
            )
        )
    return sorted(found, key=lambda j: j.id)


def expand(nodes: str) -> list[str]:
    """Slurm's short form of a list of hosts, in full: "n[1-2,5],m" -> n1, n2, n5, m."""
    found = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        if word != "(null)":
            parts = re.split(r"\[([^\]]*)\]", word)
            choices = [_numbers(part) if n % 2 else [part] for n, part in enumerate(parts)]
            found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _numbers(ranges: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found


def requeue(id: int, exclude: Iterable[str] = ()) -> None:
    """End the job's present slot and have it start again under the same id, not on the nodes of `exclude`.

    Returns at once; a job that calls this on itself is about to be killed, and should wait for that. Raises
    NemoflowError when Slurm refuses, as for jobs submitted with --no-requeue.
    """
    commands = [["scontrol", "requeue", str(id)]]
    if exclude:
        known = found.excluded if (found := job(id)) else []
        nodes = ",".join(dict.fromkeys([*known, *exclude]))
        # Only a waiting job's nodes can be changed, and by then the one who asks is being killed
        commands.append(["scontrol", "update", f"JobId={id}", f"ExcNodeList={nodes}"])
    script = "trap '' TERM; " + " && ".join(map(shlex.join, commands))
    child = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, error = child.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"scontrol requeue {id}: Slurm did not answer within {TIMEOUT_SECONDS} s") from None
    if child.returncode:
        silent = re.search("contact|timed out|refused", error, re.IGNORECASE)
        raise (Unreachable if silent else NemoflowError)(f"scontrol requeue {id}: {error.strip()}")


def cancel(id: int) -> None:
    """End the job, waiting or running. One that has ended already is no error."""
    if (done := _run("scancel", str(id))).returncode and "Invalid job id" not in done.stderr:
        raise Unreachable(f"scancel {id}: {_said(done)}")


# -- the cluster ---------------------------------------------------------------------------------------------------


def addresses(nodes: Iterable[str]) -> list[str]:
    """The address of each node, under which the others reach it. Raises NemoflowError for an unknown node."""
    names = list(nodes)
    answer = _run("scontrol", "show", "node", "--oneliner", ",".join(names))
    if answer.returncode and "not found" not in answer.stdout:
        raise Unreachable(f"scontrol: Slurm does not answer: {_said(answer)}")
    lines = answer.stdout.splitlines()
    found = dict(re.search(r"NodeName=(\S+).* NodeAddr=(\S+)", line).groups() for line in lines if "NodeAddr=" in line)
    if unknown := [name for name in names if name not in found]:
        raise NemoflowError(f"node {', '.join(unknown)}: unknown to Slurm")
    return [found[name] for name in names]


def partitions() -> dict[str, Partition]:
    """The partitions by name, with their limits."""
    limits = {}
    for line in _ask("scontrol", "show", "partition", "--oneliner"):
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        limits[fields["PartitionName"]] = (
            _seconds(fields["MaxTime"]),
            int(fields["MaxNodes"]) if fields["MaxNodes"].isdigit() else None,
            fields.get("Default") == "YES",
        )
    nodes: dict[str, list[list[str]]] = {name: [] for name in limits}
    for line in _ask("sinfo", "--exact", "--noheader", f"--format={_SEPARATOR.join(['%R', '%D', '%c', '%m', '%G'])}"):
        name, *numbers = line.split(_SEPARATOR)
        nodes[name].append(numbers)
    found = {}
    for name, (max_time, max_nodes, default) in limits.items():
        rows = nodes[name]
        gpus: dict[str, int] = {}
        for row in rows:
            for kind, count in _gpus(row[3]).items():
                gpus[kind] = max(count, gpus.get(kind, 0))
        found[name] = Partition(
            name=name,
            max_time=max_time,
            max_nodes=max_nodes,
            nodes=sum(int(row[0]) for row in rows),
            cpus=max((int(row[1]) for row in rows), default=0),
            memory=max((int(row[2]) for row in rows), default=0),
            gpus=gpus,
            default=default,
        )
    return found


def _gpus(gres: str) -> dict[str, int]:
    """GPUs by type of a node: "gpu:h100:8(S:0-1),gpu:2" -> {"h100": 8, "": 2}."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([A-Za-z_][\w.-]*))?(?::(\d+))?", gres):
        found[kind] = found.get(kind, 0) + int(count or 1)
    return found


def _seconds(duration: str) -> int | None:
    """Slurm's D-HH:MM:SS in seconds; None for UNLIMITED."""
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", duration)):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
