"""What the main process knows: names and links, the plan, what is written before jobs, what is said after."""

import json
import shutil
from pathlib import Path

import pytest
import sleep_engine
from graph import DEMO, write_demo

from nemoflow import locks
from nemoflow.errors import NemoflowError
from nemoflow.session import Session, remove, show, shown
from nemoflow.stages import Recipe
from nemoflow.store import Store, publish, seal

RECIPES = [Path("config/recipes")]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current directory holds the locked demo recipe."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)


def asked(*targets: str) -> Session:
    session = Session("artifacts", RECIPES)
    session.request(targets)
    return session


def trajectory(name: str):
    return Recipe("demo", RECIPES, Store("artifacts")).stages[name].stage


def reach(stage, *states: int) -> None:
    """Checkpoints as the sleep engine leaves them."""
    for n in states:
        directory = stage.directory / f"checkpoints/{n}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text("x")
    assert sleep_engine.states(stage.directory / "checkpoints").keys() >= set(states)


def finish(session: Session) -> None:
    """Seal everything behind the session's names, as the jobs would, and make the names."""
    for name, view in session.names.items():
        for target in view.values():
            for stage, at in session.store.ancestors(target.stage.identity, target.at):
                if stage.sealed(at) is None:
                    stage.state(at).mkdir(parents=True, exist_ok=True)
                    seal(stage, at, {"tokens": 1234, "loss": 2.5}, [])
        show(Path(name), session.links(name))


# -- names -------------------------------------------------------------------------------------------------------------


def test_asking_freezes_what_is_needed_and_nothing_else():
    session = asked("sft/demo")
    frozen = {p.stem for p in Path("artifacts/.stages").glob("*.json")}
    recipe = session.recipes["demo"]
    assert {recipe.stages[n].stage.identity for n in ("phase1", "phase2", "sft")} < frozen
    assert recipe.stages["rl"].stage.identity not in frozen
    for key in frozen:
        assert Store("artifacts").load(key).payload == session.store.load(key).payload


def test_only_the_recipes_that_are_asked_for_are_read():
    (RECIPES[0] / "broken.yaml").write_text("stages: [")
    assert list(asked("sft/demo", "artifacts/sft/x/artifact.json", "logs/x", "help").recipes) == ["demo"]


def test_resolving_writes_nothing():
    before = set(Path().rglob("*"))
    Session("artifacts", RECIPES).resolve(["rl/demo", "data/demo"])
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize("target", ["sft/demo", "sft//demo", "./sft/demo", "sft/demo/"])
def test_a_name_may_be_spelled_as_a_path(target):
    assert list(asked(target).names) == ["sft/demo"]


@pytest.mark.parametrize(
    "target",
    [
        "sft/../demo",
        "sft/a/b",
        "data/@sft",
        "sft/demo@",
        "sft/demo:",
        "sft/demo:x",
        "sft/demo:0",
        "sft/demo:-1",
        "sft/demo:+3",
        "sft/demo:²",
    ],
)
def test_what_looks_like_a_name_and_is_none(target):
    with pytest.raises(NemoflowError):
        asked(target)
    assert not Path("artifacts/.stages").exists()


def test_a_bad_name_among_good_ones_changes_nothing():
    finish(asked("sft/demo"))
    (RECIPES[0] / "demo.yaml").write_text(DEMO.replace("0.001", "0.002"))
    with pytest.raises(NemoflowError):
        asked("sft/demo", "sft/demoo")
    assert Path("sft/demo").is_symlink()


def test_a_link_that_shows_something_else_is_dropped_and_one_that_shows_today_is_kept():
    finish(asked("sft/demo", "pretrain/demo", "data/demo"))
    inode = Path("pretrain/demo").lstat().st_ino
    (RECIPES[0] / "demo.yaml").write_text(DEMO.replace("toy_sft_config", "other_sft_config"))
    session = asked("sft/demo", "pretrain/demo", "data/demo")
    assert shown(Path("sft/demo")) is None
    assert Path("pretrain/demo").lstat().st_ino == inode
    assert Path("data/demo").is_dir()
    assert session.broken() == ["sft/demo"]


