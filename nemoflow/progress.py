"""Lines about long work on files: how many, how fast, how long still."""

import threading
import time
from collections.abc import Callable

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


class Progress:
    """Counts files and bytes, from any thread, and shows a line now and then.

    files, size: how many of each there are in all. `show` gets lines such as
    "3/17 files, 1.2 GB of 9.8 GB, 105.3 MB/s, 82 s left".
    """

    def __init__(self, show: Callable[[str], None], files: int, size: int):
        self._show, self._files, self._size = show, files, size
        self._lock = threading.Lock()
        self._done = self._bytes = self._kept = 0
        self._started = self._shown = time.monotonic()

    def add(self, size: int = 0, files: int = 0, kept: bool = False) -> None:
        """Count bytes and files; `kept` ones were there before and say nothing of the speed."""
        with self._lock:
            self._done += files
            self._bytes += size
            self._kept += size if kept else 0
            if (now := time.monotonic()) - self._shown >= EVERY:
                self._shown = now
                self._show(self._line(now))

    def _line(self, now: float) -> str:
        rate = (self._bytes - self._kept) / max(now - self._started, 1e-9)
        left = f", {duration((self._size - self._bytes) / rate)} left" if rate > 0 else ""
        done = f"{self._done}/{self._files} files, {human(self._bytes)} of {human(self._size)}"
        return f"{done}, {rate / 1e6:.1f} MB/s{left}"
