"""The gate before sbatch: what it submits, what it waits for, and what it makes of a job's end."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nemoflow import gate, slurm
from nemoflow.errors import NemoflowError
from nemoflow.gate import Gate, claim

ID = "0123456789ab"


def a_job(n: int = 20, rule: str = "pretrain", **fields) -> SimpleNamespace:
    """A job of Snakemake for a state."""
    wildcards = {"label": "demo", "id": ID, "n": str(n)}
    output = [f"artifacts/{rule}/demo-{ID}/at-{n}/artifact.json"]
    return SimpleNamespace(
        name=rule, wildcards=list(wildcards.values()), wildcards_dict=wildcards, output=output, **fields
    )


class Executor:
    """What the gate uses of the plugin's executor."""

    def __init__(self, path: Path):
        self.workflow = SimpleNamespace(workdir_init=path)
        self.logger = SimpleNamespace(error=lambda text: self.errors.append(text))
        self.slurm_logdir = path / "logs"
        self.errors, self.reported, self.next_seconds_between_status_checks = [], [], 0

    def _report_job_submission_threadsafe(self, info):
        self.reported.append(("submitted", info.external_jobid, info.aux["state"]))

    def _report_job_error_threadsafe(self, info, _):
        self.reported.append(("error", info.external_jobid))

    def report_job_success(self, info):
        self.reported.append(("success", info.external_jobid))

    def report_job_error(self, info):
        self.reported.append(("error", info.external_jobid))


class World:
    """A gate with a trajectory, an executor, and a queue that the tests fill."""

    def __init__(self, path: Path, monkeypatch):
        self.path, self.said, self.queue = path, [], {}
        self.submitted, self.requeued, self.cancelled, self.silent = [], [], [], 0
        self.directory = path / f"artifacts/pretrain/demo-{ID}"
        self.directory.mkdir(parents=True)
        self.stage = SimpleNamespace(
            directory=self.directory,
            payload={"engine": "sleep_engine"},
            state=lambda at: self.directory / f"at-{at}",
            sealed=lambda at: True if (self.directory / f"at-{at}/sealed.json").exists() else None,
        )
        self.executor = Executor(path)
        self.gate = Gate(SimpleNamespace(load=lambda _: self.stage), lambda job: f"demo to {job.output}", self.say)
        for name in ("mine", "known", "job", "requeue", "cancel"):
            monkeypatch.setattr(slurm, name, getattr(self, name))
        monkeypatch.setattr(gate, "LAST_SECONDS", 0.03)

    def say(self, text: str) -> None:
        self.said.append(text)

    # Slurm

    def add(self, id: int, state: str = "RUNNING", n: int = 20, **other) -> slurm.Job:
        fields = {
            "restarts": 0,
            "nodes": ["n1"],
            "end": None,
            "partition": "batch",
            "comment": f"rule_pretrain_wildcards_demo_{ID}_{n}",
            "workdir": str(self.path),
            "excluded": [],
        }
        self.queue[id] = slurm.Job(**{"id": id, "state": state} | fields | other)
        return self.queue[id]

    def known(self) -> dict:
        if self.silent:
            self.silent -= 1
            raise slurm.Unreachable("squeue: Slurm does not answer")
        return {id: job for id, job in self.queue.items() if job.partition != "others"}

    def mine(self) -> list:
        return [job for job in self.known().values() if job.live]

    def job(self, id: int):
        return self.queue.get(id)

    def requeue(self, id: int) -> None:
        self.requeued.append(id)
        self.add(id, "PENDING", restarts=1)

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)

    # Snakemake

    def submit(self, job: SimpleNamespace | None = None) -> None:
        """Through the gate."""

        def sbatch(_, job):
            self.submitted.append(job.output[0])
            self.add(100 + len(self.submitted), "PENDING", int(job.wildcards_dict["n"]))

        self.gate.submit(self.executor, job or a_job(), sbatch)

    def check(self, *infos) -> list:
        """The ids of the jobs that are still followed; those to be submitted again are in `again`."""
        self.again = []

        async def collect():
            return [i.external_jobid async for i in self.gate.check(self.executor, list(infos), self.again.append)]

        return asyncio.run(collect())

    def seal(self, n: int = 20) -> Path:
        state = self.directory / f"at-{n}"
        state.mkdir()
        (state / "sealed.json").write_text("{}")
        return state


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, monkeypatch)


