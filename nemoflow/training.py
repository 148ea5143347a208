"""The driver of a trajectory: resume or start the trainer, show its progress, seal the states it reached.

The trainer is a child process that an engine's `command` starts with a request file. The driver never trusts its exit
code: a state is reached when its checkpoint is complete, and it is done when it is sealed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from nemoflow import hang, kinds, launch, slurm, strip
from nemoflow.engines import engine
from nemoflow.errors import UNFINISHED_PREFIX, Died, NemoflowError, Unfinished
from nemoflow.job import Job
from nemoflow.progress import human, seconds
from nemoflow.store import STRIPPED, dump, seal
from nemoflow.store import write_atomically as write

POLL_SECONDS = 0.2
GUARD = {"spike": "3", "patience": 20, "hang": "20", "hang_least": "10m"}
"""What a recipe's `guard` says by default, for who runs a stage without one."""

STACKS_SECONDS = 300
"""For the stacks of all processes of a training that hangs."""

SHOW_SECONDS = 10
"""At most one progress line in this time."""

ERROR_PREFIX = "nemoflow: error: "
"""How a trainer marks the one line that says what went wrong."""


def metrics(path: Path) -> dict[int, dict]:
    """Iteration -> its measurements. Lines written again after a resume supersede the earlier ones."""
    found: dict[int, dict] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break  # being written, or cut off by a kill
                entry = json.loads(line)
                found[entry["iteration"]] = found.get(entry["iteration"], {}) | entry
    return found


def measures(found: dict[int, dict], start: int, at: int) -> dict:
    """What a state at iteration `at` measures: tokens, first and last losses or rewards.

    `reward_first` and `reward`, and so each `rewards` of an environment and the `accuracy` of preferences, are means
    over the first and the last tenth of the steps so far. `skipped`: answers that no environment could judge.
    """
    steps = [found[n] for n in sorted(found) if start <= n <= at]
    trained = [s for s in steps if "loss" in s]
    result: dict = {"iterations": at - start}
    if trained:
        result["loss"] = trained[-1]["loss"]
        if "tokens" in trained[-1]:
            result["tokens"] = trained[-1]["tokens"]
    if valid := [s["valid_loss"] for s in steps if "valid_loss" in s]:
        result |= {"valid_loss_first": valid[0], "valid_loss": valid[-1]}
    if by_source := [s["valid_losses"] for s in steps if "valid_losses" in s]:
        result["valid_losses"] = by_source[-1]
    for name in ("reward", "accuracy"):
        if values := [s[name] for s in steps if s.get(name) is not None]:
            first, last = tenths(values)
            result |= {f"{name}_first": first, name: last}
    if agents := sorted({agent for s in steps for agent in s.get("rewards", ())}):
        each = {a: tenths([s["rewards"][a] for s in steps if a in s.get("rewards", ())]) for a in agents}
        result["rewards_first"] = {agent: first for agent, (first, _) in each.items()}
        result["rewards"] = {agent: last for agent, (_, last) in each.items()}
    if skipped := [s["skipped"] for s in steps if "skipped" in s]:
        result["skipped"] = {agent: sum(s.get(agent, 0) for s in skipped) for agent in sorted(set().union(*skipped))}
    if validation := [s["validation"] for s in steps if "validation" in s]:
        result["validation"] = validation[-1]
    return result


