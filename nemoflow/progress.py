"""Long work on many files: several at a time, with lines that say how many, how fast, how long still."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

EVERY = 10.0
"""Seconds between two lines."""


def human(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 90 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Stopped(Exception):
    """Raised in the threads whose work is no longer wanted."""


class Progress:
    """Counts files and bytes, from any thread, and shows a line now and then.

    files, size: how many files and bytes there are in all; 0 bytes for work that is not measured by them. `show` gets
    lines such as "3/17 files, 1.2 GB of 9.8 GB, 105.3 MB/s, 82 s left".
    """

    def __init__(self, show: Callable[[str], None], files: int, size: int):
        self._show, self._files, self._size = show, files, size
        self._lock = threading.Lock()
        self._done = self._bytes = self._kept = 0
        self._started = self._shown = time.monotonic()
        self._stopped = False

    def stop(self) -> None:
        """Make the next `add`, in whatever thread, end that thread's work."""
        self._stopped = True

    def add(self, size: int = 0, kept: bool = False, files: int = 0) -> None:
        """Count bytes and files; `kept` ones were there before and say nothing of the speed.

        Raises Stopped after `stop`.
        """
        if self._stopped:
            raise Stopped
        with self._lock:
            self._done += files
            self._bytes += size
            self._kept += size if kept else 0
            if (now := time.monotonic()) - self._shown >= EVERY:
                self._shown = now
                self._show(self._line(now))

    def _line(self, now: float) -> str:
        """Work without bytes is measured in files."""
        done, todo = (
            (self._bytes - self._kept, self._size - self._bytes)
            if self._size
            else (self._done, self._files - self._done)
        )
        rate = done / max(now - self._started, 1e-9)
        left = f", {duration(todo / rate)} left" if rate > 0 else ""
        files = f"{self._done:,}/{self._files:,} files"
        if not self._size:
            return files + left
        return f"{files}, {human(self._bytes)} of {human(self._size)}, {rate / 1e6:.1f} MB/s{left}"


def in_threads(work: Callable[..., Any], arguments: Sequence[tuple], threads: int, progress: Progress) -> list:
    """`work(*arguments)` for each tuple of arguments, `threads` at a time; the results in order.

    The first error ends it: the other threads stop when they next tell `progress`, and the error is raised. So does an
    interrupt of this thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, *a) for a in arguments]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            progress.stop()
            pool.shutdown(cancel_futures=True)
    errors = [e for future in futures if not future.cancelled() and (e := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        raise error
    return [future.result() for future in futures]


def seconds(text: str) -> int:
    """The seconds of a time such as 4h, 90m, 30s or 1d12h; 0 for what is none."""
    if not (match := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)):
        return 0
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
