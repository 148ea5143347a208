"""Digests of a state's files: made once, of what was sealed, or not at all."""

import json
from pathlib import Path

import pytest

from nemoflow import progress, seal
from nemoflow.errors import NemoflowError
from nemoflow.store import dump, file_digest


@pytest.fixture
def state(tmp_path) -> Path:
    """A state as training seals it: a link to its checkpoint, names and sizes."""
    checkpoint, directory = tmp_path / "checkpoints/iter_0000010", tmp_path / "at-10"
    checkpoint.mkdir(parents=True)
    directory.mkdir()
    (directory / "checkpoint").symlink_to(checkpoint)
    for number in range(9):
        (checkpoint / f"__{number}_0.distcp").write_bytes(bytes([number]) * 1000 * number)
    listed = [{"name": f"checkpoint/{p.name}", "size": p.stat().st_size} for p in sorted(checkpoint.iterdir())]
    (directory / "sealed.json").write_text(dump({"contents": listed}))
    return directory


@pytest.mark.parametrize("threads", [1, 4])
def test_every_file_through_the_link(state, threads):
    made = seal.make(state, print, threads)
    found = json.loads(made.read_text())
    assert made == state / "digests.json"
    assert found["sealed"] == file_digest(state / "sealed.json")
    assert [f["name"] for f in found["files"]] == [f"checkpoint/__{n}_0.distcp" for n in range(9)]
    assert [f["size"] for f in found["files"]] == [1000 * n for n in range(9)]
    assert all(f["sha256"] == file_digest(state / f["name"]) for f in found["files"])


def test_twice_the_same_bytes(state):
    before = seal.make(state, print).read_bytes()
    assert seal.make(state, print, 4).read_bytes() == before


def test_progress_is_told(state, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    told: list[str] = []
    seal.make(state, told.append)
    assert len(told) == 9
    assert told[-1].startswith("9/9 files, 36.0 kB of 36.0 kB")


def test_a_state_that_is_not_finished(state):
    (state / "sealed.json").unlink()
    with pytest.raises(NemoflowError, match=r"at-10: is not finished \(no sealed.json\)"):
        seal.make(state, print)


@pytest.mark.parametrize(("harm", "message"), [("cut", "has 7999 bytes"), ("gone", "is missing")])
def test_a_file_that_is_not_what_was_sealed(state, harm, message):
    file = state / "checkpoint/__8_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    if harm == "gone":
        file.unlink()
    with pytest.raises(NemoflowError, match=rf"__8_0.distcp: {message}, sealed with 8000; restore it"):
        seal.make(state, print, 2)
    assert not (state / "digests.json").exists()
