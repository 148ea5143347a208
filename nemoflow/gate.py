"""What stands between Snakemake and sbatch, in the main process: no job twice, and one outcome for each.

Snakemake's Slurm executor submits whatever the graph asks for and knows only its own jobs. A controller that is started
again, or beside another one, would submit a stage's job once more while the first one waits or runs. So before a
submission the queue is looked at, under a claim that two controllers cannot hold at once:

    the artifact is finished        no job: its record is published
    its job waits or runs           no job: that one is waited for, also where another user or work directory began it
    a job for an earlier state      no job yet: when that one has ended, the queue is looked at again
    else                            sbatch

And when a job is over, what counts is whether its artifact is there. A training that Slurm ended, at its time limit or
with its node, goes on in another slot under the same id if it made progress (nemoflow.slots). Slurm's silence is waited
out.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import psutil

from nemoflow import slots, slurm
from nemoflow.errors import NemoflowError
from nemoflow.slots import GOES_ON
from nemoflow.store import Stage, Store, publish
from nemoflow.writer import holder

PLUGIN, VERSION = "snakemake-executor-plugin-slurm", "2.8.0"
"""Whose methods are wrapped: they are no interface, so another version is refused."""

FIRST_SECONDS, LAST_SECONDS = 2, 30
"""Between two looks at the queue: while something has just happened, and after a while without."""

STALE_SECONDS = 600
"""After this a claim of a controller on another machine counts no more: submitting takes seconds."""

_ENDED_BY_SLURM = ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY", "FAILED")
"""States in which a job's own processes may have had no chance to go on by themselves."""


class _Ended(Exception):
    """This controller is ending: nothing is submitted any more."""


