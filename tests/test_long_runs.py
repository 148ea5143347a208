"""What keeps a training of weeks safe: leaving in time, pruning, room on the disk, divergence, and what is measured."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from graph import BASE, write_demo
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, make_blend, pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemoflow import job, locks, training
from nemoflow.engines.megatron_bridge import checkpoints, limits, tracking
from nemoflow.engines.megatron_bridge.index import check_validation
from nemoflow.engines.megatron_bridge.limits import GRACE, Clock, Guard
from nemoflow.errors import UNFINISHED_PREFIX, NemoflowError
from nemoflow.session import Session
from nemoflow.store import Store, seal

pytest_plugins = ["megatron_fixtures"]

OVERRIDES = MODEL | PRECISION | PRETRAIN


def leaves(run, **changes) -> str:
    """Why the trainer left before its end."""
    _, log = run.begin(**changes)
    assert run.server.end() == 0, log.read_text()[-3000:]
    said = [line for line in log.read_text().splitlines() if line.startswith(UNFINISHED_PREFIX)]
    assert len(said) == 1, log.read_text()[-3000:]
    return said[0].removeprefix(UNFINISHED_PREFIX)


def test_a_run_leaves_before_its_job_ends_and_when_asked_and_goes_on_with_the_same_digits(
    server, data, tmp_path, straight
):
    run = pretrain(server, data, tmp_path / "run")
    said = leaves(run, deadline=time.time() + GRACE)
    assert said.startswith("iteration 1 of 24, because the job ends at ")
    assert list(checkpoints.states(run.checkpoints)) == [1]

    stop = run.checkpoint(4)  # appears while iteration 4 is saved, and so is first seen after iteration 5
    said = leaves(run, wanted=[4], stop_file=str(stop), deadline=time.time() + 3600)
    assert said == f"iteration 5 of 24, because {stop} asked for it"
    assert list(checkpoints.states(run.checkpoints)) == [1, 4, 5]

    run.train(stop_file=str(tmp_path / "none"))
    assert run.digits() == straight.digits()


def test_what_is_kept_and_what_is_measured(server, data, tmp_path):
    run = pretrain(
        server,
        data,
        tmp_path,
        horizon=9,
        stop=9,
        wanted=[2],
        save_interval=2,
        keep={"last": 1, "every": 6},
        overrides=OVERRIDES | {"logger.wandb_project": "a project", "logger.mlflow_experiment": "an experiment"},
    )
    _, log = run.begin()
    assert server.end() == 0, log.read_text()[-3000:]
    assert list(checkpoints.states(run.checkpoints)) == [2, 6, 8, 9], "wanted, every sixth, the newest two"
    assert not list(run.checkpoints.glob(".*removed"))
    assert {e["iteration"] for e in run.lines() if "save_seconds" in e} == {2, 4, 6, 8, 9}

    warnings = [line for line in log.read_text().splitlines() if line.startswith("nemoflow: warning: ")]
    assert len(warnings) == 2, "one for each tracker that is not installed"
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    steps = [e for e in run.lines() if "loss" in e]
    for entry in steps:
        assert entry["tokens_per_second"] == pytest.approx(4 * 64 / entry["seconds"], rel=0.01)
        # Six operations a parameter and token, for the parameters a token meets, and some for attention and scan
        assert 1e5 < entry["tflops_per_gpu"] * 1e12 * entry["seconds"] / (4 * 64) < 1e7

    evaluated = [e for e in run.lines() if "valid_loss" in e]
    assert len(evaluated) == 3
    splits = []
    for entry in evaluated:
        a, b = entry["valid_losses"]["a"], entry["valid_losses"]["b"]
        assert a != b
        splits += [k for k in range(1, 8) if math.isclose((k * a + (8 - k) * b) / 8, entry["valid_loss"], abs_tol=2e-6)]
    assert len(splits) == 3, "the blend's loss is the mean over the eight samples"
    assert len(set(splits)) == 1, "of which each source has the same number every time"


def test_a_stage_of_one_source_has_its_loss_as_its_only_one(server, data, tmp_path):
    run = pretrain(server, data, tmp_path, blend=(("a", "1"),), horizon=1, stop=1).train()
    for entry in run.lines():
        if "valid_loss" in entry:
            assert entry["valid_losses"] == {"a": pytest.approx(entry["valid_loss"], abs=2e-6)}


UNCHECKED = {"rerun_state_machine.check_for_nan_in_loss": False, "ddp.check_for_nan_in_grad": False}


@pytest.mark.parametrize(
    ("checks", "told"),
    [({}, "Megatron found (NaN|Inf) in "), (UNCHECKED, "the (loss|gradient norm) is (NaN|infinite)")],
    ids=["by Megatron", "after the iteration"],
)
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(server, data, tmp_path, checks, told):
    overrides = OVERRIDES | {"optimizer.lr": 1e30, "optimizer.min_lr": 1e29, "optimizer.clip_grad": 0.0}
    overrides |= {"scheduler.lr_warmup_iters": 6, **checks}
    run = pretrain(server, data, tmp_path, overrides=overrides, save_interval=1)
    said = run.fails()
    at = int(re.search(r"iteration (\d+) \(samples", said)[1])
    assert f"(samples {4 * at - 4} to {4 * at - 1})" in said
    assert re.search(told, said)
    kept = checkpoints.states(run.checkpoints)
    assert list(kept) == list(range(1, at))
    assert f"edits: [{{at: {at - 1}, skip: 1}}]" in said
    assert all(math.isfinite(e["loss"]) for e in run.lines() if "loss" in e)


def test_a_loss_that_stays_high_stops_the_run(server, data, tmp_path):
    """Any loss here is above seven tenths of the usual ones; of those the resumed run knows the first from before."""
    guard = {"spike": 0.7, "patience": 4}
    run = pretrain(server, data, tmp_path, save_interval=3, guard=guard, keep={"last": 2, "every": None})
    leaves(run, deadline=time.time() + GRACE)
    said = run.fails()
    assert re.search(
        r"iteration 14 \(samples 52 to 55\): the loss is \d\.\d{3} and has been above 0\.7 times its ", said
    )
    assert "for 4 iterations; go on from 9 past this data, with `edits: [{at: 9, skip: 5}]`" in said
    assert list(checkpoints.states(run.checkpoints)) == [6, 9, 12], "nothing is pruned while the loss is high"


def test_the_guard_waits_for_patience_and_forgets_noise():
    guard = Guard(3.0, 3, [2.0] * Guard.MINIMUM)
    assert [guard.see(loss) for loss in (7.0, 7.0, 5.0, 7.0, 7.0, 7.0)] == [False] * 5 + [True]
    assert guard.median == 2.0, "high losses do not move it"
    early = Guard(3.0, 1, [2.0] * (Guard.MINIMUM - 1))
    assert not early.see(100.0), "too few to tell"
    off = Guard(None, 1, [2.0] * 20)
    assert not off.see(1e9)
    drifting = Guard(1.5, 2)
    assert not any(drifting.see(1.005**n) for n in range(1000)), "the median is of the latest only"


def test_the_clock_keeps_time_for_another_iteration_and_two_saves(monkeypatch):
    now = SimpleNamespace(time=lambda: 1000.0)
    monkeypatch.setattr(limits, "time", now)
    clock = Clock(2000.0, 900.0)
    clock.iterated()
    assert clock.margin == 2 * 100 + GRACE, "a save may take what the start took"
    for end, save in ((1010, 50), (1090, 20), (1100, 60)):
        now.time = lambda end=end: float(end)
        clock.iterated()
        clock.saved(save)
    assert clock.margin == 2 * 60 + 80 + GRACE
    now.time = lambda: 2000.0 - clock.margin - 1
    assert not clock.up()
    now.time = lambda: 2000.0 - clock.margin
    assert clock.up()
    assert not Clock(None, 0.0).up()


def test_what_may_be_pruned():
    assert checkpoints.prunable(range(10, 101, 10), {30}, last=2, every=40) == [10, 20, 50, 60, 70]
    assert checkpoints.prunable([1, 2, 3], (), last=0) == [1], "never fewer than two are kept"
    assert checkpoints.prunable([1, 2, 3], (), last=5) == []


def test_a_checkpoint_is_never_seen_half_removed(tmp_path):
    for n in (1, 2):
        (tmp_path / f"iter_{n:07d}").mkdir()
        for name in checkpoints.REQUIRED:
            (tmp_path / f"iter_{n:07d}" / name).write_bytes(b"12345")
        checkpoints.mark_complete(tmp_path / f"iter_{n:07d}")
    assert checkpoints.size(tmp_path / "iter_0000001") == 5 * len(checkpoints.REQUIRED)
    checkpoints.remove(tmp_path / "iter_0000001")
    assert [p.name for p in tmp_path.iterdir()] == ["iter_0000002"]
    (tmp_path / "iter_0000002").rename(tmp_path / ".iter_0000002.removed")  # killed while removing it
    assert checkpoints.states(tmp_path) == {}
    checkpoints.remove_incomplete(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_more_text_than_was_held_out_is_refused(data):
    blend = make_blend(data, (("a", "1/4"), ("b", "3/4")))
    held = {
        p["source"]: p["tokens"]["valid"] for p in json.loads((blend / "sealed.json").read_text())["measures"]["parts"]
    }
    most = int(4 * held["b"] / 0.75 / 64)
    check_validation(most, 64, blend)
    with pytest.raises(
        NemoflowError, match=rf"validation.eval_iters: .* held out of b 4.\d times: take at most {most:,} "
    ):
        check_validation(most + 1, 64, blend)


class Tracker:
    def __init__(self):
        self.calls = []

    def log(self, value):
        self.calls.append(value)
        if value == 2:
            raise ConnectionError("no route\nto host")


def test_a_tracker_that_fails_is_warned_of_once_and_left_alone(capsys):
    tracker = Tracker()
    state = SimpleNamespace(_wandb_logger=None)
    quiet = tracking._started("wandb", lambda _: tracker, state)
    assert state._wandb_logger is quiet
    assert tracking._started("wandb", lambda state: state._wandb_logger, state) is quiet
    for value in (1, 2, 3):
        quiet.log(value)
    assert tracker.calls == [1, 2]
    assert capsys.readouterr().out == (
        "nemoflow: warning: wandb: log failed (ConnectionError: no route to host): training goes on without it\n"
    )

    def start(_):
        raise RuntimeError("no key")

    logger = SimpleNamespace(wandb_project="p", wandb_exp_name="n", log_interval=1)
    assert tracking._started("wandb", start, SimpleNamespace(cfg=SimpleNamespace(logger=logger))) is None
    assert vars(logger) == {"wandb_project": None, "wandb_exp_name": None, "log_interval": 1}
    assert "cannot be started (RuntimeError: no key)" in capsys.readouterr().out


def test_saves_in_the_background_count_under_their_own_iteration(server, tmp_path):
    """When all is written, the loop is iterations further. (The device shim turns such saves off.)"""
    found = server.call("long_run_jobs:saved_late", str(tmp_path))
    assert found == {"complete": [4, 8], "saves": [{"iteration": 8, "save_seconds": pytest.approx(0.2, abs=0.1)}]}


def test_no_room_for_two_checkpoints_is_one_clear_error_before_training(server, data, tmp_path):
    """By an estimate from the parameters: the file format's own share, a third at this size, comes on top."""
    whole = pretrain(server, data, tmp_path / "whole", horizon=2, stop=2).train()
    size = checkpoints.size(whole.checkpoint(2))
    small = tmp_path / "small"
    small.mkdir()
    options = f"size={size // 1000 + 300}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = pretrain(server, data, tmp_path / "run", horizon=2, stop=2, checkpoints=str(small / "checkpoints"))
        said = run.fails(save_interval=1)
        estimate = re.search(r"no space left for two checkpoints: ([\d.]+) MB are needed and [\d.]+ MB free", said)
        assert 0.6 * 2 * size < float(estimate[1]) * 1e6 < 2 * size
        assert not run.lines()
        run.train()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(("fails", "logged"), [("init", 0), ("log", 0), ("finish", 4)])
