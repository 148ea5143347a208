"""One writer: the lock that a stage's directory has while a job works in it.

The owner is a process on a host: pid and start time, so that a reused pid is not taken for it. A live owner is waited
for; a dead one's lock is taken over; an owner on another host cannot be judged from here and is refused.
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

from nemoflow.errors import NemoflowError

POLL_SECONDS = 0.5


def _process(pid: int) -> dict:
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def _alive(process: dict) -> bool:
    try:
        found = psutil.Process(process["pid"])
        return found.create_time() == process["started"] and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Writer:
    """The held lock of a directory."""

    def __init__(self, path: Path):
        self._path = path
        self._owner = {"host": platform.node(), "processes": [_process(os.getpid())]}

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
        """Take the lock; None when taken, else its live owner. Raises NemoflowError for an owner on another host."""
        with self._path.open("a+", encoding="utf-8") as file:
            # Held only for the moment of looking and taking; the kernel drops it when this process dies.
            fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            try:
                owner = json.loads(text) if text else None
            except ValueError:
                owner = None  # the machine went down while it was written
            if owner and owner["host"] != self._owner["host"]:
                raise NemoflowError(
                    f"{self._path}: held by a job on {owner['host']}, which {self._owner['host']} cannot ask; "
                    "if that job is gone, delete this file"
                )
            if owner and any(map(_alive, owner["processes"])):
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


@contextlib.contextmanager
def writer(directory: Path, waiting: Callable[[str], None]) -> Iterator[Writer]:
    """Hold the directory's lock; wait while another job works there, saying so once through `waiting`."""
    directory.mkdir(parents=True, exist_ok=True)
    held = Writer(directory / "lock")
    told = False
    while (owner := held.try_to_take()) is not None:
        if not told:
            alive = next(filter(_alive, owner["processes"]), owner["processes"][0])
            waiting(f"another run is working on this (process {alive['pid']}); waiting for it")
            told = True
        time.sleep(POLL_SECONDS)
    try:
        yield held
    finally:
        held.release()
