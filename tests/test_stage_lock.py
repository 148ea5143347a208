"""`nemoflow lock --stages`: a recipe is held to its stages."""

import json
from pathlib import Path

import pytest
from graph import DEMO, write_demo

from nemoflow import stage_lock
from nemoflow.cli import main
from nemoflow.errors import NemoflowError
from nemoflow.session import Session

RECIPE, FILE = Path("config/recipes/demo.yaml"), Path("config/recipes/demo.stages.json")


@pytest.fixture(autouse=True)
def locked(tmp_path, monkeypatch, capsys):
    """The current directory holds the demo recipe with both its locks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemoflow.cli.RECIPES", [Path("config/recipes")])
    write_demo(tmp_path)
    main(["lock", "demo", "--stages"])
    assert "demo: wrote config/recipes/demo.stages.json; commit it" in capsys.readouterr().out
    assert Path("config/recipes/demo.lock.json").exists(), "what it reads has to be pinned first"


def edit(old: str, new: str, name: str = "demo") -> None:
    assert old in DEMO
    RECIPE.with_name(f"{name}.yaml").write_text(DEMO.replace(old, new, 1))


def resolve(name: str) -> Session:
    session = Session("artifacts", [Path("config/recipes")])
    session.resolve([name])
    return session


def refused(name: str = "sft/demo") -> str:
    with pytest.raises(NemoflowError) as error:
        resolve(name)
    return str(error.value)


def test_an_untouched_recipe_is_as_free_as_before():
    resolve("hf_export/demo")
    edit("  sleep_engine: {optimizer.lr: 0.001", "  sleep_engine: {sleep.seconds: 3, optimizer.lr: 0.001")
    resolve("hf_export/demo")


def test_an_edit_that_makes_another_stage_is_refused_with_the_setting(capsys):
    edit("optimizer.lr: 0.001", "optimizer.lr: 0.002")
    assert refused() == (
        "config/recipes/demo.yaml: stages[phase1]: is locked by demo.stages.json, and would be another stage: "
        "pretrain toy: overrides.optimizer.lr: 0.001 -> 0.002; bring it back, write it in a recipe of another name "
        "(extends: demo), or lock it anew: nemoflow lock demo --stages"
    )
    with pytest.raises(SystemExit):
        main(["check", "demo"])
    assert "overrides.optimizer.lr: 0.001 -> 0.002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{words: 1/2, lines: 1/2}", "{words: 1/4, lines: 3/4}", "parts"),
        ("args: {count: 60}", "args: {count: 61}", "source arithmetic-chats: args.count: 60 -> 61"),
        ("    until: 20\n    milestones: [10]", "    until: 30\n    milestones: [10]", "init.at: 20 -> 30"),
        ("vocab_size: 280", "vocab_size: 290", "vocab_size: 280 -> 290"),
        (
            "engine: sleep_engine\n    algorithm: grpo",
            "version: 2\n    engine: sleep_engine\n    algorithm: grpo",
            "version: 1 -> 2",
        ),
    ],
)
def test_the_deepest_cause_is_named(old, new, says):
    edit(old, new)
    assert says in refused()


def test_what_is_no_other_stage_is_accepted():
    """More states of a training, and more stages."""
    edit("    until: 8\n", "    until: 12\n    milestones: [6]\n")
    assert resolve("rl/demo").names["rl/demo"][""].at == 12
    more = "  - {name: sft2, kind: sft, engine: sleep_engine, function: toys.toy_sft_config, until: 3, horizon: 30,\n"
    more += "     init: {from: phase2, carry: weights}, data: {chats: {sums: 1}, pack_size: 128}}\n"
    RECIPE.write_text(DEMO + more)
    resolve("sft/demo@sft2")


def test_a_stage_that_is_gone_is_refused():
    RECIPE.write_text(DEMO[: DEMO.index("  - name: rl")])
    assert "stages[rl]: is locked by demo.stages.json, and is not there any more" in refused()


def test_changed_raw_data_are_named():
    Path("raw/0.jsonl").write_text('{"text": "another"}\n' * 50)
    main(["lock", "demo"])
    assert "source jsonl-2-files: files" in refused()


def test_another_name_is_free_and_shares_what_is_the_same():
    before = resolve("sft/demo").recipes["demo"]
    edit("init: {from: phase2, carry: weights}", "init: {from: phase2, carry: weights}\n    version: 2", "other")
    RECIPE.with_name("other.lock.json").write_text(RECIPE.with_name("demo.lock.json").read_text())
    other = resolve("sft/other").recipes["other"]
    assert other.stages["phase2"].stage.identity == before.stages["phase2"].stage.identity
    assert other.stages["sft"].stage.identity != before.stages["sft"].stage.identity


def test_locking_anew_accepts_what_is_there():
    edit("optimizer.lr: 0.001", "optimizer.lr: 0.002")
    main(["lock", "demo", "--stages"])
    resolve("sft/demo")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged"),
        ("{}", "damaged"),
        (json.dumps({"schema": 2}), "schema: 2: this nemoflow reads up to 1"),
        (json.dumps({"schema": 1, "stages": {"phase1": ["0123456789ab"]}, "defined": {}}), "damaged"),
    ],
)
def test_a_broken_file_is_one_error(text, says):
    FILE.write_text(text)
    assert says in refused()


def test_long_lists_stand_by_their_digest():
    payload = {"kind": "source", "files": [{"name": str(n)} for n in range(10_000)], "format": "jsonl"}
    condensed = stage_lock._condensed(payload)
    assert condensed["files"].startswith("10,000 entries, sha256 ")
    payload["files"][17]["name"] = "other"
    assert stage_lock._condensed(payload) != condensed
