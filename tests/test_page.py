"""The page of `nemoflow graph`, looked at in a browser."""

import json
import re
import time
from pathlib import Path

import pytest
from archives import pretraining
from browser import opened
from graph import write_demo

from nemoflow import cli

TRAINED = "artifacts/pretrain"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(page) -> list[str]:
    """Ids of what is drawn, boxes apart."""
    return page.evaluate("lineage.cy.nodes().filter('.artifact, .group, .dot').map(node => node.id())")


def click(page, selector: str) -> None:
    """Click where a node is drawn, with the mouse."""
    where = page.evaluate(f"lineage.cy.nodes({json.dumps(selector)})[0].renderedPosition()")
    box = page.locator("#graph").bounding_box()
    page.mouse.click(box["x"] + where["x"], box["y"] + where["y"])
    page.wait_for_timeout(350)  # a second click sooner would be a double one


def title(page) -> str:
    return page.locator("#panel h2").inner_text()


def trained_with_records(work: Path) -> Path:
    """An export whose training has records of how it went."""
    _, export = pretraining(work, sources=2, shards=8)
    (run,) = (work / TRAINED).iterdir()
    common = {"started": "2026-11-01T10:00:00+00:00", "from": 0, "nodes": ["node1"], "gpus": 8, "device": "H100"}
    killed = {"number": 1, "seconds": 3600.0, "outcome": "killed", "slurm_job": 17, "reached": 40}
    done = {"number": 2, "seconds": 5400.0, "outcome": "done", "reached": 100, "command": ["torchrun", "train.py"]}
    attempts = [common | killed, common | done]
    (run / "run.json").write_text(json.dumps({"schema": 1, "attempts": attempts}))
    lines = [{"iteration": n, "loss": 8 / n**0.3} for n in range(1, 101)]
    lines += [{"iteration": 50, "valid_loss": 3.0}, {"iteration": 100, "valid_loss": 2.4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return export


def test_a_person_looks_at_a_training(work):
    export = trained_with_records(work)
    cli.main(["graph", str(export), "-o", "lineage.html"])
    with opened(work / "lineage.html") as page:
        # 2 merges stand alone; the 16 shards, in two groups, are drawn as two nodes
        assert len(drawn(page)) == 11
        assert page.evaluate("lineage.cy.nodes('.group').length") == 2
        assert page.evaluate("lineage.cy.nodes().every(n => isFinite(n.position().x) && isFinite(n.position().y))")
        assert page.locator("#legend").inner_text() == "25 complete"

        click(page, ".artifact[label ^= 'pretrain']")
        assert title(page).startswith("pretrain ")
        text = page.locator("#panel").inner_text()
        assert "overrides.optimizer.lr\t0.001" in text
        assert "GPU-hours\t20" in text, "1 and 1.5 hours on 8 GPUs"
        assert "1: killed" in text
        assert "1,000,000" in text
        assert page.locator("path[data-curve=loss]").count() == 1
        assert page.locator("path[data-curve=valid_loss]").count() == 1
        page.locator("summary", has_text="2: done").click()
        assert page.locator("pre", has_text="torchrun train.py").is_visible()
        assert re.search("nemoflow verify --deep .*artifacts/pretrain/", page.locator("#panel").inner_text())

        faded = "lineage.cy.nodes('.faded').length"
        assert page.evaluate(faded) == 0, "all of it is upstream or downstream"
        page.locator("[data-direction=down]").click()
        assert page.evaluate(faded) == 9, "all but the state and its export"
        page.locator("[data-direction=up]").click()
        assert page.evaluate(faded) == 1, "the export"

        page.locator("#panel a", has_text="index").first.click()
        assert title(page).startswith("index ")
        page.locator("#panel a").first.press("Enter")
        assert title(page).startswith("blend "), "by keyboard"
        page.mouse.click(5, 880)
        assert title(page) == "Artifacts", "a click beside them all"


def test_groups_open_and_close(work):
    export = trained_with_records(work)
    cli.main(["graph", str(export)])
    with opened(work / "lineage.html") as page:
        click(page, ".group")
        assert "8 artifacts that the same ones are made from" in page.locator("#panel").inner_text()
        assert "8,000" in page.locator("#panel").inner_text(), "tokens of all its shards"
        page.locator("#toggle").click()
        assert len(drawn(page)) == 18
        page.locator("#toggle").click()
        assert len(drawn(page)) == 11
        page.locator("#open").click()
        assert len(drawn(page)) == 25 == page.evaluate("lineage.cy.nodes('.artifact').length")
        page.locator("#close").click()
        assert len(drawn(page)) == 11
        page.locator("#search").fill("source web-001")
        assert title(page) == "1 found"
        page.locator("#panel a").click()
        assert "org/web-001" in page.locator("#panel").inner_text()


def test_what_is_not_made_yet_is_seen(work):
    write_demo(work)
    cli.main(["lock", "demo"])
    cli.main(["graph", "rl/demo"])
    with opened(work / "lineage.html") as page:
        count = page.evaluate("lineage.cy.nodes('.artifact').length")
        assert page.locator("#legend").inner_text() == f"{count} missing"
        assert page.evaluate("lineage.cy.nodes('.box').map(box => box.data('label'))").count("sft of demo") == 1
        click(page, ".artifact[label ^= 'sft of demo']")
        assert "missing: not made" in page.locator("#panel").inner_text()
        assert "snakemake sft/demo@sft:12" in page.locator("#panel").inner_text()


def test_three_thousand_shards_are_readable(work):
    _, export = pretraining(work, sources=30, shards=100)
    cli.main(["graph", str(export)])
    with opened(work / "lineage.html") as page:
        begun = time.monotonic()
        page.reload()
        page.wait_for_function("window.lineage")
        assert time.monotonic() - begun < 5
        assert len(drawn(page)) < 40
        assert "3,000 artifacts" in page.evaluate("lineage.cy.nodes('.group').map(node => node.data('label')).join()")
        begun = time.monotonic()
        click(page, "[label *= '3,000 artifacts']")
        page.locator("#toggle").click()
        assert page.evaluate("lineage.cy.nodes('.dot').length") == 3000
        assert time.monotonic() - begun < 10


def test_a_title_is_no_markup(work):
    _, export = pretraining(work, sources=1, shards=1)
    (run,) = (work / TRAINED).iterdir()
    (run / "launch.json").write_text(json.dumps({"title": "</script><img src=x onerror=alert(1)> of <b>"}))
    cli.main(["graph", str(export)])
    with opened(work / "lineage.html") as page:
        click(page, "[label *= 'onerror']")
        assert title(page) == "</script><img src=x onerror=alert(1)> of <b> to 100"
        assert page.locator("img").count() == 0