def test_names_without_an_artifact_behind_them_are_broken():
    session = asked("sft/demo", "data/demo")
    assert session.broken() == ["sft/demo", "data/demo"]
    finish(session)
    assert session.broken() == []
    (Path("sft/demo") / "artifact.json").unlink()
    assert session.broken() == ["sft/demo"]


# -- links on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, {"": "../old"}, {"a": "../../x", "b": "../../y"}])
@pytest.mark.parametrize("after", [{"": "../new"}, {"b": "../../z", "c": "../../x"}])
def test_a_name_shows_what_it_was_last_told(before, after):
    name = Path("data/demo")
    if before:
        show(name, before)
    show(name, after)
    assert shown(name) == after
    assert [p.name for p in name.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("strange", ["file", "directory"])
def test_what_a_person_put_there_is_not_removed(strange):
    name = Path("sft/demo")
    name.parent.mkdir()
    if strange == "file":
        name.write_text("precious")
    else:
        name.mkdir()
        (name / "precious").write_text("x")
    for action in (lambda: remove(name), lambda: show(name, {"": "../x"}), lambda: asked("sft/demo")):
        with pytest.raises(NemoflowError, match="stands where nemoflow keeps the name sft/demo; move it away"):
            action()
    assert name.exists()
    assert [p.name for p in name.parent.iterdir()] == ["demo"]


# -- inputs and the plan -----------------------------------------------------------------------------------------------


def test_training_waits_for_its_blend_and_the_shards_behind_it():
    session = asked("pretrain/demo@phase2")
    phase2 = session.recipes["demo"].stages["phase2"].stage
    kinds = [Path(p).parts[1] for p in session.inputs(phase2.identity, 40)]
    assert kinds == ["pretrain", "index", "blend", "merge", "merge", "tokenizer"]
    assert session.inputs(phase2.identity, 40)[0].endswith("/at-20/artifact.json")


def test_a_later_state_waits_for_the_earlier_one_that_is_asked_for_too():
    both, one = asked("pretrain/demo@phase1", "pretrain/demo@phase1:10"), asked("pretrain/demo@phase1")
    key = one.recipes["demo"].stages["phase1"].stage.identity
    assert [p for p in both.inputs(key, 20) if p not in one.inputs(key, 20)] == [
        str(trajectory("phase1").directory / "at-10/artifact.json")
    ]
    assert both.inputs(key, 10) == one.inputs(key, 10)


def test_the_plan_tells_new_from_resumed_reached_and_finished():
    session, phase2 = asked("pretrain/demo"), trajectory("phase2")
    assert session.plan(phase2.identity, 40) == "new, iterations 21 to 40"
    reach(phase2, 25, 30)
    assert session.plan(phase2.identity, 40) == "resume, 30 of 40 done"
    assert session.plan(phase2.identity, 25) == "reached 25; is sealed, without training"
    with pytest.raises(NemoflowError, match=r"pretrain phase2 of demo: state 27: .* at 30, and kept 25, 30; choose"):
        session.plan(phase2.identity, 27)
    finish(session)
    assert session.plan(phase2.identity, 40) == "finished; only its record is written again"
    assert asked("tokenizer/demo").plan(session.recipes["demo"].tokenizer, None).startswith("finished")


# -- what is written before jobs ---------------------------------------------------------------------------------------


def test_what_is_no_identity_goes_beside_the_artifact():
    text = DEMO.replace("optimizer.lr: 0.001", "optimizer.lr: 0.001, sleep.seconds: 3")
    (RECIPES[0] / "demo.yaml").write_text(text)
    session = asked("pretrain/demo")
    session.prepare()
    launch = json.loads((trajectory("phase1").directory / "launch.json").read_text())
    assert launch == {
        "guard": {"hang": "20", "hang_least": "10m", "patience": 20, "spike": "3"},
        "keep": {"every": None, "last": 2},
        "overrides": {"sleep.seconds": 3},
        "cluster": {"launcher": "here"},
        "resources": {"gpu": None, "gpus_per_node": 1, "memory": None, "nodes": 1, "slots": 50, "time": "4h"},
        "save_interval": 5,
        "title": "pretrain phase1 of demo",
    }
    assert sorted(p.name for p in (trajectory("phase1").directory / "wanted").iterdir()) == ["10", "20"]
    words = session.store.load(session.recipes["demo"].raw["words"].identity)
    paths = json.loads((words.directory / "launch.json").read_text())["paths"]
    assert paths == [str(Path("raw/0.jsonl").absolute()), str(Path("raw/1.jsonl").absolute())]
    assert not trajectory("sft").directory.exists(), "nothing of what is not asked for"


def test_wanted_states_are_a_union_over_time():
    asked("pretrain/demo@phase1").prepare()
    (RECIPES[0] / "demo.yaml").write_text(DEMO.replace("milestones: [10]", "milestones: [12]"))
    asked("pretrain/demo@phase1").prepare()
    assert sorted(p.name for p in (trajectory("phase1").directory / "wanted").iterdir()) == ["10", "12", "20"]


def test_missing_raw_files_matter_to_those_who_read_them_only():
    session = asked("sft/demo")
    words = session.recipes["demo"].raw["words"].identity
    shutil.rmtree("raw")
    session = asked("sft/demo")
    session.check_raw_files([trajectory("sft").identity])
    with pytest.raises(NemoflowError, match=r"demo.yaml: raw/0.jsonl is missing, which its lock pins; .*nemoflow lock"):
        session.check_raw_files([words])


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_summary_has_a_line_for_each_artifact_in_human_names():
    session = asked("sft/demo", "pretrain/demo")
    finish(session)
    lines = session.summary().splitlines()
    assert lines[0].split() == ["artifact", "tokens", "result", "seconds", "path"]
    (phase2,) = (line for line in lines if line.startswith("pretrain phase2 of demo to 40"))
    assert "1,234" in phase2
    assert "loss 2.50" in phase2
    assert phase2.endswith(str(trajectory("phase2").state(40)))
    assert sum(line.startswith("pretrain phase1 of demo") for line in lines) == 1
    assert lines[-1] == f"pretrain/demo -> ../{trajectory('phase2').state(40)}"


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_is_published_from_what_is_sealed_and_never_over_something_else():
    finish(asked("tokenizer/demo"))
    directory = Path("tokenizer/demo")
    sealed = (directory / "sealed.json").read_text()
    assert (directory / "sealed.json").stat().st_mode & 0o777 == 0o444
    (directory / "artifact.json").unlink()
    publish(directory)
    assert (directory / "artifact.json").read_text() == sealed
    (directory / "artifact.json").write_text("{}")
    with pytest.raises(NemoflowError, match=r"artifact.json: differs from sealed.json beside it"):
        publish(directory)


def test_a_record_says_inputs_with_their_digests_and_nothing_of_names_and_places():
    finish(asked("sft/demo"))
    text = Path("sft/demo/artifact.json").read_text()
    record = json.loads(text)
    assert [i["role"] for i in record["inputs"]] == ["init", "data", "tokenizer"]
    assert record["inputs"][0]["at"] == 40
    assert all(len(i["sha256"]) == 64 for i in record["inputs"])
    assert str(Path.cwd()) not in text
    assert "demo" not in text


def test_a_frozen_stage_never_changes():
    session = asked("tokenizer/demo")
    key = session.recipes["demo"].tokenizer
    path = session.store.stage_file(key)
    before = path.read_text(), path.stat().st_mtime_ns
    asked("tokenizer/demo")
    assert (path.read_text(), path.stat().st_mtime_ns) == before
    path.write_text(before[0].replace("280", "281"))
    with pytest.raises(NemoflowError, match="holds another stage"):
        asked("tokenizer/demo")
    with pytest.raises(NemoflowError, match="damaged: its content has the identity"):
        Store("artifacts").load(key)
    with pytest.raises(NemoflowError, match="no such stage"):
        Store("artifacts").load("0" * 12)
