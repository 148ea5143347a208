"""One writer: the lock that a stage's directory has while a job works in it.

The owner is a process on a host: pid and start time, so that a reused pid is not taken for it. In a Slurm job it is
that job too, in its present slot: id and restart count, so that another host can ask Slurm whether it lives. A live
owner is waited for; a dead one's lock is taken over; an owner on another host and in no job, or in another user's job
that Slurm does not show, cannot be judged from here and is refused. So is, inside an allocation, a live job: GPUs are
not held to wait.
"""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from nemoflow import slurm
from nemoflow.errors import NemoflowError

POLL_SECONDS = 0.5

SLURM_SECONDS = 5
"""Between two questions to Slurm."""

PATIENCE_SECONDS = 300
"""How long a job waits for another job that holds the lock to end, and for Slurm to answer."""


def _process(pid: int) -> dict:
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def _alive(process: dict) -> bool:
    try:
        found = psutil.Process(process["pid"])
        return found.create_time() == process["started"] and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _judged(owner: dict, mine: dict) -> bool | None:
    """Whether the owner of a lock lives; None when nobody here can tell. Raises Unreachable when Slurm is silent."""
    if owner["host"] == mine["host"] and any(map(_alive, owner["processes"])):
        return True
    job = owner.get("job")
    if job is None or job == mine.get("job"):
        return False if owner["host"] == mine["host"] else None
    found = slurm.job(job["id"])
    if found is None and owner.get("user") != mine["user"]:
        return None  # where jobs are private, those of others look like this
    return found is not None and found.live and found.restarts == job["restarts"]


class Writer:
    """The held lock of a directory; `job` is the Slurm job that this process runs in."""

    def __init__(self, path: Path, job: slurm.Job | None = None):
        self._path = path
        self._owner = {"host": platform.node(), "user": os.getuid(), "processes": [_process(os.getpid())]}
        self.slot: dict = {}
        """The Slurm job, its restart count and its nodes, for records; {} outside of one."""
        if job is not None:
            self._owner["job"] = {"id": job.id, "restarts": job.restarts}
            self.slot = {"job": self._owner["job"], "nodes": job.nodes}

    def add_process(self, pid: int) -> None:
        """Name a child as owner too: while it lives, the lock is held, also when this process is killed."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._owner["processes"].append(_process(pid))
            self._write()

    def _write(self) -> None:
        # In place, never renamed: the guard's lock and the content belong to one inode.
        with self._path.open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # no one may read half of it and take it for a crash's
            text = json.dumps(self._owner)
            file.write(text)
            file.truncate(len(text))

    def try_to_take(self) -> dict | None:
        """Take the lock; None when taken, else its live owner.

        Raises NemoflowError for an owner on another host in no job, Unreachable when Slurm must be asked and is silent.
        """
        with self._path.open("a+", encoding="utf-8") as file:
            # Held only for the moment of looking and taking; the kernel drops it when this process dies.
            fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            try:
                owner = json.loads(text) if text else None
            except ValueError:
                owner = None  # the machine went down while it was written
            alive = owner and _judged(owner, self._owner)
            if alive is None and owner:
                raise NemoflowError(
                    f"{self._path}: held by a job on {owner['host']}, which {self._owner['host']} cannot ask; "
                    "if that job is gone, delete this file"
                )
            if alive:
                return owner
            file.seek(0)
            file.truncate()
            file.write(json.dumps(self._owner))
            file.flush()
            os.fsync(file.fileno())
        return None

    def release(self) -> None:
        with contextlib.suppress(OSError), self._path.open("w"):
            pass  # emptied, not deleted: someone may be waiting on this very file


def holder(directory: Path) -> slurm.Job | None:
    """The live Slurm job that works in the directory, whoever's it is; None when no job does.

    Raises Unreachable when Slurm is silent.
    """
    try:
        owner = json.loads((directory / "lock").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    found = slurm.job(owner["job"]["id"]) if "job" in owner else None
    return found if found is not None and found.live else None


@contextlib.contextmanager
def writer(directory: Path, waiting: Callable[[str], None]) -> Iterator[Writer]:
    """Hold the directory's lock; wait while another job works there, saying so once through `waiting`.

    Raises NemoflowError for an owner that nobody here can judge, and in a Slurm job for one that does not end.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    job = _patiently(slurm.here, waiting, begun)
    held = Writer(directory / "lock", job)
    told = False
    while (owner := _patiently(held.try_to_take, waiting, begun)) is not None:
        other = owner.get("job")
        if job and other and time.monotonic() - begun > PATIENCE_SECONDS:
            raise NemoflowError(
                f"{directory}: Slurm job {other['id']} is working on this, and job {job.id} does not hold its nodes to "
                "wait for it; the same command waits outside of any job"
            )
        if not told:
            alive = next(filter(_alive, owner["processes"]), owner["processes"][0])
            who = f"Slurm job {other['id']}" if other else f"process {alive['pid']}"
            waiting(f"another run is working on this ({who}); waiting for it")
            told = True
        time.sleep(SLURM_SECONDS if other else POLL_SECONDS)
    try:
        yield held
    finally:
        held.release()


def _patiently(ask: Callable, waiting: Callable[[str], None], begun: float):
    """What `ask` answers, once Slurm does; raises its Unreachable after some minutes."""
    told = False
    while True:
        try:
            return ask()
        except slurm.Unreachable as error:
            if time.monotonic() - begun > PATIENCE_SECONDS:
                raise
            if not told:
                waiting(f"{error}; waiting for it")
                told = True
            time.sleep(SLURM_SECONDS)