def tenths(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    count = max(1, len(values) // 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count


class Trajectory:
    """A training stage's run directory, with the lock held."""

    def __init__(self, job: Job):
        self.job, self.stage, self.directory = job, job.stage, job.stage.directory
        self.payload = job.stage.payload
        self.engine = engine(self.payload["engine"])
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = self.directory / "metrics.jsonl"
        self.stop_file = self.directory / "stop"
        """Made by a person, or on SIGUSR1 by this process: the trainer saves and leaves."""
        init = self.payload.get("init", {})
        self.start = init.get("at", 0) if init.get("carry") == "all" else 0

    def wanted(self) -> list[int]:
        """The states that any recipe ever asked for, and the one this job is for."""
        asked = {int(p.name) for p in (self.directory / "wanted").glob("*") if p.name.isdigit()}
        return sorted(asked | {self.job.at})

    def request(self) -> dict:
        """What the trainer is told; every path absolute."""
        payload, launch = self.payload, self.job.launch
        guard = GUARD | launch.get("guard", {})
        data = self.job.input("data").resolve()
        request = {
            "kind": payload["kind"],
            "function": payload.get("function"),
            "arguments": payload.get("arguments", {}),
            "hf_config": payload.get("hf_config"),
            "peft": payload.get("peft"),
            "algorithm": payload.get("algorithm"),
            "overrides": payload.get("overrides", {}) | launch.get("overrides", {}),
            "tokenizer": str(self.job.input("tokenizer").resolve()),
            "init": None,
            "start": self.start,
            "stream": payload.get("stream"),
            "schedule_batch": payload.get("schedule_batch"),
            "skip": payload.get("skip", 0),
            "horizon": payload["horizon"],
            "stop": self.job.at,
            "wanted": self.wanted(),
            "wanted_directory": str((self.directory / "wanted").resolve()),
            "save_interval": launch.get("save_interval") or payload["horizon"],
            "checkpoints": str(self.checkpoints.resolve()),
            "scratch": str((self.directory / "scratch").resolve()),
            "metrics": str(self.metrics.resolve()),
            "config": str((self.directory / "config").resolve()),
            "resolved": str(self.job.log.with_suffix(".config.yaml").resolve()),
            "resources": launch.get("resources", {"nodes": 1, "gpus_per_node": 1, "gpu": None}),
            "keep": launch.get("keep", {"last": 2, "every": None}),
            "guard": guard | {"spike": float(Fraction(guard["spike"])) if guard["spike"] else None},
            "stop_file": str(self.stop_file.resolve()),
            "deadline": deadline(),
        }
        match payload["kind"]:
            case "pretrain":
                request["data"] = {
                    "blend": str((data / "blend").resolve()),
                    "cache": str(data / "cache"),
                    "samples": self.job.stage.store.load(payload["data"]).payload["samples"],
                }
            case "sft":
                packed = kinds.complete(self.job.stage.store.load(payload["data"]).payload)
                valid = data / "validation.idx.parquet"
                request["data"] = {
                    "train": str(data / "training.idx.parquet"),
                    "valid": str(valid) if valid.exists() else None,
                    "pack_size": packed["pack_size"],
                    "pad_multiple": packed["pad_multiple"],
                }
            case "rl":
                kind = self.job.stage.store.load(payload["data"]).payload["kind"]
                request[kind] = str(data)  # prompts or preferences
                request["environments"] = payload.get("environments", {})
        if state := self.job.input("init"):
            init = payload["init"]
            request["init"] = {
                "checkpoint": str((state / "checkpoint").resolve()),
                "at": init.get("at", 0),
                "carry": init["carry"],
            }
        for role in ("model", "teacher"):
            if export := self.job.input(role):
                request[role] = str(export.resolve())
        if model := payload.get("init", {}).get("export"):
            of = self.stage.store.load(model).payload["of"]
            state = self.stage.store.load(of["trajectory"]).state(of.get("at"))
            request["model_checkpoint"] = str((state / "checkpoint").resolve())
        return request

    def seal(self) -> None:
        """Seal every wanted state whose checkpoint is complete, up to the one asked for."""
        complete = self.engine.states(self.checkpoints)
        found = metrics(self.metrics)
        for n in self.wanted():
            directory = self.stage.state(n)
            if n not in complete or (directory / "sealed.json").exists():
                continue
            directory.mkdir(parents=True, exist_ok=True)
            link = directory / "checkpoint"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(complete[n], directory))
            files = [
                {"name": f"checkpoint/{p.relative_to(complete[n]).as_posix()}", "size": p.stat().st_size}
                for p in sorted(complete[n].rglob("*"))
                if p.is_file()
            ]
            seal(self.stage, n, measures(found, self.start, n), files)

    def check_room(self, complete: dict[int, Path]) -> None:
        """Raise NemoflowError unless there is room for two checkpoints, or for one beside two; before a GPU is used.

        They will be as large as the newest one, or as that of the init whose optimizer is carried on. Where neither is
        there, the trainer estimates them from its parameters.
        """
        state = self.job.input("init")
        if complete:
            known = complete[max(complete)]
        elif state and self.payload["init"]["carry"] != "weights":
            known = (state / "checkpoint").resolve()
        else:
            return
        count = 1 if len(complete) >= 2 else 2
        needed = count * sum(p.stat().st_size for p in known.rglob("*") if p.is_file())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise NemoflowError(
                f"{self.checkpoints}: no space left for {('a checkpoint', 'two checkpoints')[count - 1]}: "
                f"{human(needed)} are needed and {human(free)} free; free some and run again"
            )

    def train(self) -> None:
        """Run the trainer until the wanted state's checkpoint is complete.

        Raises Unfinished when it left in time to be gone on with, NemoflowError when it failed.
        """
        job, at = self.job, self.job.at
        complete = self.engine.states(self.checkpoints)
        if at in complete:
            return
        reached = max(complete, default=self.start)
        strip.check(self.checkpoints, reached)
        init = job.input("init")
        if init and self.payload["init"]["carry"] != "weights" and (init / "checkpoint" / STRIPPED).exists():
            raise NemoflowError(
                f"{init}: its optimizer was deleted by `nemoflow gc --optimizer`; write carry: weights, or train it "
                "anew by raising its `version:`"
            )
        if reached > at:
            kept = sorted(n for n in complete if n > self.start)
            raise NemoflowError(
                f"until: {at}: this trajectory has passed it, at {reached}, and kept {', '.join(map(str, kept))}; "
                "choose one of these, or raise the stage's `version:` to train it anew"
            )
        job.check_inputs()
        self.checkpoints.mkdir(exist_ok=True)
        self.check_room(complete)
        self.stop_file.unlink(missing_ok=True)  # it was for the run before
        request = self.directory / "request.json"
        asked = self.request()
        write(request, dump(asked))
        span = f"iteration {reached} of {at}"
        job.say(f"{'resumes at ' if complete else 'starts at '}{span}; log {job.log}")
        form = getattr(self.engine, "FORM", None)
        started = launch.launch(
            self.engine.command(request.resolve()),
            asked["resources"],
            job.launch.get("cluster", launch.HERE),
            form,
            self.directory / form if form else None,
        )
        code = self._run(started, reached)
        if at in self.engine.states(self.checkpoints):
            return
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if code == 0:
            left = [line.removeprefix(UNFINISHED_PREFIX) for line in lines if line.startswith(UNFINISHED_PREFIX)]
            if left:
                raise Unfinished(f"stopped at {left[-1]}; the same command goes on")
            raise Died(f"the trainer ended without error before iteration {at}, and without its checkpoint")
        why = reason(lines, "the trainer") or f"the trainer failed with exit code {code}"
        raise (NemoflowError if any(line.startswith(ERROR_PREFIX) for line in lines) else Died)(why)

    def _run(self, started: launch.Launch, reached: int) -> int:
        """The exit code of the trainer; it dies with this process, on an interrupt too."""
        print("$", started, flush=True)
        self.job.record(launched=str(started))
        child = subprocess.Popen(started.command, env=environment() | started.environment)
        self.job.held.add_process(child.pid)
        with ending(child), asking(self.stop_file):
            progress = _Progress(self, reached)
            while (code := child.poll()) is None:
                time.sleep(POLL_SECONDS)
                progress.show()
                if (still := progress.pulse.still()) is not None:
                    raise self._hung(still)
            return code

    def _hung(self, still: float) -> Died:
        """What to say of a training that stands still, having written down what its processes do."""
        job, resources = self.job, self.job.launch.get("resources", {})
        on_slurm = job.launch.get("cluster", launch.HERE)["launcher"] == "slurm"
        nodes = len(found.nodes) if on_slurm and (found := slurm.here()) else resources.get("nodes", 1)
        command = hang.command((self.directory / "request.json").resolve(), nodes, on_slurm)
        path = job.log.with_suffix(".stacks.txt")
        try:
            with path.open("w", encoding="utf-8") as file:
                subprocess.run(
                    command,
                    env=environment(),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=STACKS_SECONDS,
                )
        except subprocess.TimeoutExpired:
            print("the stacks of some processes could not be read in time", flush=True)
        node = hang.suspect(path.read_text(encoding="utf-8", errors="replace"))
        job.entry["suspect"] = node
        before = [a.get("suspect") for a in job.attempts[:-1] if a.get("outcome") == "hung"]
        again = node is not None and node in before
        where = f"; {node} is where it hangs{', again' if again else ''}" if node else ""
        return Died(
            f"hung: no sign of life for {still:.0f} s{where}; what its processes did: {path}",
            "hung",
            (node,) if again else (),
        )


def environment() -> dict[str, str]:
    """The environment of an engine's program: it finds this nemoflow, and its output is not held back."""
    checkout = str(Path(__file__).resolve().parents[1])  # jobs in containers have no nemoflow installed
    path = os.pathsep.join(p for p in (checkout, os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def ending(child: subprocess.Popen) -> Iterator[None]:
    """End the child when this process is told to end."""

    def stop(number, _frame):
        child.terminate()
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def asking(stop_file: Path) -> Iterator[None]:
    """On SIGUSR1 ask the trainer to save and leave, as before a preemption, and wait for it.

    By a file: torchrun dies of that signal, and leaves its children behind.
    """
    before = signal.signal(signal.SIGUSR1, lambda *_: stop_file.touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def deadline() -> float | None:
    """When this job is ended from outside, in seconds since the epoch: NEMOFLOW_DEADLINE, else what Slurm says."""
    if not os.environ.get("NEMOFLOW_DEADLINE") and (job := slurm.here()):
        return job.end
    for name in ("NEMOFLOW_DEADLINE", "SLURM_JOB_END_TIME"):
        if value := os.environ.get(name):
            try:
                return float(value)
            except ValueError:
                raise NemoflowError(f"{name}: {value}: must be in seconds since the epoch") from None
    return None


class _Progress:
    """Follows metrics.jsonl, and says now and then where the training is and how long it will take."""

    def __init__(self, trajectory: Trajectory, reached: int):
        self.job, self.path = trajectory.job, trajectory.metrics
        self.first = self.seen = reached
        self.position = self.path.stat().st_size if self.path.exists() else 0
        self.begun: float | None = None
        self.shown = time.monotonic()
        guard = GUARD | trajectory.job.launch.get("guard", {})
        times = guard["hang"]
        self.pulse = hang.Pulse(times and float(Fraction(times)), seconds(guard["hang_least"]))

    def show(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.position:  # a trainer that resumes drops the lines past its checkpoint
            self.position = 0
        with self.path.open("rb") as file:
            file.seek(self.position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        if not whole:
            return
        self.position += len(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        trained = [e for e in entries if "loss" in e or "reward" in e]
        saved = max((e.get("save_seconds", 0) for e in entries), default=0)
        self.pulse.beat(trained[-1]["iteration"] if trained else None, saved)
        if not trained:
            return
        entry, now = trained[-1], time.monotonic()
        self.seen = entry["iteration"]
        if self.begun is None:  # the first iteration carries the start-up cost, so time counts from its end
            self.begun, self.first = now, self.seen
            return
        if now - self.shown < SHOW_SECONDS or self.seen == self.first:
            return
        self.shown = now
        left = (now - self.begun) / (self.seen - self.first) * (self.job.at - self.seen)
        shown = ("loss", "reward", "accuracy")
        values = ", ".join(f"{k} {entry[k]:.3f}" for k in shown if isinstance(entry.get(k), float))
        minutes, seconds = divmod(round(left), 60)
        self.job.say(f"iteration {self.seen} of {self.job.at}, {values}, {minutes}:{seconds:02d} left")


def reason(lines: list[str], program: str) -> str | None:
    """What the engine's program, which wrote `lines`, said went wrong; its last line when it only left a traceback."""
    said = [line for line in lines if line.startswith(ERROR_PREFIX)]
    if said:
        return said[0].removeprefix(ERROR_PREFIX)  # of several processes, the first to fail: the others then follow
    if found := launch.reason(lines):
        return f"{program}: {found}"
    last = next((line for line in reversed(lines) if line.strip() and not line.startswith("$ ")), None)
    return f"{program} failed: {textwrap.shorten(last, 300)}" if last else None


def train(job: Job) -> None:
    """The work of a pretrain, sft or rl job: reach the state, and seal all wanted states up to it."""
    free = shutil.disk_usage(job.stage.directory).free
    if free == 0:
        raise NemoflowError(f"no space left where {job.stage.directory} is; free some and run again")
    trajectory = Trajectory(job)
    try:
        trajectory.train()
    finally:
        trajectory.seal()  # also states passed before a failure
