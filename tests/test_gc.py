"""`nemoflow gc`: exactly what nothing reaches."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from graph import DEMO, write_demo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemoflow import gc, lineage, locks, slurm
from nemoflow.cli import main
from nemoflow.session import Session, show
from nemoflow.stages import Recipe
from nemoflow.store import Store, seal
from nemoflow.writer import Writer

RECIPES = [Path("config/recipes")]
BLENDS = {"1/2": "{words: 1/2, lines: 1/2}", "1/4": "{words: 1/4, lines: 3/4}"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemoflow.cli.RECIPES", RECIPES)
    monkeypatch.setattr(gc.shutil, "which", lambda _: None)


def recipe(name: str, lr: float = 0.001, milestones: tuple[int, ...] = (10,), share: str = "1/2", sft: int = 1) -> Path:
    """A variant of the demo, locked."""
    if not Path("raw").exists():
        write_demo(Path())
        (RECIPES[0] / "demo.yaml").unlink()
    text = DEMO.replace("optimizer.lr: 0.001", f"optimizer.lr: {lr}")
    text = text.replace("milestones: [10]", f"milestones: {list(milestones)}")
    text = text.replace("{words: 1/2, lines: 1/2}", BLENDS[share])
    text = text.replace("function: toys.toy_sft_config", f"function: toys.toy_sft_config\n    version: {sft}")
    path = RECIPES[0] / f"{name}.yaml"
    path.write_text(text)
    locks.write(name, RECIPES, Store("artifacts"), lambda _: None)
    return path


def make(name: str) -> set[Path]:
    """Finish all that a recipe asks for, as far as gc sees it; the directories of its artifacts."""
    session = Session("artifacts", RECIPES)
    session.request([n for n in Recipe(name, RECIPES, Store("artifacts")).names() if not n.startswith("eval/")])
    found = set()
    for view in session.names.values():
        for target in view.values():
            for stage, at in session.store.ancestors(target.stage.identity, target.at):
                directory = stage.state(at)
                found.add(directory)
                if stage.sealed(at):
                    continue
                directory.mkdir(parents=True)
                if stage.trained:
                    checkpoint = stage.directory / f"checkpoints/{at}"
                    checkpoint.mkdir(parents=True)
                    (checkpoint / "weights").write_text("x" * 1000)
                    (directory / "checkpoint").symlink_to(os.path.relpath(checkpoint, directory))
                    (stage.directory / "wanted").mkdir(exist_ok=True)
                    (stage.directory / f"wanted/{at}").touch()
                seal(stage, at, {}, [])
    return found


def there() -> set[Path]:
    return {p.parent for p in Path("artifacts").glob("**/sealed.json")}


def closure(directories: set[Path]) -> set[Path]:
    """These and all they come from, by their records alone."""
    found = lineage.load(*directories) if directories else lineage.Lineage()
    return {Path("artifacts") / artifact.address for artifact in found.artifacts.values()}


def newest(trainings: set[Path]) -> set[Path]:
    """The two newest states of these trainings."""
    found = set()
    for training in trainings:
        states = sorted(training.glob("at-*"), key=lambda p: int(p.name[3:]))
        found |= set(states[-2:])
    return found


VARIANT = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.001, 0.002]),
        "milestones": st.sampled_from([(), (5,), (5, 10), (10, 15)]),
        "share": st.sampled_from(["1/2", "1/4"]),
        "sft": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    variants=st.lists(VARIANT, min_size=5, max_size=5),
    deleted=st.sets(st.integers(0, 4)),
    locked=st.integers(0, 4),
    named=st.sets(st.integers(0, 4), max_size=2),
)
def test_exactly_the_unreached_goes(variants, deleted, locked, named):
    """Five recipes, of which some are deleted, one is held by a lock of its stages and some by their names."""
    with tempfile.TemporaryDirectory() as directory:
        before = Path.cwd()
        os.chdir(directory)
        try:
            exactly_the_unreached(variants, deleted, locked, named)
        finally:
            os.chdir(before)


def exactly_the_unreached(variants, deleted, locked, named):
    made = []
    for number, variant in enumerate(variants):
        recipe(f"r{number}", **variant)
        made.append(make(f"r{number}"))
    kept = set().union(*(made[n] for n in range(5) if n not in deleted))
    main(["lock", f"r{locked}", "--stages"])
    # Held with all its states, whoever asked for them
    held = {p.parent if p.name.startswith("at-") else p for p in made[locked] if p.parts[1] != "hf_export"}
    kept |= {p for p in there() if p in held or p.parent in held}
    session = Session("artifacts", RECIPES)
    for number in named:
        name = f"hf_export/r{number}@phase1"
        session.resolve([name])
        show(Path(name), session.links(name))
        kept.add(session.names[name][""].directory)
    for number in deleted:
        (RECIPES[0] / f"r{number}.yaml").unlink()
    kept = closure(kept)
    kept |= newest({p.parent for p in kept if p.name.startswith("at-")})
    main(["gc", "--delete"])
    assert there() == kept
    for state in there():
        if state.name.startswith("at-"):
            assert (state / "checkpoint/weights").exists()
    left = {p.stem for p in Path("artifacts/.stages").glob("*.json")}
    assert {p.name.rpartition("-")[2] for p in Path("artifacts").glob("[a-z]*/*")} <= left
    gone = {p for p in set().union(*made) - kept if p.name.startswith("at-")}
    assert not any((p.parent / f"wanted/{p.name[3:]}").exists() for p in gone)
    main(["gc", "--delete"])
    assert there() == kept


def test_it_lists_and_deletes_nothing_by_itself(capsys):
    recipe("one")
    made = make("one")
    recipe("one", lr=0.003)
    main(["gc"])
    said = capsys.readouterr().out
    assert there() == made
    assert "nemoflow gc --delete deletes them" in said
    assert "artifacts/rl/grpo-" in said
    main(["gc", "--json"])
    rows = json.loads(capsys.readouterr().out)["unreached"]
    assert {row["deleted"] for row in rows} == {False}
    assert {Path(row["directory"]).parts[1] for row in rows} == {"pretrain", "sft", "rl", "hf_export"}
    assert all(row["bytes"] > 1000 for row in rows if "rl" in row["directory"].split("/"))
    main(["gc", "--delete"])
    assert {p.parts[1] for p in there()} & {"pretrain", "sft", "rl", "hf_export"} == set()
    main(["gc"])
    assert capsys.readouterr().out.endswith("everything is reached by a name, a recipe or a lock\n")


def test_what_a_job_works_on_is_left_alone(capsys):
    recipe("one")
    make("one")
    training = Recipe("one", RECIPES, Store("artifacts")).stages["rl"].stage.directory
    (RECIPES[0] / "one.yaml").unlink()
    program = "import sys; from nemoflow.writer import Writer; from pathlib import Path; "
    program += "Writer(Path(sys.argv[1])).try_to_take(); print(flush=True); input()"
    command = [sys.executable, "-c", program, str(training / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        job.stdout.readline()
        main(["gc", "--delete"])
        assert f"left alone: process {job.pid} on " in capsys.readouterr().out
        job.communicate(b"\n")
    assert {p.parts[1] for p in there()} == {"rl"}
    main(["gc", "--delete"])
    assert there() == set()


def test_what_waits_in_slurm_is_left_alone(monkeypatch, capsys):
    recipe("one")
    make("one")
    identity = Recipe("one", RECIPES, Store("artifacts")).stages["sft"].stage.identity
    (RECIPES[0] / "one.yaml").unlink()
    job = slurm.Job(7, "PENDING", 0, [], None, "batch", f"rule_sft_wildcards_toy_{identity}_12", str(Path.cwd()), [])
    monkeypatch.setattr(gc.shutil, "which", lambda _: "/usr/bin/squeue")
    monkeypatch.setattr(slurm, "mine", lambda: [job])
    main(["gc", "--delete"])
    assert "left alone: Slurm job 7 is for it" in capsys.readouterr().out
    assert {p.parts[1] for p in there()} == {"sft"}


@pytest.mark.parametrize("file", ["one.yaml", "one.stages.json"])
def test_where_it_cannot_be_known_what_is_reached_nothing_is_deleted(file, capsys):
    recipe("one")
    made = make("one")
    (RECIPES[0] / file).write_text("{")
    with pytest.raises(SystemExit):
        main(["gc", "--delete"])
    assert file in capsys.readouterr().err
    assert there() == made


def test_an_interrupted_deletion_leaves_nothing_that_looks_whole(monkeypatch):
    recipe("one")
    make("one")
    (RECIPES[0] / "one.yaml").unlink()
    delete = shutil.rmtree

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gc.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["gc", "--delete"])
    (trash,) = Path("artifacts").glob("**/.trash-*")
    assert not (trash.with_name(trash.name.removeprefix(".trash-"))).exists()
    monkeypatch.setattr(gc.shutil, "rmtree", delete)
    main(["gc", "--delete"])
    assert not list(Path("artifacts").glob("**/.trash-*"))
    assert there() == set()


def test_the_lock_is_free_again():
    recipe("one", milestones=(5, 10, 15))
    make("one")
    recipe("one", milestones=(15,))
    training = Recipe("one", RECIPES, Store("artifacts")).stages["phase1"].stage.directory
    main(["gc", "--delete"])
    assert sorted(p.name for p in training.glob("at-*")) == ["at-15", "at-20"]
    assert sorted(p.name for p in (training / "checkpoints").iterdir()) == ["15", "20"]
    assert sorted(p.name for p in (training / "wanted").iterdir()) == ["15", "20"]
    assert Writer(training / "lock").try_to_take() is None
