"""One program as as many processes as a stage asks for, on this machine: a process for each GPU.

`command` gives the command line that does it: the program itself, or torchrun around it. `reason` reads from torchrun's
output which process failed first, and why.

    python -m nemoflow.launch PROGRAM ARGUMENT...

is what torchrun starts: it becomes the program, once it has seen to it that the program ends with torchrun, however
that ends. A driver that waits too long for torchrun kills it, which would leave the processes training.
"""

import ctypes
import os
import re
import signal
import sys
import textwrap

from nemoflow import cpu
from nemoflow.errors import NemoflowError

_PR_SET_PDEATHSIG = 1


def command(program: list[str], resources: dict) -> list[str]:
    """`program` as resources["nodes"] x resources["gpus_per_node"] processes. With the device shim they need no GPUs.

    Raises NemoflowError for more nodes or GPUs than this machine has.
    """
    nodes, processes = resources["nodes"], resources["gpus_per_node"]
    if nodes > 1:
        raise NemoflowError(
            f"resources.nodes: {nodes}: stages run on this machine only, which is one node; "
            f"resources: {{nodes: 1, gpus_per_node: ...}} would be right"
        )
    if not cpu.needed() and processes > (there := _gpus()):
        raise NemoflowError(f"resources.gpus_per_node: {processes}: this machine has {there}")
    if processes == 1:
        return program
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"),
        *("--no-python", sys.executable, "-m", "nemoflow.launch", *program),
    ]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def reason(lines: list[str]) -> str | None:
    """Which process failed first according to torchrun, whose output `lines` ends with, and what it said last.

    None when torchrun reports no failure. Of the others torchrun's own lines say nothing, nor does the end of what all
    processes wrote in turn: those that were waiting for the one that failed complain last.
    """
    starts = [n for n, line in enumerate(lines) if line.startswith("Root Cause (first observed failure)")]
    if not starts:
        return None
    summary = "\n".join(lines[starts[-1] :])
    rank, code = (re.search(pattern, summary) for pattern in (r"rank\s*:\s*(\d+)", r"exitcode\s*:\s*(-?\d+)"))
    if not rank or not code:
        return None
    who = f"process {rank[1]}"
    if int(code[1]) < 0:
        name = signal.Signals(-int(code[1])).name
        return f"{who} was killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    prefix = f"[rank{rank[1]}]: "  # what PyTorch puts before a traceback once the processes know each other
    own = [line.removeprefix(prefix) for line in lines[: starts[-1]] if line.startswith(prefix)]
    last = next((line for line in reversed(own) if line.strip()), None)
    if last is None:
        # It failed before, and none waited for it: its traceback's last line is not indented, and names an exception.
        own = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        last = next((line for line in own if not line.startswith("torch.distributed.elastic.")), None)
    return textwrap.shorten(f"{who} failed: {last}", 300) if last else f"{who} failed with exit code {code[1]}"


def main(arguments: list[str]) -> None:
    """Become the program, to be killed as soon as the parent dies. Never returns."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was said
        sys.exit(1)
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
