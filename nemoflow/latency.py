"""Shared file systems that show late to one machine what another has written."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

LATE_SECONDS = 120
"""How late at most; `latency-wait` of profiles/slurm."""


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def appears(there: Callable[[], bool], what: Path | str, say: Callable[[str], None] = _tell) -> bool:
    """Whether something is there. In a Slurm job, whose node may not see it yet, it is waited for."""
    if "SLURM_JOB_ID" not in os.environ:
        return there()
    begun, told = time.monotonic(), False
    while not there():
        if time.monotonic() - begun > LATE_SECONDS:
            return False
        if not told:
            say(f"waits for {what}, which the file system does not show yet")
            told = True
        time.sleep(1)
    return True
