"""What every job does around its work: lock, attempt, log, record, seal.

A job is a program in scripts/ started with a frozen stage. Its own standard output and error go to the artifact's
attempts/N.log, libraries and all; people get one line at a time through `Job.say`.
"""

import argparse
import contextlib
import errno
import importlib.metadata
import inspect
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from nemoflow import kinds, slots, slurm, summary
from nemoflow.data.made import Made
from nemoflow.errors import Died, NemoflowError, Unfinished
from nemoflow.latency import appears
from nemoflow.launch import HERE, identified
from nemoflow.store import (
    Stage,
    Store,
    contents_of,
    dump,
    file_digest,
    publish,
    read_json,
    remove_stale_temporaries,
    seal,
)
from nemoflow.store import write_atomically as write
from nemoflow.writer import Writer, writer

UNFINISHED = 75
"""Exit code of a job that left in time: EX_TEMPFAIL of sysexits.h, try again later."""

REQUEUE_SECONDS = 300
"""How long a job that Slurm is to start again waits to be ended."""

DIGEST_CHECK_BYTES = 2**30
"""Inputs up to this size are read again and compared with their digests before use: about a second. Larger ones are
compared by file sizes; a deep check of those is asked for, not done by the way. Before work on data, which takes no
longer than the check of what it reads, a sixteenth of this."""

_RECORDS = ("artifact.json", "attempts", "launch.json", "lock", "partial", "run.json", "sealed.json")
"""What stands in an artifact's directory besides its contents."""

_PACKAGES = (
    "megatron-bridge",
    "megatron-core",
    "torch",
    "transformers",
    "trl",
    "lm-eval",
    "tokenizers",
    "gigatoken",
    "numpy",
    "pyarrow",
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _revision() -> dict:
    """The checkout's commit, and whether it had changes; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "dirty": bool(changes.strip())}


def _versions() -> dict:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """The name of this machine's GPUs, as their driver has it; CPU where there are none."""
    lines = [line for file in driver.glob("*/information") for line in file.read_text().splitlines()]
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}
    return ", ".join(sorted(models)) or "CPU"