def followed(id: str = "7", state: str | None = None, job: SimpleNamespace | None = None) -> SimpleNamespace:
    """A job as the executor holds it once it was submitted or found."""
    aux = {"slurm_logfile": Path(f"{id}.log")} | ({"state": state} if state else {})
    return SimpleNamespace(job=job or a_job(), external_jobid=id, aux=aux)


# -- before a submission ----------------------------------------------------------------------------------------------


def test_what_is_neither_there_nor_in_the_queue_is_submitted(world):
    world.submit()
    assert world.submitted == a_job().output
    assert world.executor.reported == [], "the plugin reports it"
    assert not (world.directory / "submitting").exists()


def test_a_finished_artifact_is_published_without_a_job(world):
    state = world.seal()
    world.submit()
    assert (world.submitted, world.executor.reported) == ([], [("submitted", "", "there")])
    assert (state / "artifact.json").exists()
    assert world.check(followed("", "there")) == []
    assert world.executor.reported[1:] == [("success", "")]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_live_job_for_the_same_is_waited_for(world, state):
    world.add(7, state)
    world.submit()
    assert (world.submitted, world.executor.reported) == ([], [("submitted", "7", "found")])
    assert f"Slurm job 7 is for this ({state.lower()}); waiting for it" in world.said[0]


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"])
def test_a_job_that_is_over_is_not(world, state):
    world.add(7, state)
    world.submit()
    assert world.submitted == a_job().output


@pytest.mark.parametrize(
    "other",
    [
        {"workdir": "/elsewhere"},
        {"comment": "rule_sft_wildcards_demo_0123456789ab_20"},
        {"comment": "rule_pretrain_wildcards_demo_ba9876543210_20"},
        {"comment": ""},
    ],
)
def test_jobs_for_something_else_do_not_matter(world, other):
    world.add(7, **other)
    world.submit()
    assert world.submitted == a_job().output