class Gate:
    """The wrapped executor's view of stages and of the queue.

    store: where artifacts are. title: (job of Snakemake) -> what people call it. say: shows one line.
    """

    def __init__(self, store: Store, title: Callable[[Any], str], say: Callable[[str], None]):
        self.store, self.title, self.say = store, title, say
        self.interval = FIRST_SECONDS
        self.silent_since: float | None = None
        self.gone: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.followed: dict[str, Any] = {}
        self.ending = threading.Event()

    # -- before a submission -----------------------------------------------------------------------------------------

    def submit(self, executor: Any, job: Any, submit: Callable[[Any, Any], None]) -> None:
        """Submit `job`, or find out that nothing is to be submitted. Runs in one of the executor's few threads."""
        from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

        try:
            stage, at = self._stage(job)
            if stage is not None and stage.sealed(at) is not None:
                publish(stage.state(at))
                executor._report_job_submission_threadsafe(SubmittedJobInfo(job, "", {"state": "there"}))
                return
            directory = stage.directory if stage else Path(job.output[0]).parent

            def look() -> slurm.Job | None:
                with claim(directory, self.say, self._pause):
                    found = self._live(executor, job, stage, at)
                    if found is None:
                        self._pause(0)
                        submit(executor, job)
                        self.interval = FIRST_SECONDS
                        self._cancel_late(executor, job, stage, at)
                    return found

            if (found := self._patiently(look)) is None:
                return
            same = found.comment == _comment(job)
            trains = found.comment.startswith(_stem(job))
            what = "is for this" if same else "trains it to another state" if trains else "works on it"
            self.say(f"{self.title(job)}: Slurm job {found.id} {what} ({found.state.lower()}); waiting for it")
            aux = {"state": "found" if same else "before", "slurm_logfile": self._log(executor, job, found.id)}
            executor._report_job_submission_threadsafe(SubmittedJobInfo(job, str(found.id), aux))
        except _Ended:
            pass
        except (NemoflowError, OSError) as error:
            executor.logger.error(f"nemoflow: error: {self.title(job)}: {error}")
            executor._report_job_error_threadsafe(SubmittedJobInfo(job), "")

    def _stage(self, job: Any) -> tuple[Stage | None, int | None]:
        """The stage that a job of Snakemake makes, and the state; None for what is no artifact of its own."""
        wildcards = job.wildcards_dict
        if "id" not in wildcards or Path(job.output[0]).name != "artifact.json":
            return None, None
        return self.store.load(wildcards["id"]), int(wildcards["n"]) if "n" in wildcards else None

    def _pause(self, seconds: float) -> None:
        """Wait; raises _Ended once this controller ends."""
        if self.ending.wait(seconds):
            raise _Ended

    def _live(self, executor: Any, job: Any, stage: Stage | None, at: int | None) -> slurm.Job | None:
        """This user's job for the same stage, the very same state first, or whose job holds its lock; None without."""
        own, where = _comment(job), str(executor.workflow.workdir_init)
        # Of a training the states are reached one after the other, by one job at a time
        stem = _stem(job) if at is not None else own
        here = [j for j in slurm.mine() if os.path.realpath(j.workdir) == os.path.realpath(where)]
        found = [j for j in here if j.comment == own] or [j for j in here if j.comment.startswith(stem)]
        return found[0] if found else holder(stage.directory) if stage else None

    def _cancel_late(self, executor: Any, job: Any, stage: Stage | None, at: int | None) -> None:
        """End a job that was submitted just when this controller was told to end all its jobs."""
        late = self._live(executor, job, stage, at) if self.ending.is_set() else None
        if late is not None and late.comment == _comment(job):
            slurm.cancel(late.id)

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """What `ask` answers, once Slurm answers at all."""
        told = False
        while True:
            try:
                return ask()
            except slurm.Unreachable as error:
                if not told:
                    self.say(f"{error}; waiting for it")
                    told = True
                self._pause(LAST_SECONDS / 3)

    @staticmethod
    def _log(executor: Any, job: Any, id: int) -> Path:
        kind, _, wildcards = _comment(job).partition("_wildcards_")
        return executor.slurm_logdir / kind / wildcards / f"{id}.log"

    # -- while jobs run ----------------------------------------------------------------------------------------------

    async def check(self, executor: Any, active: list, resubmit: Callable[[Any], None]) -> AsyncIterator:
        """Report the active jobs that are over, and yield the others."""
        if not active:
            executor.next_seconds_between_status_checks = FIRST_SECONDS
            return
        self.followed |= {info.external_jobid: info for info in active}
        try:
            known = await asyncio.to_thread(_known, [int(i.external_jobid) for i in active if i.external_jobid])
        except slurm.Unreachable as error:
            if self.silent_since is None:
                self.say(f"{error}; jobs run on meanwhile")
                self.silent_since = time.monotonic()
            known = None
        else:
            if self.silent_since is not None:
                self.say(f"Slurm answers again, after {time.monotonic() - self.silent_since:.0f} s")
                self.silent_since = None
        over = False
        for info in active:
            if info.aux.get("state") == "there":
                self._over(info)
                executor.report_job_success(info)
                over = True
                continue
            if known is None:
                yield info
                continue
            self._tell(info)
            found = known.get(int(info.external_jobid))
            if found is not None and found.live:
                self.gone.pop(info.external_jobid, None)
                yield info
                continue
            if info.aux.get("state") == "before":
                over = True
                self._over(info)
                resubmit(info.job)
                continue
            if found is None and self._just_gone(info.external_jobid):
                yield info
                continue
            if self._goes_on(info, found):
                yield info
                continue
            over = True
            self._over(info)
            self._report(executor, info, found)
        self.interval = FIRST_SECONDS if over else min(self.interval * 1.3, LAST_SECONDS)
        executor.next_seconds_between_status_checks = self.interval

    def _over(self, info: Any) -> None:
        self.followed.pop(info.external_jobid, None)

    def _just_gone(self, id: str) -> bool:
        """Whether Slurm has not known this job for the first time now: it may just be restarting."""
        self.gone[id] = self.gone.get(id, 0) + 1
        return self.gone[id] < 3

    def _goes_on(self, info: Any, found: slurm.Job | None) -> bool:
        """Have a job that Slurm ended go on in another slot, where that makes sense."""
        stage, at = self._stage(info.job)
        if found is None or found.state not in _ENDED_BY_SLURM or at is None or stage.sealed(at) is not None:
            return False
        try:
            # Of two controllers that follow it, one does this: to requeue what runs again is to kill it
            with claim(stage.directory, self.say, self._pause):
                if (now := slurm.job(found.id)) is not None and now.live:
                    return True
                if slots.ended(stage, at, found.id, found.state) is not None:
                    return False
                slurm.requeue(found.id)
        except slurm.Unreachable:
            return True  # to be seen to when it answers
        except (NemoflowError, OSError, _Ended):
            return False
        self.say(f"{self.title(info.job)}: Slurm job {found.id}: {found.state.lower()}; goes on in another slot")
        return True

    def _report(self, executor: Any, info: Any, found: slurm.Job | None) -> None:
        stage, at = self._stage(info.job)
        if stage is not None and stage.sealed(at) is not None:
            publish(stage.state(at))  # sealed, and then killed
        if (found and found.state == "COMPLETED") or all(Path(path).exists() for path in info.job.output):
            executor.report_job_success(info)
            return
        log = info.aux.get("slurm_logfile")
        said = _last_error(log)
        id, name = info.external_jobid, self.title(info.job)
        if said:
            message = said
        elif found is None:
            message = f"nemoflow: error: {name}: Slurm no longer knows job {id}, and its artifact is not there"
        else:
            message = f"nemoflow: error: {name}: Slurm job {id} ended: {found.state.lower().replace('_', ' ')}"
        executor.logger.error(f"{message}\n    the same command goes on from there; log of job {id}: {log}")
        executor.report_job_error(info)

    def _tell(self, info: Any) -> None:
        """Show the newest line of progress that the job wrote."""
        log, name = info.aux.get("slurm_logfile"), self.title(info.job)
        with contextlib.suppress(OSError), Path(log).open("rb") as file:
            file.seek(self.read.get(info.external_jobid, 0))
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.read[info.external_jobid] = self.read.get(info.external_jobid, 0) + len(whole)
            stem = name.partition(" to ")[0]  # jobs know no more of it
            lines = [line for line in whole.decode("utf-8", "replace").splitlines() if line.startswith(stem)]
            for line in [line for line in lines[:-1] if line.endswith(GOES_ON)] + lines[-1:]:
                self.say(line)

    def cancelled(self, active: list) -> list:
        """Those of the active jobs that end with this controller: not those that it found. Submits nothing any more."""
        self.ending.set()
        # While the executor looks at its jobs it has none of them in its list
        active = list((self.followed | {info.external_jobid: info for info in active}).values())
        kept = [info for info in active if info.aux.get("state")]
        for info in kept:
            if info.external_jobid:
                self.say(f"{self.title(info.job)}: Slurm job {info.external_jobid} runs on; scancel ends it")
        return [info for info in active if not info.aux.get("state")]


