"""Which trainings go on by themselves in the next slot, as run.json tells it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemoflow import slots


def attempt(outcome: str, start: int, reached: int, job: int = 7) -> dict:
    return {"outcome": outcome, "from": start, "reached": reached, "reason": f"{outcome} here", "job": {"id": job}}


@pytest.mark.parametrize("outcome", ["unfinished", "died", "hung"])
def test_progress_goes_on(outcome):
    assert slots.why_not([attempt("died", 0, 0), attempt(outcome, 0, 5)], 7, 50) is None
    assert slots.why_not([attempt(outcome, 0, 5), attempt(outcome, 5, 5)], 7, 50) is None, "once without is forgiven"


def test_two_in_a_row_without_progress_end_it():
    why = slots.why_not([attempt("died", 0, 5), attempt("hung", 5, 5), attempt("died", 5, 5)], 7, 50)
    assert why == "two slots in a row saved nothing beyond iteration 5; the last one: died here"


def test_idle_slots_of_a_job_before_do_not_count():
    before = [attempt("died", 0, 0, job=6), attempt("died", 0, 0, job=6)]
    assert slots.why_not([*before, attempt("died", 0, 0)], 7, 50) is None


def test_the_cap():
    own = [attempt("unfinished", n, n + 1) for n in range(3)]
    assert slots.why_not(own, 7, 4) is None
    assert "has had 3 slots, which is the stage's cap" in slots.why_not(own, 7, 3)


def test_what_a_person_has_to_mend_does_not_go_on():
    assert slots.why_not([attempt("failed", 0, 5)], 7, 50) == "failed here"
    assert slots.why_not([attempt("died", 0, 5, job=6)], 7, 50) == "it wrote no record"


@pytest.fixture
def stage(tmp_path: Path):
    """A trajectory with a checkpoint at 5, whose job was killed: its second attempt has no outcome."""
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    (tmp_path / "checkpoints/5/weights").touch()
    (tmp_path / "checkpoints/9").mkdir()  # not complete
    killed = {"from": 0, "job": {"id": 7}}
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [attempt("died", 0, 0), killed]}))
    (tmp_path / "launch.json").write_text('{"resources": {"slots": 3}}')
    return SimpleNamespace(directory=tmp_path, payload={"engine": "sleep_engine"}, sealed={}.get)


def test_what_slurm_ended_is_given_its_outcome(stage):
    assert slots.ended(stage, 20, 7, "NODE_FAIL") is None
    last = json.loads((stage.directory / "run.json").read_text())["attempts"][-1]
    assert (last["outcome"], last["reached"], last["reason"]) == ("died", 5, "Slurm ended it: node fail")


def test_an_outcome_that_is_written_stays(stage):
    path = stage.directory / "run.json"
    path.write_text(json.dumps({"attempts": [attempt("failed", 0, 5)]}))
    before = path.read_bytes()
    assert slots.ended(stage, 20, 7, "FAILED") == "failed here"
    assert path.read_bytes() == before


def test_finished_or_without_a_record(stage):
    stage.sealed = {20: {"at": 20}}.get
    assert slots.ended(stage, 20, 7, "COMPLETED") == "it is finished"
    stage.sealed = {}.get
    (stage.directory / "run.json").unlink()
    assert slots.ended(stage, 20, 7, "TIMEOUT") == "it wrote no record"


def test_a_trajectory_that_carries_all_on_starts_where_its_parent_ended(stage, tmp_path):
    stage.directory = tmp_path / "empty"
    stage.payload = {"engine": "sleep_engine", "init": {"carry": "all", "at": 30}}
    assert slots.reached(stage) == 30
    stage.payload = {"engine": "sleep_engine", "init": {"carry": "weights", "at": 30}}
    assert slots.reached(stage) == 0