def test_a_link_to_the_work_directory_is_the_same_directory(world, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    world.add(7, workdir=str(link))
    world.submit()
    assert world.submitted == []


def test_a_job_for_another_state_of_the_training_is_waited_for_and_then_looked_again(world):
    world.add(7, n=10)
    world.submit()
    assert world.executor.reported == [("submitted", "7", "before")]
    info = followed(state="before")
    assert world.check(info) == ["7"]
    world.add(7, "COMPLETED", n=10)
    assert world.check(info) == []
    assert world.again == [info.job]
    world.submit(info.job)
    assert world.submitted == a_job().output


def test_the_very_state_goes_before_another_one(world):
    world.add(7, n=10)
    world.add(8, n=20)
    world.submit()
    assert world.executor.reported == [("submitted", "8", "found")]


def test_whose_job_holds_the_lock_is_waited_for(world):
    """Another user's, from another directory: only the trajectory's lock knows."""
    lock = {"host": "elsewhere", "processes": [], "job": {"id": 7, "restarts": 0}}
    (world.directory / "lock").write_text(json.dumps(lock))
    world.add(7, partition="others", workdir="/elsewhere", comment="by hand")
    world.submit()
    assert world.submitted == []
    assert "Slurm job 7 works on it (running)" in world.said[0]
    info = followed(state="before")
    assert world.check(info) == ["7"], "squeue --user does not show it"
    world.add(7, "COMPLETED", partition="others")
    assert world.check(info) == []
    assert world.again == [info.job]
    world.submit(info.job)
    assert world.submitted == a_job().output


def test_slurm_is_waited_for_and_said_once(world):
    world.silent = 3
    world.submit()
    assert world.submitted == a_job().output
    assert world.said == ["squeue: Slurm does not answer; waiting for it"]


def test_while_slurm_is_silent_nobody_is_kept_out(world, monkeypatch):
    """A claim is for seconds: another machine may take one that is older for a dead controller's."""

    def pause(seconds):
        assert seconds == 0 or not (world.directory / "submitting").exists()

    monkeypatch.setattr(world.gate, "_pause", pause)
    world.silent = 2
    world.submit()
    assert world.submitted == a_job().output


def test_an_error_is_one_message_of_the_job(world, monkeypatch):
    monkeypatch.setattr(slurm, "mine", lambda: (_ for _ in ()).throw(NemoflowError("no")))
    world.submit()
    assert world.executor.reported == [("error", None)]
    assert world.executor.errors == [f"nemoflow: error: demo to {a_job().output}: no"]
    assert not (world.directory / "submitting").exists()


def test_an_ending_controller_submits_nothing(world):
    world.gate.cancelled([])
    world.submit()
    assert world.submitted == []
    assert not (world.directory / "submitting").exists()


def test_an_ending_controller_does_not_wait_for_slurm(world):
    world.silent = 10**6
    with ThreadPoolExecutor() as pool:
        done = pool.submit(world.submit)
        while not world.said:
            time.sleep(0.001)
        world.gate.cancelled([])
        done.result(10)
    assert world.submitted == []


def test_a_job_submitted_just_when_the_controller_ends_is_cancelled(world):
    def sbatch(*_):
        world.gate.cancelled([])
        world.add(9, "PENDING")

    world.gate.submit(world.executor, a_job(), sbatch)
    assert world.cancelled == [9]


def test_on_an_interrupt_only_its_own_jobs_end(world):
    own, found = followed("1"), followed("2", "found")
    assert world.gate.cancelled([own, found, followed("", "there")]) == [own]
    assert len(world.said) == 1
    assert world.said[0].endswith("Slurm job 2 runs on; scancel ends it")


def test_an_interrupt_during_a_look_ends_its_jobs_too(world, monkeypatch):
    """The executor has emptied its list then."""
    ended = []
    monkeypatch.setattr(world, "known", lambda: ended.extend(world.gate.cancelled([])) or {7: world.add(7)})
    monkeypatch.setattr(slurm, "known", world.known)
    own = followed()
    world.check(own)
    assert ended == [own]


# -- while jobs run, and their ends -----------------------------------------------------------------------------------


def test_live_jobs_are_followed_at_growing_intervals(world, monkeypatch):
    monkeypatch.setattr(gate, "LAST_SECONDS", 30)
    world.add(7)
    intervals = []
    for _ in range(15):
        assert world.check(followed()) == ["7"]
        intervals.append(world.executor.next_seconds_between_status_checks)
    assert intervals == sorted(intervals)
    assert (intervals[0], intervals[-1]) == (pytest.approx(2.6), 30)
    world.add(7, "COMPLETED")
    world.check(followed())
    assert world.executor.next_seconds_between_status_checks == 2


def test_a_completed_job_is_a_success(world):
    world.add(7, "COMPLETED")
    assert world.check(followed()) == []
    assert world.executor.reported == [("success", "7")]


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_what_counts_is_the_artifact(world, state):
    """It may have been killed after sealing."""
    directory = world.seal()
    world.add(7, state)
    assert world.check(followed()) == []
    assert world.executor.reported == [("success", "7")]
    assert (directory / "artifact.json").exists()
    assert world.requeued == []


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "DEADLINE", "PREEMPTED"])
def test_without_it_an_ended_job_is_one_error(world, state):
    world.add(7, state)
    assert world.check(followed()) == []
    assert world.executor.reported == [("error", "7")]
    assert f"Slurm job 7 ended: {state.lower()}\n    the same command goes on from there" in world.executor.errors[0]


def test_what_the_job_said_last_is_the_error(world, tmp_path):
    world.add(7, "FAILED")
    log = tmp_path / "7.log"
    log.write_text("nemoflow: error: first\nnemoflow: error: out of luck\nTraceback\n")
    info = followed()
    info.aux["slurm_logfile"] = log
    world.check(info)
    assert world.executor.errors[0].startswith("nemoflow: error: out of luck\n")


