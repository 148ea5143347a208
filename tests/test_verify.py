"""nemoflow verify: artifacts as they were sealed, and what is said of those that are not."""

import json
import shutil
from pathlib import Path

import pytest
from archives import Archive, pretraining
from graph import write_demo

from nemoflow import locks, verify
from nemoflow import seal as digests
from nemoflow.errors import NemoflowError
from nemoflow.job import contents
from nemoflow.lineage import address, load
from nemoflow.session import Session, show
from nemoflow.store import Store, dump, seal

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
    copy = tokenizer() / "artifact.json"
    overwrite(copy, copy.read_text() + "\n")
    assert found() == [
        f"{copy.resolve()}: differs from {tokenizer().resolve()}/sealed.json; delete it if that is right"
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
    problems = found()
    assert problems[0].startswith(f"{state().resolve()}/sealed.json: damaged: ")
    assert problems[0].endswith("; restore it")


def test_a_record_of_a_newer_form():
    record = json.loads((state() / "sealed.json").read_text())
    overwrite(state() / "sealed.json", json.dumps(record | {"schema": 2}))
    assert f"{state().resolve()}/sealed.json: schema: 2: this nemoflow reads up to 1; use a newer one" in found()


def test_an_artifact_that_comes_from_itself():
    record = json.loads((tokenizer() / "sealed.json").read_text())
    own = {key: record[key] for key in ("kind", "label", "identity")}
    for name in ("sealed.json", "artifact.json"):
        overwrite(tokenizer() / name, json.dumps(record | {"inputs": [{"role": "sources", "sha256": "", **own}]}))
    assert any(" comes from itself, by way of " in problem for problem in found())


def test_a_flipped_byte_anywhere_is_found_and_named():
    digests.make(state(), print)
    assert found(deep=True) == []
    files = [
        p
        for p in Path("artifacts").resolve().rglob("*")
        if p.is_file() and ".stages" not in p.parts and p.name[0] != "."
    ]
    assert {p.name for p in files} == {"sealed.json", "artifact.json", "digests.json", "weights"}
    for file in files:
        text = file.read_bytes()
        file.chmod(0o644)
        for place in {0, len(text) // 3, len(text) // 2, len(text) - 1}:
            file.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
            # A digest that is wrong speaks against the file it is of
            named = [file, state().resolve() / "checkpoint/weights"] if file.name == "digests.json" else [file]
            assert any(str(name) in problem for problem in found(deep=True) for name in named), (file, place)
        file.write_bytes(text)


def test_an_archive_that_has_only_what_the_graph_tracks():
    for file in Path("artifacts").rglob("sealed.json"):
        file.unlink()
    checked, gone = verify.verify([state()], True, print)
    assert (len(checked), gone) == (8, [])
    assert not any(one.problems for one in checked)


def test_a_long_chain(tmp_path):
    """Longer than Python's stack."""
    archive, before = Archive(tmp_path / "long"), {}
    data = archive.seal("source", hub={"repo": "org/x", "commit": "0" * 40}, format="parquet", files=[])
    for number in range(1, 1500):
        init = {"init": {"from": before, "at": 1, "carry": "weights"}} if before else {}
        before = archive.seal("sft", at=1, engine="x", function="x", data=data, tokenizer=data, seed=number, **init)
    checked, gone = verify.verify([archive.directory(before, 1)], False, print)
    assert (len(checked), gone) == (1500, [])
    assert {problem.partition(": ")[2] for one in checked for problem in one.problems} == {
        "is missing, sealed with 1000; restore it",
        f"is missing, sealed with 1000; restore it, or delete {archive.directory(data)} to have it made anew",
    }


def test_an_export_copied_away_alone(tmp_path, capsys):
    _, export = pretraining(tmp_path / "whole", sources=2, shards=2)
    lineage = load(export)
    alone = tmp_path / "alone"
    shutil.copytree(export, alone)
    (alone / "files").mkdir()
    (alone / "files/00000.bin").write_bytes(bytes(1000))
    above = [record for record in lineage.records() if record["kind"] != "hf_export"]
    (alone / "lineage.json").write_text(dump({"artifacts": above}))
    assert [one.problems for one in verify.verify([alone], False, print)[0]] == [[]]
    above[3]["measures"] = {"tokens": 17}
    (alone / "lineage.json").write_text(dump({"artifacts": above}))
    (checked,) = verify.verify([alone], False, print)[0]
    assert f"the record of {address(above[3])} is not what was consumed by " in checked.problems[0]
    with pytest.raises(SystemExit):
        verify.run([str(alone)], Session("artifacts", RECIPES), False, 1, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["artifacts"][0]["problems"] == checked.problems
    assert len(told["not_kept"]) == 2


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
    with pytest.raises(NemoflowError, match="holds no finished artifact"):
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
