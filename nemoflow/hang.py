"""Trainings that stand still: noticing it by the signs of life they give, and what their processes were doing.

    python3 -m nemoflow.hang REQUEST

prints the stacks of this node's processes that have REQUEST on their command line, by py-spy. It is started on each
node of a job, beside what hangs there.
"""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import psutil

STARTING = 6
"""Times the least patience that a start may take: loading a checkpoint, compiling, the first iteration."""

DUMP_SECONDS = 60


class Pulse:
    """Signs of life of a training: whether it has been still for too long.

    times: of the median iteration. least: seconds, however short iterations are. None as `times`: never.
    """

    def __init__(self, times: float | None, least: float):
        self.times, self.least = times, least
        self.last = time.monotonic()
        self.seconds: deque[float] = deque(maxlen=100)
        self.iteration: int | None = None
        self.longest_save = 0.0

    def beat(self, iteration: int | None = None, saved: float = 0) -> None:
        """It has written something; `iteration`, if it trained one more, `saved`: seconds, if it saved."""
        now = time.monotonic()
        self.longest_save = max(self.longest_save, saved)
        if iteration is not None:
            if self.iteration is not None and iteration > self.iteration:
                self.seconds.append((now - self.last) / (iteration - self.iteration))
            self.iteration = iteration
        self.last = now

    @property
    def limit(self) -> float:
        """Seconds without a sign of life after which it counts as hung."""
        if self.times is None:
            return float("inf")
        if not self.seconds:
            return STARTING * self.least
        # While it saves it says nothing
        return max(self.least, self.times * statistics.median(self.seconds), 5 * self.longest_save)

    def still(self) -> float | None:
        """Seconds for which it has been still, when that is too long."""
        found = time.monotonic() - self.last
        return found if found > self.limit else None


_HEAD = re.compile(r"^== (?P<node>\S+) process (?P<pid>\d+) \((?P<state>\w+)\)$", re.M)


def suspect(stacks: str) -> str | None:
    """The node of the process that is not where all others are: one that is stopped, or alone with what it does."""
    parts = _HEAD.split(stacks)[1:]
    found = [(parts[i], parts[i + 2], _main_thread(parts[i + 3])) for i in range(0, len(parts), 4)]
    if stopped := [node for node, state, _ in found if state in ("stopped", "zombie", "dead")]:
        return stopped[0]
    common = Counter(frames for _, _, frames in found).most_common()
    if len(common) < 2 or common[0][1] <= len(found) / 2:
        return None
    return next(node for node, _, frames in found if frames != common[0][0])


def _main_thread(dump: str) -> str:
    """The functions in which the main thread is, without line numbers."""
    thread = next((part for part in re.split(r"^Thread ", dump, flags=re.M) if "MainThread" in part), dump)
    return "\n".join(re.findall(r"^    (\S+) \(", thread, re.M))


def command(request: Path, nodes: int, slurm: bool) -> list[str]:
    """The command line that prints the stacks of all processes of a training."""
    own = [sys.executable, "-m", "nemoflow.hang", str(request)]
    step = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    return [*step, "--mpi=none", *own] if slurm else own


def main(request: str) -> None:
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    for process in psutil.process_iter(["pid", "cmdline", "status", "environ", "name"]):
        words = process.info["cmdline"] or []
        at = (process.info["environ"] or {}).get("SLURMD_NODENAME") or platform.node()
        if request not in words or "nemoflow.hang" in words or "srun" in process.info["name"] or at != node:
            continue
        print(f"== {node} process {process.info['pid']} ({process.info['status']})", flush=True)
        spy = Path(sys.executable).with_name("py-spy")
        program = str(spy) if spy.exists() else shutil.which("py-spy")
        if program is None:
            print("py-spy is not installed here", flush=True)
            continue
        # py-spy stops what it looks at, and fails with what is stopped already
        how = ["--nonblocking"] if process.info["status"] == psutil.STATUS_STOPPED else []
        try:
            dump = subprocess.run(
                [program, "dump", *how, "--pid", str(process.info["pid"])],
                capture_output=True,
                text=True,
                timeout=DUMP_SECONDS,
                check=False,
            )
            print(dump.stdout or dump.stderr, flush=True)
        except subprocess.TimeoutExpired:
            print(f"py-spy did not answer within {DUMP_SECONDS} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