def test_a_job_that_slurm_forgot_ends_too(world):
    """Not at once: a controller that has just started may not know its jobs yet."""
    info = followed()
    assert [world.check(info) for _ in range(3)] == [["7"], ["7"], []]
    assert world.executor.reported == [("error", "7")]
    assert "Slurm no longer knows job 7, and its artifact is not there" in world.executor.errors[0]


def test_a_forgotten_job_that_finished_is_a_success(world):
    world.seal()
    info = followed()
    while world.check(info):
        pass
    assert world.executor.reported == [("success", "7")]


def test_silence_of_slurm_ends_nothing(world):
    world.silent = 5
    for _ in range(5):
        assert world.check(followed()) == ["7"]
    world.add(7, "COMPLETED")
    world.check(followed())
    assert world.executor.reported == [("success", "7")]
    assert [text.partition(",")[0] for text in world.said] == [
        "squeue: Slurm does not answer; jobs run on meanwhile",
        "Slurm answers again",
    ]


def killed_attempt(world, start: int) -> None:
    """An attempt of job 7 that started at `start` and could say nothing; there is a checkpoint at 5."""
    (world.directory / "checkpoints/5").mkdir(parents=True)
    (world.directory / "checkpoints/5/weights").touch()
    idle = {"from": start, "reached": start, "outcome": "died", "reason": "was killed", "job": {"id": 7}}
    attempts = [idle, {"from": start, "job": {"id": 7}}]
    (world.directory / "run.json").write_text(json.dumps({"attempts": attempts}))


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "FAILED"])
def test_a_training_that_slurm_ended_after_progress_goes_on_under_the_same_id(world, state):
    killed_attempt(world, 0)
    world.add(7, state)
    info = followed()
    assert world.check(info) == ["7"]
    assert world.requeued == [7]
    assert world.check(info) == ["7"], "it waits again"
    assert world.executor.reported == []


def test_one_without_progress_twice_does_not(world):
    killed_attempt(world, 5)
    world.add(7, "TIMEOUT")
    assert world.check(followed()) == []
    assert (world.requeued, world.executor.reported) == ([], [("error", "7")])


def test_a_cancelled_one_does_not(world):
    killed_attempt(world, 0)
    world.add(7, "CANCELLED")
    assert world.check(followed()) == []
    assert (world.requeued, world.executor.reported) == ([], [("error", "7")])


def test_of_two_controllers_one_has_it_go_on(world, monkeypatch):
    """The other one's list is a moment old: what it takes for ended runs again, and must not be ended."""
    killed_attempt(world, 0)
    ended = world.add(7, "TIMEOUT")
    monkeypatch.setattr(slurm, "known", lambda: {7: ended})
    assert [world.check(followed()), world.check(followed())] == [["7"], ["7"]]
    assert world.requeued == [7]


def test_that_slurm_refuses_to_start_again_is_an_error(world, monkeypatch):
    killed_attempt(world, 0)
    world.add(7, "TIMEOUT")
    refuse = NemoflowError("scontrol requeue 7: Requested operation is presently disabled")
    monkeypatch.setattr(slurm, "requeue", lambda _: (_ for _ in ()).throw(refuse))
    assert world.check(followed()) == []
    assert world.executor.reported == [("error", "7")]


# -- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_is_gone_afterwards_also_after_an_error(tmp_path):
    def submit():
        with claim(tmp_path, pytest.fail):
            assert json.loads((tmp_path / "submitting").read_text())["pid"] == os.getpid()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        submit()
    assert not (tmp_path / "submitting").exists()


