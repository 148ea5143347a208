"""A work directory with a demo recipe, driven through the real `snakemake` command, for tests of the graph."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import yaml

from nemoflow.session import Session

BASE = Path(__file__).resolve().parents[1]
CHECKOUT = ("Snakefile", "rules", "scripts", "nemoflow", "config", "profiles")
"""What Snakemake and the jobs read of a checkout."""

DATA = ("source", "tokenizer", "shards", "merge", "blend", "index", "chats", "prompts")
STAGES = {*DATA, "pretrain", "sft", "rl", "hf_export"}

DEMO = """\
description: a chain of sleeps
tokenizer: {train_on: [words, sums], vocab_size: 280}
sources:
  words: {files: "raw/*.jsonl", format: jsonl}
  lines: {files: raw/lines/*, format: jsonl, field: line}
  sums: {generator: arithmetic_chats, shards: 2, args: {count: 60}}
  problems: {generator: arithmetic_rl, shards: 2, args: {count: 20}}
held_out: {valid: 300, test: 300, cap: 1/5}
overrides:
  sleep_engine: {optimizer.lr: 0.001, train.global_batch_size: 2}
stages:
  - name: phase1
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    data: {blend: {words: 1}}
    until: 20
    milestones: [10]
    horizon: 60
    save_interval: 5
  - name: phase2
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    init: {from: phase1, carry: all}
    data: {blend: {words: 1/2, lines: 1/2}}
    until: 40
    horizon: 60
    save_interval: 5
  - name: sft
    kind: sft
    engine: sleep_engine
    function: toys.toy_sft_config
    init: {from: phase2, carry: weights}
    data: {chats: {sums: 1}, pack_size: 128}
    until: 12
    horizon: 30
    save_interval: 4
  - name: rl
    kind: rl
    engine: sleep_engine
    algorithm: grpo
    init: {from: sft, carry: weights}
    data: {prompts: [problems]}
    until: 8
    horizon: 16
    save_interval: 4
"""


def write_demo(path: Path) -> None:
    """The demo's recipe and raw texts, not locked yet."""
    (path / "config/recipes").mkdir(parents=True)
    (path / "config/recipes/demo.yaml").write_text(DEMO)
    (path / "raw/lines").mkdir(parents=True)
    for part in range(2):
        lines = (f"line {i} of part {part}: cat number {i * 7 % 13} sat on mat {i * 5 % 11}. " * 4 for i in range(60))
        (path / f"raw/{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    lines = (f"every line is a document, and this is {i}" for i in range(90))
    (path / "raw/lines/all.jsonl").write_text("".join(json.dumps({"line": line}) + "\n" for line in lines))


class Work:
    """A directory that Snakemake runs in; `checkout` holds the workflow."""

    def __init__(self, path: Path, checkout: Path = BASE):
        self.path, self.checkout = path, checkout

    @classmethod
    def new(cls, path: Path, checkout: Path = BASE) -> "Work":
        """Raw texts and the locked recipe `demo`, nothing made yet."""
        work = cls(path, checkout)
        write_demo(path)
        work.nemoflow("lock", "demo", check=True)
        return work

    def copy(self, path: Path) -> "Work":
        """The same by `cp -r`: new time stamps, links as links."""
        subprocess.run(["cp", "-r", str(self.path), str(path)], check=True)
        return Work(path, self.checkout)

    # -- recipes -----------------------------------------------------------------------------------------------------

    def recipe(self, name: str = "demo") -> Path:
        return self.path / f"config/recipes/{name}.yaml"

    def edit(self, change: Callable[[dict], None], name: str = "demo") -> None:
        """Change a recipe's data in place; `change` finds the stages by name under "stages"."""
        data = yaml.safe_load(self.recipe(name).read_text())
        data["stages"] = {stage["name"]: stage for stage in data.get("stages", [])}
        change(data)
        data["stages"] = list(data["stages"].values())
        self.recipe(name).write_text(yaml.safe_dump(data, sort_keys=False))

    def set(self, stage: str, **settings) -> None:
        """Settings of a stage of `demo`; `overrides` are added to those it has."""

        def change(data):
            overrides = data["stages"][stage].get("overrides", {}) | settings.pop("overrides", {})
            data["stages"][stage] |= settings | ({"overrides": overrides} if overrides else {})

        self.edit(change)

    # -- running -----------------------------------------------------------------------------------------------------

    def _command(self, *args: str) -> dict:
        snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(self.checkout / "Snakefile")]
        environment = os.environ | {"PYTHONPATH": str(BASE / "tests"), "PYTHONDONTWRITEBYTECODE": "1"}
        return {"args": [*snakemake, *args], "cwd": self.path, "env": environment}

    def start(self, *args: str) -> subprocess.Popen:
        """snakemake in a process group of its own, not waited for; its output is in one stream."""
        return subprocess.Popen(
            **self._command(*args),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell starts its background jobs with interrupts ignored, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def snakemake(self, *args: str) -> subprocess.CompletedProcess:
        """snakemake with these arguments; stdout and stderr in one text."""
        return subprocess.run(
            **self._command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )

    def run(self, *targets: str) -> str:
        """What snakemake printed, having succeeded; then every name among the targets shows today's artifact."""
        done = self.snakemake(*targets)
        assert done.returncode == 0, done.stdout
        self.check_today(*(t for t in targets if not t.startswith("-") and not t.startswith("artifacts/")))
        return done.stdout

    def refused(self, *args: str) -> str:
        """The one message with which snakemake refused; fails when it printed a traceback or several messages."""
        done = self.snakemake(*args)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        messages = re.findall(r"^nemoflow: error: (.*)$", done.stdout, re.M)
        assert len(messages) == 1, done.stdout
        return messages[0]

    def planned(self, *args: str) -> Counter:
        """Rule -> jobs that `snakemake -n` would run, from its own table."""
        done = self.snakemake("-n", "--quiet", "host", "--", *args)
        assert done.returncode == 0, done.stdout
        table = re.search(r"^job +count\n[- ]+\n((?:\w+ +\d+\n)+)", done.stdout, re.M)
        if table is None:
            assert "Nothing to be done" in done.stdout, done.stdout
            return Counter()
        jobs = Counter({rule: int(count) for rule, count in re.findall(r"(\w+) +(\d+)", table[1])})
        del jobs["total"]
        return jobs

    def nemoflow(self, *args: str, check: bool = False) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.checkout), str(BASE / "tests")])}
        command = [sys.executable, "-c", "from nemoflow.cli import main; main()", *args]
        return subprocess.run(
            command, cwd=self.path, env=environment, check=check, text=True, capture_output=True, timeout=60
        )

    # -- looking -----------------------------------------------------------------------------------------------------

    def check_today(self, *names: str) -> None:
        """Fail unless each name shows a finished artifact whose payload is what today's recipe says."""
        before = Path.cwd()
        os.chdir(self.path)
        try:
            session = Session("artifacts", [Path("config/recipes")])
            session.resolve(names)
            assert len(session.names) == len(names)
            for name, view in session.names.items():
                for sub, target in view.items():
                    record = json.loads((Path(name) / sub / "artifact.json").read_text())
                    assert record["payload"] == target.stage.payload
                    assert record.get("at") == target.at
        finally:
            os.chdir(before)

    def attempts(self) -> dict[str, int]:
        """Directory of each artifact or trajectory -> attempts made at it."""
        return {
            p.parent.relative_to(self.path / "artifacts").as_posix(): len(json.loads(p.read_text())["attempts"])
            for p in sorted((self.path / "artifacts").glob("*/*/run.json"))
        }

    def sealed(self) -> dict[str, str]:
        """Every sealed record, by path."""
        return {str(p.relative_to(self.path)): p.read_text() for p in (self.path / "artifacts").rglob("sealed.json")}

    def links(self, name: str) -> list[str]:
        """What a name that is a directory of links holds."""
        return sorted(p.name for p in (self.path / name).iterdir() if p.is_symlink())

    def trajectory(self, name: str) -> Path:
        """The run directory behind the name of a trained state."""
        return (self.path / name).resolve().parent

    def iterations(self, trajectory: Path) -> list[int]:
        """The iterations that were trained, in the order they were."""
        file = trajectory / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line["iteration"] for line in found if "loss" in line]

    def wait_for(self, kind: str, iteration: int, seconds: float = 60) -> Path:
        """Wait until a running trajectory of `kind` has trained `iteration`; returns its directory."""
        for _ in range(int(seconds / 0.05)):
            for trajectory in (self.path / f"artifacts/{kind}").glob("*"):
                lock = trajectory / "lock"
                if iteration in self.iterations(trajectory) and lock.read_text():
                    return trajectory
            time.sleep(0.05)
        raise AssertionError(f"no {kind} came to iteration {iteration} in {seconds} s")

    def owners(self, trajectory: Path) -> list[psutil.Process]:
        """The processes that hold a trajectory's lock: the driver and, once it runs, the trainer."""
        return [psutil.Process(p["pid"]) for p in json.loads((trajectory / "lock").read_text())["processes"]]

    def state(self) -> dict[str, bytes]:
        """Every file below artifacts and the names, to compare before and after."""
        roots = [p for p in self.path.iterdir() if p.name in {"artifacts", *STAGES, "data"}]
        found = {}
        for root in roots:
            for path in root.rglob("*"):
                if path.is_symlink():
                    found[str(path)] = str(path.readlink()).encode()
                elif path.is_file():
                    found[str(path)] = path.read_bytes()
        return found


@contextlib.contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """A process that stands still, but lives; it goes on afterwards, also when the test fails."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def read_until(process: subprocess.Popen, text: str) -> None:
    """Read a started run's output until it has said `text`; fails when it ends without."""
    said = ""
    while line := process.stdout.readline():
        said += line
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said:\n{said}")


def kill(process: subprocess.Popen) -> None:
    """kill -9 of the whole process group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_checkout(path: Path) -> Path:
    """A checkout of its own, to change."""
    path.mkdir()
    for name in CHECKOUT:
        source = BASE / name
        if source.is_dir():
            shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, path / name)
    return path
