"""Reports: what is in them, and Snakemake's page of them in a browser."""

import json
import re
from pathlib import Path

import pytest
from archives import pretraining
from browser import opened
from graph import Work

from nemoflow.errors import NemoflowError
from nemoflow.report import FILES, made
from nemoflow.session import Session
from nemoflow.store import dump, record


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(name: Path) -> set[str]:
    return {p.name for p in name.iterdir() if not p.is_symlink() and not p.name.startswith(".")}


def report(work: Path, *artifacts: Path) -> Path:
    """The report of artifacts, as the rule makes it."""
    name = work / "report/toy"
    made.write(name, {f"link{i}": f"../../{a.relative_to(work)}" for i, a in enumerate(artifacts)})
    return name


def evaluated(archive, export: Path, samples: list[dict]) -> Path:
    """An evaluation of an export with these lines in samples.jsonl."""
    identity = archive.seal(
        "eval",
        measures={"metric": "acc", "metrics": {"acc": {"value": 0.5, "stderr": 0.01}}, "samples": len(samples)},
        of=export.name[-12:],
        task={"name": "toys"},
        data={},
        harness="0.4.13",
    )
    directory = archive.directory(identity)
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return directory


def exported(work: Work) -> None:
    """Seal the export of the demo's SFT: what sleeps trains no weights that could be converted."""
    session = Session(work.path / "artifacts", [work.path / "config/recipes"])
    session.resolve(["hf_export/demo@sft"])
    stage = session.names["hf_export/demo@sft"][""].stage
    session.store.freeze(stage.identity)
    stage.directory.mkdir(parents=True)
    for name in ("sealed.json", "artifact.json"):
        (stage.directory / name).write_text(dump(record(stage, None, {"parameters": 7}, [])))


def test_everything_is_made_in_one_page(demo, monkeypatch):
    monkeypatch.chdir(demo.path)
    exported(demo)
    demo.run("report/demo@sft")
    assert files(demo.path / "report/demo@sft") == {"stages.html", "loss.svg", "tokens.svg"}
    stages = (demo.path / "report/demo@sft/stages.html").read_text()
    assert [t for t in ("pretrain phase1 of demo to 20", "sft of demo to 12", "rl of demo") if t in stages] == [
        "pretrain phase1 of demo to 20",
        "sft of demo to 12",
    ]
    done = demo.snakemake("report/demo@sft", "--report", "demo.html")
    assert done.returncode == 0, done.stdout
    with opened(demo.path / "demo.html", warnings=False) as page:
        page.get_by_text("Curves", exact=True).click()
        page.locator("tr", has_text="loss").locator("a[iconname=eye]").click()
        page.wait_for_selector("img[src*='loss.svg']")
        assert page.locator("img[src*='loss.svg']").evaluate("image => image.complete && image.naturalWidth > 300")
        page.locator("tr", has_text="loss").locator("a[iconname=information-circle]").click()
        page.get_by_text("Training loss of every iteration").wait_for()

    assert demo.planned("report/demo@sft") == {}
    demo.set("sft", overrides={"optimizer.lr": 0.002})
    planned = demo.planned("report/demo@sft")
    assert planned["report"] == planned["sft"] == 1, "a report of other artifacts is drawn anew"
    demo.run("sft/demo")
    exported(demo)
    demo.run("report/demo@sft")

    (demo.path / "report/demo@sft/notes.txt").write_text("mine")
    demo.set("sft", overrides={"optimizer.lr": 0.003})
    assert "stands where nemoflow keeps the name" in demo.refused("report/demo@sft")
    assert (demo.path / "report/demo@sft/notes.txt").read_text() == "mine"


def test_tokens_hours_and_curves_of_a_cluster(work):
    _, export = pretraining(work, sources=2, shards=1)
    (run,) = (work / "artifacts/pretrain").iterdir()
    resources = {"nodes": 2, "gpus_per_node": 4, "time": "4h", "slots": 3}
    (run / "launch.json").write_text(json.dumps({"cluster": {"launcher": "slurm"}, "resources": resources}))
    attempts = [{"number": n, "seconds": 1800.0, "gpus": 8, "device": "H100", "outcome": "killed"} for n in (1, 2)]
    (run / "run.json").write_text(json.dumps({"attempts": attempts}))
    lines = [{"iteration": n, "loss": 3.0, "seconds": 2.0, "tokens": 1000 * n} for n in range(1, 121)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    name = report(work, export)
    assert files(name) == {"stages.html", "loss.svg", "throughput.svg", "tokens.svg", "hours.svg"} < set(FILES)
    (one,) = made.found(made.graph.kept(made.lineage.load(export)))
    assert one.sources == {"web-000": 500_000, "web-001": 500_000}
    assert (one.planned, one.spent, one.hours, one.attempts) == (96, 8, 1, 2)
    assert max(one.metrics) == 100, "what was trained beyond the state belongs to another"
    _, speed, unit = made.draw._rates(one)
    assert (set(speed), unit) == ({500.0}, "tokens per second")
    assert {"96.00", "8.00"} <= set(re.findall("<td>(.*?)</td>", (name / "stages.html").read_text()))


def test_answers_are_shown_as_they_are(work):
    archive, export = pretraining(work, sources=1, shards=1)
    said = {
        "arguments": [["What is <b>2</b>?", {}]],
        "resps": [["<script>alert(1)</script>"]],
        "target": "4",
        "acc": 0.0,
    }
    likely = {
        "arguments": [["The sky is", " green"], ["The sky is", " blue"]],
        "resps": [[["-7.5", "False"]], [["-0.5", "True"]]],
        "target": 1,
        "acc": 1.0,
    }
    name = report(work, export, evaluated(archive, export, [said, likely] * 50))
    with opened(name / "generations.html") as page:
        rows = page.locator("tr")
        assert page.locator("h2").inner_text() == "toys: 60 of 100 questions"
        assert rows.count() == 61
        assert rows.nth(1).locator("td").all_inner_texts() == [
            "What is <b>2</b>?",
            "<script>alert(1)</script>",
            "4",
            "wrong",
        ]
        assert rows.nth(2).locator("td").all_inner_texts() == ["The sky is", " blue", "1", "right"]
    assert "0.500 ± 0.010" in (name / "scores.html").read_text()


@pytest.mark.parametrize(("kind", "file"), [("pretrain", "metrics.jsonl"), ("eval", "samples.jsonl")])
def test_damaged_records_are_named(work, kind, file):
    archive, export = pretraining(work, sources=1, shards=1)
    asked = evaluated(archive, export, [])
    (directory,) = (work / f"artifacts/{kind}").iterdir()
    (directory / file).write_text('{"iteration": 1, "lo\n')
    with pytest.raises(NemoflowError, match=f"{file}: is damaged"):
        report(work, export, asked)
    assert not (work / "report/toy").exists()
