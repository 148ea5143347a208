"""Trainings in slots, on a real Slurm: each ends complete, goes on where it stopped, and is no job twice."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
from box import Box, wait


def attempts(trajectory: Path) -> list[dict]:
    return json.loads((trajectory / "run.json").read_text())["attempts"]


def the_trajectory(demo, kind: str = "pretrain") -> Path:
    return wait(lambda: next(iter((demo.path / f"artifacts/{kind}").glob("*/run.json")), None), "training").parent


def test_a_rank_that_is_killed_goes_on_in_the_same_job(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.3})
    before = slurm.jobs()
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    demo.owners(trajectory)[-1].send_signal(signal.SIGKILL)
    said, _ = child.communicate(timeout=180)
    assert child.returncode == 0, said
    assert [a["outcome"] for a in attempts(trajectory)] == ["died", "done"]
    assert [(a["from"], a["reached"]) for a in attempts(trajectory)] == [(0, 5), (5, 20)]
    (job,) = slurm.jobs().keys() - before.keys()
    assert [a["job"] for a in attempts(trajectory)] == [{"id": job, "restarts": 0}, {"id": job, "restarts": 1}]
    demo.check_never_lost(trajectory)
    assert (trajectory / "attempts/1.log").exists()
    assert (trajectory / "attempts/2.log").exists()


def test_two_slots_without_progress_end_it(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.end_at": 3})
    before = slurm.jobs()
    done = demo.snakemake("pretrain/demo@phase1")
    assert done.returncode == 1
    assert "two slots in a row saved nothing beyond iteration 0" in done.stdout
    assert len(slurm.jobs().keys() - before.keys()) == 1


def test_what_a_person_has_to_mend_does_not_go_on(demo):
    demo.set("phase1", overrides={"sleep.fail_at": 8})
    done = demo.snakemake("pretrain/demo@phase1")
    assert done.returncode == 1
    assert "told to fail at 8" in done.stdout
    assert [a["outcome"] for a in attempts(the_trajectory(demo))] == ["failed"]


def test_the_whole_job_killed_goes_on(demo):
    """As when memory runs out, or a node reboots: nothing in the job could say anything."""
    demo.set("phase1", overrides={"sleep.seconds": 0.3})
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    job = json.loads((trajectory / "lock").read_text())["job"]["id"]
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("SLURM_JOB_ID") == str(job) and process.pid != os.getpid():
            process.kill()
    said, _ = child.communicate(timeout=180)
    assert child.returncode == 0, said
    assert [a["outcome"] for a in attempts(trajectory)] == ["died", "done"]
    demo.check_never_lost(trajectory)


def test_scancel_stops_the_job_and_the_same_command_goes_on(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.3})
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    slurm.run("scancel", str(json.loads((trajectory / "lock").read_text())["job"]["id"]))
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 1, said
    assert "the same command goes on from there" in said
    demo.run("pretrain/demo@phase1")
    demo.check_never_lost(trajectory)


def test_a_rank_that_hangs_is_looked_at_ended_and_gone_on_with(demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.3}, guard={"hang_least": "8s"})
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    demo.owners(trajectory)[-1].suspend()
    said, _ = child.communicate(timeout=240)
    assert child.returncode == 0, said
    assert "hung: no sign of life for" in said
    hung, done = attempts(trajectory)
    assert (hung["outcome"], done["outcome"]) == ("hung", "done")
    assert hung["suspect"] in Box.nodes
    stacks = (trajectory / "attempts/1.stacks.txt").read_text()
    assert "(stopped)" in stacks
    assert "main (sleep_engine.py" in stacks
    demo.check_never_lost(trajectory)


def test_the_time_limit_three_times(slurm: Box, demo):
    """Slurm ends it, which this engine does not see coming, and one command sees it through."""
    demo.set("phase1", overrides={"sleep.seconds": 12}, resources={"time": "1m"}, save_interval=1)
    before = slurm.jobs()
    done = demo.start("pretrain/demo@phase1")
    said, _ = done.communicate(timeout=500)
    assert done.returncode == 0, said
    trajectory = the_trajectory(demo)
    outcomes = [a["outcome"] for a in attempts(trajectory)]
    assert outcomes[-1] == "done"
    assert len(outcomes) >= 4
    assert set(outcomes[:-1]) == {"ended"}
    assert len(slurm.jobs().keys() - before.keys()) == 1
    demo.check_never_lost(trajectory, interval=1)


def test_a_save_slower_than_the_grace_of_slurm(slurm: Box, demo):
    """It is begun while there is time for it, so that none is cut off; Slurm would give it 3 s here, 30 elsewhere."""
    settings = {"sleep.seconds": 3, "sleep.save_seconds": 32, "sleep.watch": True}
    demo.set("phase1", overrides=settings, resources={"time": "3m"}, save_interval=100)
    before = slurm.jobs()
    child = demo.start("pretrain/demo@phase1")
    said, _ = child.communicate(timeout=500)
    assert child.returncode == 0, said
    trajectory = the_trajectory(demo)
    left, done = attempts(trajectory)
    assert (left["outcome"], done["outcome"]) == ("unfinished", "done")
    assert 10 < left["reached"] == done["from"] < 20
    assert not list((trajectory / "checkpoints").glob(".*")), "no save was cut off"
    assert demo.iterations(trajectory) == list(range(1, 21)), "nothing was trained twice"
    assert len(slurm.jobs().keys() - before.keys()) == 1
    demo.check_never_lost(trajectory, interval=1)


def test_the_disk_is_full_during_a_save(demo):
    """One clear error, the checkpoints before it are whole, and the same command goes on once there is room."""
    demo.set("phase1", overrides={"sleep.seconds": 0.5, "sleep.bytes": 10**6})
    store = demo.path / "artifacts"
    kept = store.rename(demo.path / "kept")
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(store)], check=True)
    try:
        subprocess.run(f"cp -r {kept}/. {store}", shell=True, check=True)
        child = demo.start("pretrain/demo@phase1")
        trajectory = demo.wait_for("pretrain", 7, seconds=90)
        filler = store / "filler"
        with filler.open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(10**5))
                file.flush()
        said, _ = child.communicate(timeout=180)
        assert child.returncode == 1, said
        assert "no space left" in said
        assert "Traceback" not in said
        filler.unlink()
        assert [p.name for p in (trajectory / "checkpoints").glob("[0-9]*")] == ["5"]
        before = len(demo.iterations(trajectory))
        demo.run("pretrain/demo@phase1")
        assert demo.iterations(trajectory)[before:] == list(range(6, 21))
        demo.check_digits(trajectory)
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)


def test_preempted_by_a_more_urgent_job(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.5})
    before = slurm.jobs()
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    slurm.run("sbatch", "-p", "urgent", "-N4", "--exclusive", "-t1", "-o/dev/null", "--wrap=sleep 10")
    said, _ = child.communicate(timeout=240)
    assert child.returncode == 0, said
    assert [a["outcome"] for a in attempts(trajectory)] == ["ended", "done"]
    assert len(slurm.jobs().keys() - before.keys()) == 2
    demo.check_never_lost(trajectory)


def test_a_node_that_fails(slurm: Box, demo):
    demo.set("phase1", overrides={"sleep.seconds": 0.5})
    child = demo.start("pretrain/demo@phase1")
    trajectory = demo.wait_for("pretrain", 8, seconds=90)
    job = json.loads((trajectory / "lock").read_text())["job"]["id"]
    node = slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
    slurm.down(node)
    try:
        said, _ = child.communicate(timeout=240)
    finally:
        slurm.up(node)
        wait(lambda: "idle" in slurm.run("sinfo", "--noheader", "--exact", f"--nodes={node}", "--format=%T"), "node")
    assert child.returncode == 0, said
    assert [a["outcome"] for a in attempts(trajectory)] == ["died", "done"]
    demo.check_never_lost(trajectory)
