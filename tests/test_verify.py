"""nemoflow verify: artifacts as they were sealed, and what is said of those that are not."""

import json
import shutil
from pathlib import Path

import pytest
from graph import write_demo

from nemoflow import locks, verify
from nemoflow import seal as digests
from nemoflow.errors import NemoflowError
from nemoflow.job import contents
from nemoflow.session import Session, show
from nemoflow.store import Store, seal

RECIPES = [Path("config/recipes")]


@pytest.fixture(autouse=True)
def session(tmp_path, monkeypatch) -> Session:
    """The demo's states, sealed as jobs do it: flat artifacts with digests, states with sizes alone."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)
    session = Session("artifacts", RECIPES)
    session.request(["pretrain/demo@phase1:10"])
    for target in session.names["pretrain/demo@phase1:10"].values():
        for stage, at in session.store.ancestors(target.stage.identity, target.at):
            directory = stage.state(at)
            (directory / "checkpoint").mkdir(parents=True)
            (directory / "checkpoint/weights").write_text("random numbers")
            listed = contents(directory)
            if stage.trained:
                listed = [{key: entry[key] for key in ("name", "size")} for entry in listed]
            seal(stage, at, {"tokens": 1}, listed)
    show(Path("pretrain/demo@phase1:10"), session.links("pretrain/demo@phase1:10"))
    return session


def state() -> Path:
    return next(Path("artifacts/pretrain").glob("*/at-10"))


def tokenizer() -> Path:
    return next(Path("artifacts/tokenizer").iterdir())


def found(deep: bool = False) -> list[str]:
    """The problems of the state and all it comes from."""
    checked, _ = verify.verify([state()], deep, print)
    return [problem for one in checked for problem in one.problems]


def overwrite(file: Path, text: str) -> None:
    file.chmod(0o644)
    file.write_text(text)


@pytest.mark.parametrize("deep", [False, True])
def test_what_was_sealed_is_fine(deep):
    checked, gone = verify.verify([state()], deep, print, threads=2)
    assert gone == []
    assert [one.problems for one in checked] == [[]] * len(checked)
    assert checked[-1].directory == state().resolve()
    assert {one.directory.parent.name for one in checked[:-1]} >= {"source", "tokenizer", "shards", "merge", "blend"}
    assert [one.compared for one in checked] == [int(deep)] * (len(checked) - 1) + [0]
    assert checked[-1].unknown == int(deep)


def test_other_bytes_of_the_same_length_need_deep():
    file = tokenizer() / "checkpoint/weights"
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    assert found() == []
    assert found(deep=True) == [f"{file.resolve()}: has other bytes than it was sealed with; restore it"]


def test_files_cut_off_and_missing():
    cut, missing = tokenizer() / "checkpoint/weights", state() / "checkpoint/weights"
    size = cut.stat().st_size
    cut.write_bytes(b"w")
    missing.unlink()
    one, two = found()
    assert one.startswith(f"{cut.resolve()}: has 1 bytes, sealed with {size}; restore it, or delete")
    # A state lies in its trajectory, which may be weeks of work: no word of deleting
    assert two == f"{missing.resolve()}: is missing, sealed with 14; restore it"


def test_digests_of_a_state_are_compared():
    digests.make(state(), print)
    checked, _ = verify.verify([state()], True, print)
    assert (checked[-1].compared, checked[-1].unknown) == (1, 0)
    file = state() / "checkpoint/weights"
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    assert found() == []
    assert found(deep=True) == [f"{file.resolve()}: has other bytes than it was sealed with; restore it"]


def test_digests_of_another_seal():
    digests.make(state(), print)
    changed = json.loads((state() / "digests.json").read_text()) | {"sealed": "0" * 64}
    overwrite(state() / "digests.json", json.dumps(changed))
    assert found()[0].endswith("was made of another sealed.json; delete it and ask for seal/NAME again")
    overwrite(state() / "digests.json", "{}")
    assert "digests.json: damaged" in found()[0]


def test_records_that_do_not_agree():
    overwrite(tokenizer() / "artifact.json", "{}")
    assert found() == [
        f"{tokenizer().resolve()}/artifact.json: differs from sealed.json beside it; delete it if sealed.json is right"
    ]


def test_an_input_made_again_as_something_else():
    for name in ("sealed.json", "artifact.json"):
        record = json.loads((tokenizer() / name).read_text())
        overwrite(tokenizer() / name, json.dumps(record | {"measures": {"tokens": 2}}))
    problems = found()
    assert len(problems) >= 2  # by the shards, and by the training
    assert all(p.startswith(f"{tokenizer().resolve()}/sealed.json: is not what ") for p in problems)


def test_a_record_of_another_identity():
    for name in ("sealed.json", "artifact.json"):
        record = json.loads((state() / name).read_text())
        record["payload"]["engine"] = "another"
        overwrite(state() / name, json.dumps(record))
    (problem,) = found()
    assert f"is said to be {record['identity']}, but its payload has the identity " in problem


@pytest.mark.parametrize("text", ["", "{", "{}", '{"inputs": [{}]}'])
def test_a_damaged_record(text):
    overwrite(state() / "sealed.json", text)
    assert found() == [f"{state().resolve()}/sealed.json: damaged; restore it"]


def test_what_is_no_longer_kept_is_told_but_no_problem():
    gone = tokenizer().resolve()
    shutil.rmtree(gone)
    checked, missed = verify.verify([state()], True, print)
    assert missed == [str(gone)]
    assert not any(one.problems for one in checked)


def test_an_archive_without_recipes_or_stages(capsys):
    shutil.rmtree("config")
    shutil.rmtree("artifacts/.stages")
    verify.run(["pretrain/demo@phase1:10"], Session("artifacts", RECIPES), True, 1)
    assert f"{state().resolve()}: 1 files, 14 B: fine" in capsys.readouterr().out
    Path("artifacts").rename("archive")
    (directory,) = Path("archive/pretrain").glob("*/at-10")
    verify.run([str(directory)], Session("artifacts", RECIPES), True, 1)
    told = capsys.readouterr().out
    assert f"{directory.resolve()}: 1 files, 14 B: fine" in told
    assert "1 files without a digest, of which only the sizes were compared" in told


def test_names_that_show_nothing(capsys):
    Path("pretrain/demo@phase1:10").unlink()
    verify.run(["pretrain/demo@phase1:10"], Session("artifacts", RECIPES), False, 1)
    assert f"{state().resolve()}: 1 files, 14 B: fine" in capsys.readouterr().out.splitlines()
    with pytest.raises(NemoflowError, match=r"is no finished artifact \(no sealed.json\)"):
        verify.run(["pretrain/demo@phase2"], Session("artifacts", RECIPES), False, 1)
    with pytest.raises(NemoflowError, match=r"^nonsense: write KIND/RECIPE"):
        verify.run(["nonsense"], Session("artifacts", RECIPES), False, 1)


def test_problems_go_to_stderr_and_fail(capsys):
    (state() / "checkpoint/weights").unlink()
    with pytest.raises(SystemExit) as caught:
        verify.run(["pretrain/demo@phase1:10"], Session("artifacts", RECIPES), False, 1)
    assert caught.value.code == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"nemoflow: error: {state().resolve()}/checkpoint/weights: is missing")
    assert "at-10" not in told.out
    assert ": fine\n" in told.out