class Job:
    """A stage being worked on, with its lock held; `at` is the wanted state, for trained kinds."""

    def __init__(self, stage: Stage, at: int | None, held: Writer, say: Callable[[str], None], threads: int):
        self.stage, self.at, self.held, self.threads = stage, at, held, threads
        self._say = say
        self.log = Path()
        self.launch: dict = {}
        path = stage.directory / "launch.json"
        if self._appears(path.exists, path):
            self.launch = read_json(path)
        elif held.slot:
            raise NemoflowError(f"{path}: is not there; run snakemake on the name again")

    @property
    def title(self) -> str:
        """What people call it: the recipe's name for it, or its label."""
        return self.launch.get("title") or f"{self.stage.kind} {self.stage.label}"

    def say(self, text: str) -> None:
        """Show one line to the person."""
        self._say(f"{self.title}: {text}")

    def _appears(self, there: Callable[[], bool], what: Path | str) -> bool:
        return appears(there, what, self.say)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Record an attempt in run.json, with its log; NemoflowErrors and surprises end it as failed.

        Unfinished ends it as that: what it did will be gone on with. So will be what was ended from outside, or died.
        """
        directory = self.stage.directory
        run_file = directory / "run.json"
        run = read_json(run_file) if run_file.exists() else {"attempts": []}
        slots.close(self.stage, run["attempts"])
        if self.at is not None and run["attempts"]:
            before = run["attempts"][-1].get("reached", 0)
            self._appears(lambda: slots.reached(self.stage) >= before, f"its checkpoint at {before}")
        number = len(run["attempts"]) + 1
        self.log = directory / "attempts" / f"{number}.log"
        entry = {
            "number": number,
            "started": _now(),
            "command": sys.argv,
            "host": platform.node(),
            "pid": os.getpid(),
            "code": _revision(),
            "versions": _versions(),
            **self._planned(),
            **self.held.slot,
        }
        if image := self.launch.get("cluster", HERE).get("image"):
            entry["image"] = identified(image, self.stage.store.root)
        self.attempts, self.entry = run["attempts"], entry
        run["attempts"].append(entry)
        self.record()
        self.log.parent.mkdir(exist_ok=True)
        begun = time.monotonic()
        try:
            with _output_to(self.log):
                yield
            entry["outcome"] = "done"
        except Unfinished as left:
            entry |= {"outcome": "unfinished", "reason": str(left)}
            raise
        except Died as error:
            entry |= {"outcome": error.outcome, "reason": str(error)}
            entry |= {"exclude": list(error.exclude)} if error.exclude else {}
            raise
        except (SystemExit, KeyboardInterrupt):
            entry |= {"outcome": "ended", "reason": "was told to end"}
            raise
        except BaseException as error:
            entry |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write("".join(traceback.format_exception(error)))
            raise
        finally:
            entry |= {"ended": _now(), "seconds": round(time.monotonic() - begun, 1)}
            if self.at is not None:
                entry["reached"] = slots.reached(self.stage)
            with contextlib.suppress(OSError):  # a full disk must not hide the error that says so
                write(run_file, dump(run))

    def record(self, **more: Any) -> None:
        """Say `more` of the present attempt in run.json, at once: the process may be killed."""
        self.entry |= more
        write(self.stage.directory / "run.json", dump({"attempts": self.attempts}))

    def _planned(self) -> dict:
        """Of a training: the state it is for, the iteration it starts from, the GPUs (or processes) it holds, which."""
        if self.at is None:
            return {}
        resources = self.launch.get("resources", {})
        gpus = resources.get("nodes", 1) * resources.get("gpus_per_node", 1)
        return {"at": self.at, "from": slots.reached(self.stage), "gpus": gpus, "device": device()}

    def input(self, role: str) -> Path | None:
        """The directory of the input with this role; None when the stage has none."""
        return next(iter(self.inputs().get(role, [])), None)

    def inputs(self) -> dict[str, list[Path]]:
        """Role -> directories of the finished input artifacts."""
        found: dict[str, list[Path]] = {}
        for ref in kinds.inputs(self.stage.payload):
            found.setdefault(ref.role, []).append(self.stage.store.load(ref.identity).state(ref.at))
        return found

    def check_inputs(self) -> None:
        """Compare the inputs with what was sealed. Raises NemoflowError naming the file that is missing or differs."""
        for stage, at in self.stage.reads():
            directory = stage.state(at)
            if not self._appears((directory / "sealed.json").exists, directory / "sealed.json"):
                raise NemoflowError(f"{directory}: is not finished (no sealed.json); run snakemake on the name again")
            contents = contents_of(directory, read_json(directory / "sealed.json"))
            if stage.kind == "source" and self.stage.kind == "shards":
                # A source may have ten thousand files, of which each of its hundred jobs reads a few.
                own = {unit[0] for shard in self.stage.payload["shards"] for unit in shard}
                contents = [entry for entry in contents if int(Path(entry["name"]).name.partition(".")[0]) in own]
            limit = DIGEST_CHECK_BYTES if self.stage.trained else DIGEST_CHECK_BYTES // 16
            deep = sum(c["size"] for c in contents) <= limit
            for entry in contents:
                path = directory / entry["name"]
                self._appears(path.exists, path)
                size = path.stat().st_size if path.exists() else None
                wrong = (
                    "is missing"
                    if size is None
                    else f"has {size} bytes, sealed with {entry['size']}"
                    if size != entry["size"]
                    else "has other bytes than it was sealed with"
                    if deep and any(file_digest(path, a) != entry[a] for a in ("sha256", "blake3") if a in entry)
                    else None
                )
                if wrong:
                    raise NemoflowError(
                        f"{path}: {wrong}; restore it, or delete {directory} to have this artifact made again"
                    )


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send this process's standard output and error, and its children's, to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip(saved, (1, 2), strict=True):
            os.dup2(number, descriptor)
            os.close(number)


def contents(directory: Path) -> list[dict]:
    """Every file below `directory`: name, size in bytes, sha256; sorted by name."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return [
        {"name": p.relative_to(directory).as_posix(), "size": p.stat().st_size, "sha256": file_digest(p)} for p in files
    ]


def _contents_of(directory: Path) -> list[Path]:
    """What an artifact's directory holds besides the records around it."""
    return [p for p in directory.iterdir() if p.name not in _RECORDS and not p.name.startswith(".")]


def build(program: ModuleType) -> Callable[[Job], None]:
    """The work of a job of a flat kind: the program's `make` writes into a directory, which is taken over and sealed.

    make(payload, inputs, out, progress) returns the artifact's measures, or `Made`; `inputs` maps a role to a
    directory, or to a list of them where the role is in the plural. It may have further parameters: `records`, the
    sealed records of the inputs, role -> list; `lineage`, the
    sealed records of all ancestors, inputs before what consumes them; `attempts`, identity -> those of run.json, of all
    trained ancestors; `launch`, what stands outside the identity; `threads`, how many processors it may use.

    `out` is empty, unless the program says RESUMES = True: then it holds what an interrupted attempt finished.
    """
    make, resumes = program.make, getattr(program, "RESUMES", False)

    def work(job: Job) -> None:
        stage, partial = job.stage, job.stage.directory / "partial"
        job.check_inputs()
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        if resumes:
            for path in _contents_of(stage.directory):  # an attempt died between taking them over and sealing
                path.replace(partial / path.name)
        inputs = {role: paths if role.endswith("s") else paths[0] for role, paths in job.inputs().items()}
        if "paths" in job.launch:
            inputs["files"] = [Path(p) for p in job.launch["paths"]]
        offered = {
            "launch": lambda: job.launch,
            "threads": lambda: job.threads,
            "records": lambda: {
                role: [read_json(path / "sealed.json") for path in paths] for role, paths in job.inputs().items()
            },
            "lineage": lambda: [
                s.sealed(n) for s, n in stage.store.ancestors(stage.identity) if s.identity != stage.identity
            ],
            "attempts": lambda: {
                s.identity: read_json(run)["attempts"]
                for s, _ in stage.store.ancestors(stage.identity)
                if s.trained and (run := s.directory / "run.json").exists()
            },
        }
        more = {key: offered[key]() for key in offered.keys() & inspect.signature(make).parameters.keys()}
        try:
            made = make(kinds.complete(stage.payload), inputs, partial, job.say, **more)
            if not isinstance(made, Made):
                made = Made(made, contents(partial))
        except BaseException:
            if not resumes:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
            raise
        for path in sorted(partial.iterdir()):
            target = stage.directory / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)  # left by an attempt that died before it sealed
            path.replace(target)
        partial.rmdir()
        seal(stage, None, made.measures, made.contents)

    return work