def _known(ids: list[int]) -> dict[int, slurm.Job]:
    """The jobs with these ids that Slurm knows, this user's others too."""
    found = slurm.known()
    others = (slurm.job(id) for id in ids if id not in found)
    return found | {job.id: job for job in others if job}


def _comment(job: Any) -> str:
    """What the executor writes into a job's comment."""
    from snakemake_executor_plugin_slurm.utils import get_job_wildcards

    wildcards = get_job_wildcards(job)
    return f"rule_{job.name}_wildcards_{wildcards}" if wildcards else f"rule_{job.name}"


def _stem(job: Any) -> str:
    """What the comments of all states of a trajectory begin with."""
    return _comment(job).rpartition("_")[0] + "_"


def _last_error(log: Path | None) -> str | None:
    """The last thing that a job said went wrong, in its log."""
    with contextlib.suppress(OSError, TypeError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.startswith("nemoflow: error: ")), None)
    return None


_looking = threading.Lock()
"""Files are locked per process; a controller submits from two threads."""


@contextlib.contextmanager
def claim(directory: Path, say: Callable[[str], None], pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold the right to submit a job for this directory; waits, by `pause`, while another controller holds it.

    A claim whose controller is dead counts no more, once no sbatch that it started is left: what that submits is in the
    queue then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "submitting"
    own = {"host": platform.node(), "pid": os.getpid(), "thread": threading.get_ident()}
    text = json.dumps(own | {"started": psutil.Process().create_time()})
    told = False
    while not _claimed(path, text, directory.name.rpartition("-")[2]):
        if not told:
            say(f"{directory}: another controller is submitting its job; waiting for it")
            told = True
        pause(0.5)
    try:
        yield
    finally:
        with _guarded(path) as file:
            if file is not None and file.read() == text:
                path.unlink()


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[IO | None]:
    """The file, opened for reading and writing, and nobody else's meanwhile; None when it was deleted while waiting."""
    with _looking, path.open("a+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            same = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except FileNotFoundError:
            same = False
        file.seek(0)
        yield file if same else None


def _claimed(path: Path, text: str, identity: str) -> bool:
    """Write the claim, unless another one counts; whether it was written."""
    with _guarded(path) as file:
        if file is None:
            return False
        age = time.time() - path.stat().st_mtime
        if (other := file.read()) and not _abandoned(other, age, identity):
            return False
        file.seek(0)
        file.truncate()
        file.write(text)
    return True


def _abandoned(claim: str, age: float, identity: str) -> bool:
    """Whether the controller that made this claim is dead, and no sbatch of its for this stage is left."""
    try:
        owner = json.loads(claim)
    except ValueError:
        return True  # its machine went down while it was written
    if owner["host"] != platform.node():
        return age > STALE_SECONDS
    with contextlib.suppress(psutil.Error):
        if psutil.Process(owner["pid"]).create_time() == owner["started"]:
            return False
    left = (p.info for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "sbatch")
    return not any(identity in word for info in left for word in info["cmdline"] or [])


def install(store: Store, title: Callable[[Any], str], say: Callable[[str], None]) -> None:
    """Put a gate before the Slurm executor of this process. Raises NemoflowError for a version it was not made for."""
    if (found := metadata.version(PLUGIN)) != VERSION:
        raise NemoflowError(
            f"{PLUGIN} {found} is installed; nemoflow works with {VERSION}: make install, or install that"
        )
    from snakemake_executor_plugin_slurm import Executor

    if hasattr(Executor, "gate"):
        return
    gate = Executor.gate = Gate(store, title, say)
    submit, cancel = Executor.run_job, Executor.cancel_jobs

    def run_job(self: Any, job: Any) -> None:
        gate.submit(self, job, submit)

    async def check_active_jobs(self: Any, active_jobs: list) -> AsyncIterator:
        async for info in gate.check(
            self, active_jobs, lambda job: self._job_submission_executor.submit(self.run_job, job)
        ):
            yield info

    def cancel_jobs(self: Any, active_jobs: list) -> None:
        cancel(self, gate.cancelled(active_jobs))

    async def sleep(self: Any) -> None:
        # In short steps: the end of a run waits for the end of this
        end = time.monotonic() + self.next_seconds_between_status_checks
        while self.wait and time.monotonic() < end:
            await asyncio.sleep(0.5)

    Executor.run_job, Executor.check_active_jobs, Executor.cancel_jobs = run_job, check_active_jobs, cancel_jobs
    Executor.sleep = sleep
