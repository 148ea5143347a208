"""The controller dies, or there are two: running jobs are found and waited for, and none is submitted twice."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from box import Box, wait
from graph import Work, kill

NAME = "pretrain/demo@phase1"


@pytest.fixture
def slow(demo):
    """Half a minute of training."""
    demo.set("phase1", overrides={"sleep.seconds": 1})
    return demo


def new_jobs(slurm: Box, before: dict) -> dict[int, str]:
    return {id: state for id, state in slurm.jobs().items() if id not in before}


def trained_once(demo, trajectory: Path) -> None:
    assert demo.iterations(trajectory) == list(range(1, 21))


def test_killed_while_its_job_runs(slurm: Box, slow):
    before = slurm.jobs()
    kill(slow.start(NAME))  # while it starts
    first = slow.start(NAME)
    trajectory = slow.wait_for("pretrain", 3, seconds=90)
    kill(first)
    said = slow.run(NAME)
    assert "is for this (running); waiting for it" in said
    assert len(new_jobs(slurm, before)) == 1
    trained_once(slow, trajectory)


def test_killed_while_its_job_waits(slurm: Box, slow):
    before = slurm.jobs()
    slurm.run("scontrol", "update", "PartitionName=batch", "State=DOWN")
    try:
        first = slow.start(NAME)
        wait(lambda: new_jobs(slurm, before), "job")
        kill(first)
        second = slow.start(NAME)
        wait(lambda: "waiting for it" in second.stdout.readline(), "word that it waits")
    finally:
        slurm.run("scontrol", "update", "PartitionName=batch", "State=UP")
    second.communicate(timeout=180)
    assert second.returncode == 0
    assert len(new_jobs(slurm, before)) == 1


def test_killed_while_it_submits(slurm: Box, slow, tmp_path):
    """sbatch lives on without the controller, and its job is in the queue only later."""
    before = slurm.jobs()
    late = tmp_path / "bin/sbatch"
    late.parent.mkdir()
    late.write_text(f'#!/bin/bash\ntouch {tmp_path}/begun\nsleep 15\nexec /usr/bin/sbatch "$@"\n')
    late.chmod(0o755)
    command = slow._command(NAME)
    command["env"]["PATH"] = f"{late.parent}:{command['env']['PATH']}"
    first = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait((tmp_path / "begun").exists, "sbatch")
    submitting = list(slow.path.glob("artifacts/pretrain/*/submitting"))
    first.kill()
    first.wait()
    said = slow.run(NAME)
    assert len(new_jobs(slurm, before)) == 1, said
    assert "is for this" in said
    assert not submitting[0].exists()
    trained_once(slow, submitting[0].parent)


def test_killed_and_its_job_ends_meanwhile(slurm: Box, slow):
    before = slurm.jobs()
    first = slow.start(NAME)
    slow.wait_for("pretrain", 3, seconds=90)
    kill(first)
    wait(lambda: set(new_jobs(slurm, before).values()) == {"COMPLETED"}, "end of the job", seconds=120)
    slow.run(NAME)
    assert len(new_jobs(slurm, before)) == 1


def test_an_interrupt_ends_its_jobs_and_the_same_command_goes_on(slurm: Box, slow):
    before = slurm.jobs()
    first = slow.start(NAME)
    trajectory = slow.wait_for("pretrain", 7, seconds=90)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 1
    wait(lambda: set(new_jobs(slurm, before).values()) == {"CANCELLED"}, "cancelled job")
    slow.run(NAME)
    slow.check_never_lost(trajectory)
    assert len(new_jobs(slurm, before)) == 2


def test_told_to_end_it_lets_its_jobs_finish(slurm: Box, slow):
    before = slurm.jobs()
    first = slow.start(NAME)
    trajectory = slow.wait_for("pretrain", 3, seconds=90)
    first.terminate()
    first.communicate(timeout=120)
    wait(lambda: set(new_jobs(slurm, before).values()) == {"COMPLETED"}, "end of the job", seconds=120)
    slow.run(NAME)
    assert len(new_jobs(slurm, before)) == 1
    trained_once(slow, trajectory)


def test_a_run_on_this_machine_leaves_to_slurm_what_is_slurms(slurm: Box, slow):
    """Its job would find that it is to be launched otherwise, when it starts or goes on in another slot."""
    before = slurm.jobs()
    first = slow.start(NAME)
    trajectory = slow.wait_for("pretrain", 3, seconds=90)
    assert "running" in (shown := slow.nemoflow("show", check=True).stdout), shown
    assert "pretrain phase1 of demo to 20" in shown
    launch = (trajectory / "launch.json").read_text()
    done = subprocess.run(**Work._command(slow, NAME), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    (job,) = new_jobs(slurm, before)
    assert f"pretrain phase1 of demo: Slurm job {job} (running) is for this; wait for it with" in done.stderr
    assert "Traceback" not in done.stderr
    assert (trajectory / "launch.json").read_text() == launch
    first.communicate(timeout=180)
    assert first.returncode == 0
    trained_once(slow, trajectory)


def test_two_controllers_at_once(slurm: Box, slow):
    """On the same name, and on a sibling recipe that trains the same stage further."""
    sibling = slow.recipe("more")
    sibling.write_text("extends: demo\nstages: [{name: phase1, until: 25}]\n")
    slow.nemoflow("lock", "more", check=True)
    before = slurm.jobs()
    names = (NAME, NAME, "pretrain/more@phase1")
    runs = [slow.start(name) for name in names]
    said = [run.communicate(timeout=280)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    slow.check_today(NAME, "pretrain/more@phase1")
    (trajectory,) = (slow.path / "artifacts/pretrain").glob("*")
    assert slow.iterations(trajectory) == list(range(1, 26))
    assert len(new_jobs(slurm, before)) <= 2, "one, where the longer training comes first and passes the other's state"


def test_the_scheduler_is_away_for_a_while(slurm: Box, slow):
    before = slurm.jobs()
    first = slow.start(NAME)
    trajectory = slow.wait_for("pretrain", 3, seconds=90)
    slurm.stop_controller()
    try:
        wait(lambda: 17 in slow.iterations(trajectory), "progress without Slurm")
    finally:
        slurm.start_controller()
    said, _ = first.communicate(timeout=180)
    assert first.returncode == 0, said
    assert len(new_jobs(slurm, before)) == 1
    trained_once(slow, trajectory)


def test_recipes_edited_and_deleted_meanwhile(slurm: Box, slow):
    """A job knows its frozen stage alone: what becomes of the recipe while it waits or runs is not its business."""
    before = slurm.jobs()
    recipe = slow.recipe().read_text()
    slurm.run("scontrol", "update", "PartitionName=batch", "State=DOWN")
    try:
        first = slow.start(NAME)
        wait(lambda: new_jobs(slurm, before), "job")
        slow.set("phase1", overrides={"optimizer.lr": 0.5})
    finally:
        slurm.run("scontrol", "update", "PartitionName=batch", "State=UP")
    trajectory = slow.wait_for("pretrain", 3, seconds=90)
    slow.recipe().write_text("stages: [")
    slow.owners(trajectory)[-1].send_signal(signal.SIGKILL)  # so that another slot starts under the broken recipe
    wait(lambda: len(json.loads((trajectory / "run.json").read_text())["attempts"]) == 2, "second slot")
    slow.recipe().unlink()
    said, _ = first.communicate(timeout=180)
    slow.recipe().write_text(recipe)
    slow.run(NAME)
    assert len(new_jobs(slurm, before)) == 1, said
