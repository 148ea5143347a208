"""`nemoflow show` of Slurm jobs."""

import json
from pathlib import Path

import pytest

from nemoflow import slurm, squeue
from nemoflow.cli import main

ID = "0123456789ab"


@pytest.fixture
def trajectory(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    found = tmp_path / f"artifacts/pretrain/toy-{ID}"
    (found / "attempts").mkdir(parents=True)
    (found / "attempts/2.log").write_text("said")
    (found / "launch.json").write_text(json.dumps({"title": "pretrain phase1 of demo"}))
    (found / "metrics.jsonl").write_text('{"iteration": 7, "loss": 2}\n{"iteration": 8, "lo')
    attempt = {"job": {"id": 5, "restarts": 0}, "at": 20, "outcome": "died", "nodes": ["n1", "n2"]}
    (found / "run.json").write_text(json.dumps({"attempts": [attempt]}))
    return found


def job(id: int, comment: str, **more) -> slurm.Job:
    settings = {"state": "RUNNING", "restarts": 1, "nodes": ["n3"], "end": None, "partition": "batch", "excluded": []}
    return slurm.Job(**settings | {"id": id, "comment": comment, "workdir": str(Path.cwd())} | more)


def show(capsys, *arguments: str) -> str:
    main(["show", *arguments])
    return capsys.readouterr().out


@pytest.mark.usefixtures("trajectory")
def test_jobs_have_the_names_that_people_know(monkeypatch, capsys):
    jobs = [
        job(6, f"rule_pretrain_wildcards_toy_{ID}_20"),
        job(7, "rule_shards_wildcards_words_aaaaaaaaaaaa", state="PENDING", nodes=[], restarts=0),
        job(8, "somebody else's"),
        job(9, f"rule_pretrain_wildcards_toy_{ID}_20", workdir="/elsewhere"),
    ]
    monkeypatch.setattr(slurm, "mine", lambda: jobs)
    head, first, log, second = show(capsys).splitlines()
    assert head.split() == ["job", "state", "what", "progress", "nodes"]
    assert first == "6    running, slot 2  pretrain phase1 of demo to 20  iteration 7  n3"
    assert log.strip() == "artifacts/pretrain/toy-0123456789ab/attempts/2.log"
    assert second.split() == ["7", "pending", "shards", "aaaaaaaaaaaa"]
    monkeypatch.setattr(slurm, "mine", list)
    assert show(capsys) == "no Slurm job of this directory waits or runs\n"


@pytest.mark.usefixtures("trajectory")
def test_an_id_is_known_after_slurm_forgot_it(monkeypatch, capsys):
    monkeypatch.setattr(slurm, "job", lambda _: None)
    assert "pretrain phase1 of demo to 20  iteration 7  n1,n2" in show(capsys, "5")
    with pytest.raises(SystemExit):
        main(["show", "4"])
    assert capsys.readouterr().err == "nemoflow: error: 4: no Slurm job of this directory has this id\n"


@pytest.mark.parametrize(
    ("comment", "means"),
    [
        (f"rule_pretrain_wildcards_toy_{ID}_20", ("pretrain", ID, 20)),
        (f"rule_hf_export_wildcards_nano-3_bf16_{ID}", ("hf_export", ID, None)),
        (f"rule_seal_wildcards_pretrain_toy_{ID}_20", ("seal", ID, 20)),
        ("", None),
        ("rule_all", None),
    ],
)
def test_what_the_plugin_says_of_a_job(comment, means):
    assert squeue._of(comment) == means