@pytest.mark.parametrize(
    "text",
    ["", '{"host": "x', "\x00\x00", json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": 0})],
)
def test_a_claim_of_a_dead_controller_counts_no_more(tmp_path, text):
    (tmp_path / "submitting").write_text(text)
    with claim(tmp_path, pytest.fail):
        pass


def test_a_reused_pid_is_not_taken_for_the_controller(tmp_path):
    started = psutil.Process().create_time() - 60
    record = {"host": os.uname().nodename, "pid": os.getpid(), "started": started}
    (tmp_path / "submitting").write_text(json.dumps(record))
    with claim(tmp_path, pytest.fail):
        pass


@pytest.mark.parametrize(("age", "counts"), [(60, True), (3600, False)])
def test_a_claim_from_another_machine_counts_for_ten_minutes(tmp_path, age, counts):
    path = tmp_path / "submitting"
    path.write_text('{"host": "elsewhere", "pid": 1, "started": 0}')
    os.utime(path, (time.time() - age,) * 2)
    said = []

    def pause(_):
        path.unlink()

    with claim(tmp_path, said.append, pause):
        pass
    assert said == [f"{tmp_path}: another controller is submitting its job; waiting for it"] * counts


def test_an_sbatch_that_outlives_its_controller_is_waited_for(tmp_path):
    """Its job will be in the queue only when it ends."""
    directory = tmp_path / f"demo-{ID}"
    directory.mkdir()
    (directory / "submitting").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": 0}))
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/bash\nread\n")  # named by its file, as the kernel does
    program.chmod(0o755)
    sbatch = subprocess.Popen([program, f"--comment=rule_pretrain_wildcards_demo_{ID}_20"], stdin=subprocess.PIPE)
    while psutil.Process(sbatch.pid).name() != "sbatch":
        time.sleep(0.01)
    waited = []

    def pause(seconds):
        waited.append(seconds)
        sbatch.communicate(b"\n")

    with claim(directory, lambda _: None, pause):
        assert sbatch.returncode == 0
    assert waited


def test_a_claim_that_was_taken_over_is_not_deleted(tmp_path):
    path = tmp_path / "submitting"
    with claim(tmp_path, pytest.fail):
        path.write_text('{"host": "elsewhere"}')
    assert path.exists()


def test_of_many_claims_at_once_one_counts_at_a_time(tmp_path):
    """Processes of two threads each, begun beside a dead controller's claim: lost updates would show."""
    (tmp_path / "counter").write_text("0")
    (tmp_path / "submitting").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": 0}))
    code = """
        import sys, threading, time
        from pathlib import Path
        from nemoflow.gate import claim
        counter = Path(sys.argv[1]) / "counter"
        def work():
            for _ in range(10):
                with claim(counter.parent, lambda _: None, lambda _: time.sleep(0.001)):
                    n = int(counter.read_text())
                    time.sleep(0.002)
                    counter.write_text(str(n + 1))
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0] * 3
    assert (tmp_path / "counter").read_text() == "60"
    assert not (tmp_path / "submitting").exists()


# -- the executor -----------------------------------------------------------------------------------------------------


def test_another_version_of_the_executor_is_refused(monkeypatch):
    monkeypatch.setattr(gate, "VERSION", "2.9.0")
    with pytest.raises(NemoflowError, match=r"2\.8\.0 is installed; nemoflow works with 2\.9\.0"):
        gate.install(None, None, None)


def test_what_is_wrapped_is_there():
    """They are no interface: whatever else changes its form must fail here, not on a cluster."""
    from snakemake_executor_plugin_slurm import Executor as Plugin

    for name in ("run_job", "check_active_jobs", "cancel_jobs", "sleep"):
        assert callable(getattr(Plugin, name))
    for name in ("_report_job_submission_threadsafe", "_report_job_error_threadsafe"):
        assert callable(getattr(Plugin, name))


def test_the_comment_is_what_the_executor_writes():
    """Jobs are found again by it."""
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command

    job = a_job(resources=SimpleNamespace(get=lambda *_: None), is_group=lambda: False)
    assert gate._comment(job) == f"rule_pretrain_wildcards_demo_{ID}_20"
    assert "comment_str" in get_submit_command.__code__.co_consts or "comment" in str(
        get_submit_command.__code__.co_consts
    )


def test_the_lock_of_threads_is_free_afterwards(tmp_path):
    with claim(tmp_path, pytest.fail):
        done = threading.Thread(target=lambda: claim(tmp_path / "other", pytest.fail).__enter__())
        done.start()
        done.join(10)
        assert not done.is_alive(), "claims of two directories do not keep each other out"