def test_a_tracker_never_stops_training(server, data, tmp_path, fails, logged):
    run = pretrain(server, data, tmp_path, horizon=2, stop=2, overrides=OVERRIDES | {"logger.wandb_project": "p"})
    path = run.directory / "request.json"
    path.write_text(json.dumps(run.request), encoding="utf-8")
    _, log, _ = server.start("long_run_jobs:tracked", {"request": str(path), "fails": fails})
    assert server.end() == 0, log.read_text()[-3000:]
    assert list(run.digits()) == [1, 2]
    lines = log.read_text().splitlines()
    (warning,) = (line for line in lines if line.startswith("nemoflow: warning: "))
    assert f"ConnectionError: {fails}: no route to host" in warning
    assert sum(line.startswith("wandb: log {'lm loss") for line in lines) == logged, "of iterations and evaluations"
    if fails != "init":
        assert f"wandb: init {tmp_path.name}" in lines, "named like the trajectory"


def test_curves_show_each_iteration_once_after_a_run_that_was_killed(server, data, tmp_path):
    run = pretrain(server, data, tmp_path, horizon=4, stop=4, save_interval=2).train()
    shutil.rmtree(run.checkpoint(4))  # as if killed before its save: 3 and 4 are trained again
    run.train()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in curves.Scalars("lm loss")}
    assert [event.step for event in curves.Scalars("lm loss")] == [1, 2, 3, 4]
    assert losses == pytest.approx({n: digits[0] for n, digits in run.digits().items()})


