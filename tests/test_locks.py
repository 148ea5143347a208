"""Lock files: what local sources were when they were pinned, and what is said when they are something else now."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from graph import write_demo

from nemoflow import locks
from nemoflow.errors import NemoflowError
from nemoflow.locks import Locks, StatCache
from nemoflow.store import Store

RECIPES = [Path("config/recipes")]
RECIPE = RECIPES[0] / "demo.yaml"
LOCK = RECIPES[0] / "demo.lock.json"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)


def lock() -> dict:
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)
    return json.loads(LOCK.read_text())["entries"]


def pinned(key: str = "sources.words", pattern: str = "raw/*.jsonl") -> list[dict]:
    return Locks("demo", RECIPES, Store("artifacts")).files(key, pattern, RECIPE)


def edit(old: str, new: str) -> None:
    text = RECIPE.read_text()
    assert old in text
    RECIPE.write_text(text.replace(old, new))


def test_a_lock_says_sizes_and_digests_in_order():
    entries = lock()
    assert set(entries) == {"sources.words", "sources.lines"}
    assert entries["sources.words"]["pattern"] == "raw/*.jsonl"
    assert [f["path"] for f in entries["sources.words"]["files"]] == ["raw/0.jsonl", "raw/1.jsonl"]
    for file in entries["sources.words"]["files"]:
        content = Path(file["path"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert pinned() == [{k: f[k] for k in ("size", "sha256")} for f in entries["sources.words"]["files"]]


def test_locking_twice_writes_the_same_bytes():
    lock()
    before = LOCK.read_bytes()
    os.utime("raw/0.jsonl", (1, 1))
    lock()
    assert LOCK.read_bytes() == before


def test_a_recipe_of_generated_sources_needs_no_lock():
    RECIPE.write_text(
        "tokenizer: {train_on: [a], vocab_size: 300}\nsources: {a: {generator: stdlib_topics, shards: 1}}\n"
        "stages: [{name: s, kind: pretrain, function: f, data: {blend: {a: 1}}, until: 1}]\n"
    )
    assert locks.write("demo", RECIPES, Store("artifacts"), print) is None
    assert not LOCK.exists()


def test_a_local_tokenizer_is_pinned_whole():
    Path("tok/sub").mkdir(parents=True)
    Path("tok/tokenizer.json").write_text("{}")
    Path("tok/tokenizer_config.json").write_text("{}")
    edit("{train_on: [words, sums], vocab_size: 280}", "{files: tok}")
    assert [f["path"] for f in lock()["tokenizer"]["files"]] == ["tok/tokenizer.json", "tok/tokenizer_config.json"]


def test_a_pattern_that_matches_nothing_is_refused_and_no_lock_is_written():
    edit("raw/*.jsonl", "raw/*.json")
    with pytest.raises(NemoflowError, match=r"demo.yaml: sources.words: no file matches 'raw/\*.json'"):
        lock()
    assert not LOCK.exists()


def test_what_is_not_locked_is_refused_with_the_command():
    with pytest.raises(NemoflowError, match=r"sources.words: 'raw/\*.jsonl' is not locked; run `nemoflow lock demo`"):
        pinned()


def test_another_pattern_than_the_locked_one_is_refused():
    lock()
    with pytest.raises(NemoflowError, match=r"'raw/0.jsonl', but .*demo.lock.json pins 'raw/\*.jsonl'"):
        pinned(pattern="raw/0.jsonl")


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("same_stamp", [True, False])
def test_a_changed_file_is_refused(same_size, same_stamp):
    lock()
    path = Path("raw/1.jsonl")
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("cat", "dog" if same_size else "mouse"))
    if same_stamp:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if same_size and same_stamp:  # what no look at the file's record can show: the job that reads it compares digests
        assert pinned()
        return
    with pytest.raises(NemoflowError, match=r"raw/1.jsonl: changed since it was pinned in .*lock.json; restore"):
        pinned()
    path.write_text(text)
    assert pinned()


def test_a_missing_file_is_known_but_no_error_while_nobody_reads_it():
    lock()
    shutil.rmtree("raw")
    found = Locks("demo", RECIPES, Store("artifacts"))
    assert len(found.files("sources.words", "raw/*.jsonl", RECIPE)) == 2
    assert found.paths["sources.words"] == ["raw/0.jsonl", "raw/1.jsonl"]


def test_a_recipe_that_extends_uses_its_parents_lock_and_its_own_first():
    parent = lock()
    (RECIPES[0] / "child.yaml").write_text("extends: demo\n")
    assert Locks("child", RECIPES, Store("artifacts")).files("sources.words", "raw/*.jsonl", RECIPE)
    Path("raw/0.jsonl").write_text('{"text": "other"}\n')
    locks.write("child", RECIPES, Store("artifacts"), lambda _: None)
    child = Locks("child", RECIPES, Store("artifacts")).files("sources.words", "raw/*.jsonl", RECIPE)
    assert child[0]["sha256"] != parent["sources.words"]["files"][0]["sha256"]


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": {"sources.words": {}}}', "\x00"])
def test_a_damaged_lock_is_named(text):
    LOCK.write_text(text)
    with pytest.raises(NemoflowError, match=r"demo.lock.json"):
        pinned()


def test_a_file_is_read_again_only_when_its_size_or_stamp_changed(monkeypatch):
    store, path = Store("artifacts"), Path("raw/0.jsonl")
    read = []
    monkeypatch.setattr(locks, "file_digest", lambda p: read.append(p) or str(len(read)))
    cache = StatCache(store)
    assert cache.digest(path, known_only=True) is None
    assert [cache.digest(path) for _ in range(3)] == ["1", "1", "1"]
    cache.save()
    assert StatCache(store).digest(path, known_only=True) == "1"
    os.utime(path, (5, 5))
    assert StatCache(store).digest(path, known_only=True) == "2"
