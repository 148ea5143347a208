"""What torchrun starts: it becomes the program, once it has seen to it that the program ends with torchrun.

    python -m nemoflow.launch.child PROGRAM ARGUMENT...

A driver that waits too long for torchrun kills it, which would leave the processes training.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the program, to be killed as soon as the parent dies. Never returns."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was said
        sys.exit(1)
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