# -- several processes -------------------------------------------------------------------------------------------------

PIPELINE = {
    "model.pipeline_model_parallel_size": 2,
    "model.hybrid_layer_pattern": "ME*ME*",  # experts in both stages, for Megatron-Core's report of their router
    "model.num_layers": 6,
}


def begin(run, **changes) -> Path:
    """Start the trainer as two processes: its log."""
    path = run.directory / "request.json"
    path.write_text(json.dumps(run.request | changes), encoding="utf-8")
    _, log, _ = run.server.start("world:run", {"request": str(path), "processes": 2})
    return log


def test_two_processes_leave_at_one_iteration_and_measure_each_source_as_one_does(server, data, tmp_path, straight):
    """Only the first sees the stop file, and only the last the loss."""
    run = pretrain(server, data, tmp_path, wanted=[5])
    log = begin(run, stop_file=str(run.checkpoint(5)))
    assert server.end() == 0, log.read_text()[-3000:]
    assert list(checkpoints.states(run.checkpoints)) == [5, 6]
    assert log.read_text().count(f"{UNFINISHED_PREFIX}iteration 6 of 24, because ") == 1
    assert list(run.digits()) == [1, 2, 3, 4, 5, 6]
    alone = {e["iteration"]: e["valid_losses"] for e in straight.lines() if "valid_losses" in e}
    for entry in (e for e in run.lines() if "valid_losses" in e):
        assert entry["valid_losses"] == pytest.approx(alone[entry["iteration"]], abs=1e-4)


