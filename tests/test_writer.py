"""The writer's lock: one at a time, a live owner is waited for, a dead one's lock is taken over."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemoflow import slurm, training
from nemoflow.errors import NemoflowError
from nemoflow.writer import Writer, writer

HOLD = """
    import sys, time
    from pathlib import Path
    from nemoflow.writer import writer
    with writer(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.read()
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = start(HOLD, str(tmp_path))
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_free_lock_is_taken_and_given_back(tmp_path):
    for _ in range(2):
        with writer(tmp_path / "a/b", pytest.fail):
            owner = json.loads((tmp_path / "a/b/lock").read_text())
            assert [p["pid"] for p in owner["processes"]] == [os.getpid()]
        assert (tmp_path / "a/b/lock").read_text() == ""


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path, pytest.fail):
        raise KeyboardInterrupt
    with writer(tmp_path, pytest.fail):
        pass


def test_a_live_owner_is_waited_for_and_said_once(tmp_path, other, monkeypatch):
    monkeypatch.setattr("nemoflow.writer.POLL_SECONDS", 0.01)
    said = []

    def waiting(text):
        said.append(text)
        other.stdin.close()  # it ends, and gives the lock back

    with writer(tmp_path, waiting):
        assert other.wait(10) == 0
    assert said == [f"another run is working on this (process {other.pid}); waiting for it"]


def test_a_dead_owners_lock_is_taken_over(tmp_path, other):
    other.kill()
    other.wait()
    assert json.loads((tmp_path / "lock").read_text())["processes"][0]["pid"] == other.pid
    with writer(tmp_path, pytest.fail):
        pass


def test_a_zombie_is_dead(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with writer(tmp_path, pytest.fail):
        pass


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path):
    owner = Writer(tmp_path / "lock")
    assert owner.try_to_take() is None
    record = json.loads((tmp_path / "lock").read_text())
    record["processes"][0]["started"] -= 60
    (tmp_path / "lock").write_text(json.dumps(record))
    with writer(tmp_path, pytest.fail):
        pass


def test_while_the_child_lives_the_lock_is_held_though_the_driver_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr("nemoflow.writer.POLL_SECONDS", 0.01)
    code = """
        import subprocess, sys
        from pathlib import Path
        from nemoflow.writer import writer
        with writer(Path(sys.argv[1]), print) as held:
            child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
            held.add_process(child.pid)
            print(child.pid, flush=True)
            sys.stdin.read()
    """
    driver = start(code, str(tmp_path))
    child = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    said = []

    def waiting(text):
        said.append(text)
        os.kill(child, signal.SIGKILL)

    with writer(tmp_path, waiting):
        pass
    assert said == [f"another run is working on this (process {child}); waiting for it"]


def test_an_owner_on_another_host_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "node17", "processes": [{"pid": 1, "started": 0}]}))
    with (
        pytest.raises(NemoflowError, match=r"lock: held by a job on node17, .* delete this file"),
        writer(tmp_path, print),
    ):
        pass
    assert json.loads((tmp_path / "lock").read_text())["host"] == "node17"


@pytest.mark.parametrize("text", ["", '{"host": "x", "proc', "\x00\x00"])
def test_a_lock_that_was_cut_off_by_a_crash_is_free(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with writer(tmp_path, pytest.fail):
        pass


def test_of_many_at_once_one_at_a_time(tmp_path):
    """Each reads a counter, dawdles, and writes it back: lost updates would show."""
    (tmp_path / "counter").write_text("0")
    code = """
        import sys, time
        from pathlib import Path
        import nemoflow.writer
        nemoflow.writer.POLL_SECONDS = 0.001
        counter = Path(sys.argv[1]) / "counter"
        for _ in range(10):
            with nemoflow.writer.writer(Path(sys.argv[1]), lambda _: None):
                n = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(n + 1))
    """
    processes = [start(code, str(tmp_path)) for _ in range(4)]
    assert [p.wait(60) for p in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "40"


def test_without_slurm_s_commands_there_is_no_slurm(monkeypatch, tmp_path):
    """As in a container that was started within a job, by hand."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.here() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert training.deadline() == 1.8e9