def run(work: Callable[[Job], None], description: str, argv: list[str] | None = None) -> None:
    """The main function of every script: do `work` for the frozen stage of the command line, once.

    Exits 0 when the artifact is sealed, whoever sealed it; UNFINISHED when the same command goes on; 1 after one clear
    message. Never returns half-done work.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--stage", type=Path, required=True, help="the frozen stage, STORE/.stages/IDENTITY.json")
    parser.add_argument("--at", type=int, help="the state wanted, for pretrain, sft and rl")
    parser.add_argument("--threads", type=int, default=1, help="processors the job may use")
    parser.add_argument("--log", type=Path, help="where a short copy of the newest attempt's log goes")
    args = parser.parse_args(argv)
    terminal = os.dup(2)

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(terminal, (text + "\n").encode())

    job = None
    try:
        stage = Store(args.stage.parent.parent).load(args.stage.stem)
        if stage.trained != (args.at is not None):
            raise NemoflowError(f"--at: {'is missing' if stage.trained else f'{stage.kind} has no states'}")
        name = f"{stage.kind} {stage.label}"
        with writer(stage.directory, lambda text: say(f"{name}: {text}")) as held:
            job = Job(stage, args.at, held, say, args.threads)
            remove_stale_temporaries(stage.directory)
            if (record := stage.sealed(args.at)) is None:
                begun = time.monotonic()
                with job.attempt():
                    work(job)
                record = stage.sealed(args.at)
                if record is None:
                    raise NemoflowError(f"{stage.state(args.at)}: the job ended without sealing its artifact")
                job.say(f"done in {time.monotonic() - begun:.0f} s: {summary.line(record)}")
            publish(stage.state(args.at))
    except Unfinished as left:
        _go_on(say, job, str(left))
        say(f"nemoflow: {job.title}: {left} (log: {job.log})")
        raise SystemExit(UNFINISHED) from None
    except Died as error:
        _fail(say, job, _go_on(say, job, str(error)) or str(error))
    except NemoflowError as error:
        _fail(say, job, str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _fail(say, job, f"unexpected {type(error).__name__}: {error}")
        _fail(say, job, f"no space left where {error.filename or args.stage.parent.parent} is; free some and run again")
    except KeyboardInterrupt:
        _fail(say, job, "interrupted; the same command goes on from here")
    except Exception as error:
        _fail(say, job, f"unexpected {type(error).__name__}: {error}")
    finally:
        if args.log and job and job.log.is_file():
            with contextlib.suppress(OSError):
                tail = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
                args.log.parent.mkdir(parents=True, exist_ok=True)
                write(args.log, "\n".join([f"the end of {job.log}:", *tail, ""]))


def _go_on(say: Callable[[str], None], job: Job, what: str) -> str | None:
    """In a Slurm job, go on in another slot: have Slurm end this one and start it again. Returns only when it does not,
    with the reason; None outside of Slurm.
    """
    slot = job.held.slot.get("job")
    if slot is None or job.at is None or job.launch.get("cluster", HERE)["launcher"] != "slurm":
        return None
    cap = job.launch.get("resources", {}).get("slots", slots.CAP)
    if why := slots.why_not(job.attempts, slot["id"], cap):
        return why
    try:
        if (found := slurm.here()) is None or found.state not in ("RUNNING", "CONFIGURING"):
            return f"{what}; Slurm job {slot['id']} was ended"  # by a person, just now
        say(f"{job.title}: {what}{slots.GOES_ON}")
        slurm.requeue(slot["id"], job.entry.get("exclude", ()))
    except NemoflowError as error:
        return f"{what}; {error}"
    time.sleep(REQUEUE_SECONDS)  # Slurm ends this process
    return f"{what}; Slurm took the request to start this job again, and did not"


def _fail(say: Callable[[str], None], job: Job | None, message: str) -> None:
    where = f" (log: {job.log})" if job and job.log.is_file() else ""
    say(f"nemoflow: error: {f'{job.title}: ' if job else ''}{message}{where}")
    raise SystemExit(1)