def test_a_pipeline_stops_as_one_when_its_last_stage_sees_no_number(server, data, tmp_path):
    overrides = OVERRIDES | PIPELINE | {"optimizer.lr": 1e30, "optimizer.min_lr": 1e29, "optimizer.clip_grad": 0.0}
    overrides |= {"scheduler.lr_warmup_iters": 6, **UNCHECKED}
    run = pretrain(server, data, tmp_path, overrides=overrides)
    log = begin(run)
    assert server.end() == 1, log.read_text()[-3000:]
    said = {line for line in log.read_text().splitlines() if line.startswith("nemoflow: error: ")}
    assert len(said) == 1, "both say the same, or the first is the only one"
    assert re.search(
        r"iteration \d+ \(samples \d+ to \d+\): the (loss|gradient norm) is (NaN|infinite); no state", *said
    )
    assert not checkpoints.states(run.checkpoints)


# -- the driver --------------------------------------------------------------------------------------------------------


@pytest.fixture
def phase1(tmp_path, monkeypatch):
    """The demo's first stage, of which only training is left to do: its directory, and the command that does it."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)
    locks.write("demo", [Path("config/recipes")], Store("artifacts"), lambda _: None)
    session = Session("artifacts", [Path("config/recipes")])
    session.request(["pretrain/demo@phase1"])
    session.prepare()
    (target,) = session.names["pretrain/demo@phase1"].values()
    for stage, at in session.store.ancestors(target.stage.identity, target.at):
        if stage.kind != "pretrain":
            stage.state(at).mkdir(parents=True, exist_ok=True)
            seal(stage, at, {"tokens": 1234}, [])
    launch = json.loads((target.stage.directory / "launch.json").read_text())
    launch["overrides"] = {"sleep.seconds": 0.2}
    (target.stage.directory / "launch.json").write_text(json.dumps(launch))
    stage = str(session.store.stage_file(target.stage.identity))
    return target.stage.directory, [sys.executable, str(BASE / "scripts/pretrain.py"), "--stage", stage, "--at", "20"]


def start(command: list[str], **environment) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(BASE / "tests"), **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_job_that_left_in_time_is_unfinished_and_the_same_command_goes_on(phase1):
    directory, command = phase1
    ends = int(time.time()) + 1000
    child = start(command, NEMOFLOW_DEADLINE=str(ends))
    while not training.metrics(directory / "metrics.jsonl"):
        time.sleep(0.05)
    child.send_signal(signal.SIGUSR1)
    said = child.communicate()[0].splitlines()[-1]
    assert child.returncode == job.UNFINISHED
    at = max(training.metrics(directory / "metrics.jsonl"))
    assert at < 20
    assert f": stopped at iteration {at} of 20, because it was asked to stop; the same command goes on (log: " in said
    assert json.loads((directory / "request.json").read_text())["deadline"] == ends
    assert (directory / "stop").exists()

    launch = json.loads((directory / "launch.json").read_text())
    (directory / "launch.json").write_text(json.dumps(launch | {"overrides": {}}))
    child = start(command)
    output = child.communicate()[0]
    assert child.returncode == 0, output
    assert f"resumes at iteration {at} of 20" in output
    assert not (directory / "stop").exists()
    assert (directory / "at-20/artifact.json").exists()
    attempts = json.loads((directory / "run.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["unfinished", "done"]


def test_a_job_whose_checkpoints_do_not_fit_starts_no_trainer(phase1):
    directory, command = phase1
    (directory / "checkpoints/5").mkdir(parents=True)
    with (directory / "checkpoints/5/weights").open("w") as file:
        file.truncate(10**13)
    child = start(command)
    said = child.communicate()[0]
    assert child.returncode == 1
    assert re.search(r"checkpoints: no space left for two checkpoints: 20.0 TB are needed and [\d.]+ .B free; ", said)
    assert not (directory / "request.json").exists()


def test_a_deadline_that_is_no_time_is_one_clear_error(phase1):
    child = start(phase1[1], NEMOFLOW_DEADLINE="tomorrow")
    assert "NEMOFLOW_DEADLINE: tomorrow: must be in seconds since the epoch" in child.communicate()[0]
    assert child.returncode == 1
