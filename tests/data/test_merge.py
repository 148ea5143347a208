"""Merging: complete, split by content, the same bytes however the source was cut."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_tokenizer
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from xxhash import xxh3_64_intdigest

from nemoflow import kinds
from nemoflow.data import merge, shards
from nemoflow.data.tokenizer import load
from nemoflow.errors import NemoflowError


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "small")


def write_source(root: Path, files: list[list[str]], format_: str = "jsonl", group: int = 2) -> Path:
    """A source of files with these texts; None is a row without text."""
    source = root / "source"
    (source / "files").mkdir(parents=True)
    for number, texts in enumerate(files):
        path = source / f"files/{number:05d}.{format_}"
        if format_ == "parquet":
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=group)
        else:
            path.write_text("".join(json.dumps({"text": text} if text is not None else {}) + "\n" for text in texts))
    payload = {"kind": "source", "generator": "test", "shards": len(files)}
    if format_ == "parquet":
        payload = {"kind": "source", "files": [{"size": 1}] * len(files), "format": format_}
    (source / "sealed.json").write_text(json.dumps({"payload": payload}))
    return source


def cut(root: Path, name: str, source: Path, tokenizer: Path, plan: list, jobs: list[int], pool: str) -> list[Path]:
    """The shards of a plan, made by as many jobs as `jobs` has numbers of shards."""
    found, first = [], 0
    for count in jobs:
        out = root / f"shards-{name}-{first}"
        out.mkdir()
        payload = {"kind": "shards", "source": "s", "tokenizer": "t", "pool": pool, "max_broken": "1"}
        payload |= {"first": first, "shards": plan[first : first + count]}
        made = shards.make(kinds.complete(payload), {"source": source, "tokenizer": tokenizer}, out, print)
        (out / "sealed.json").write_text(json.dumps({"payload": payload, "measures": made.measures}))
        found.append(out)
        first += count
    return found


def run(parts: list[Path], source: Path, out: Path, **settings):
    out.mkdir(exist_ok=True)
    payload = kinds.complete({"kind": "merge", "parts": ["p"] * len(parts), "source": "s"} | settings)
    return merge.make(payload, {"parts": parts, "source": source}, out, print, threads=2)


def documents(prefix: Path) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in IndexedDataset(str(prefix))]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


TEXTS = st.lists(st.sampled_from([f"text {i} " * (1 + i % 5) for i in range(40)]), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sources=st.lists(TEXTS, min_size=2, max_size=5), pool=st.sampled_from(["1", "1/2", "9/10"]))
def test_the_bytes_do_not_depend_on_how_the_source_was_cut(tokenizer, data, sources, pool):
    sources[0] += [f"one more {i}" for i in range(40)]  # enough for three splits
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        source = write_source(root, sources)
        whole = [[[i] for i in range(len(sources))]]
        apart = [[[i]] for i in range(len(sources))]
        jobs = []
        while sum(jobs) < len(apart):
            jobs.append(data.draw(st.integers(1, len(apart) - sum(jobs))))
        one = run(cut(root, "whole", source, tokenizer, whole, [1], pool), source, root / "one", valid=60, test=30)
        two = run(cut(root, "apart", source, tokenizer, apart, jobs, pool), source, root / "two", valid=60, test=30)
        assert files(root / "one") == files(root / "two")
        assert one.measures | {"shards": 0} == two.measures | {"shards": 0}


@settings(max_examples=25, deadline=None)
@given(
    sources=st.lists(TEXTS, min_size=1, max_size=4),
    valid=st.integers(1, 200),
    test=st.integers(1, 200),
    prefixes=st.integers(1, 4),
)
def test_every_document_is_in_one_split_and_equal_ones_in_the_same(tokenizer, sources, valid, test, prefixes):
    sources[0] += [f"one more {i}" for i in range(10)]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        source = write_source(root, sources)
        plan = [[[i]] for i in range(len(sources))]
        parts = cut(root, "x", source, tokenizer, plan, [len(plan)], "1")
        made = run(parts, source, root / "out", valid=valid, test=test, cap="1/4", prefixes=prefixes)
        splits = {
            split: [ids for entry in entries for ids in documents(root / "out" / entry["prefix"])]
            for split, entries in made.measures["prefixes"].items()
        }
        trained = load(tokenizer)
        wanted = {
            text: (*trained.engine.encode(text, add_special_tokens=False).ids, trained.eod)
            for texts in sources
            for text in texts
        }
        assert sorted(ids for found in splits.values() for ids in found) == sorted(
            wanted[text] for texts in sources for text in texts
        )
        distinct = {split: set(found) for split, found in splits.items()}
        assert all(distinct.values())
        assert not distinct["valid"] & distinct["test"]
        assert not distinct["train"] & (distinct["valid"] | distinct["test"])
        # The smallest hashes, while they fit, and one text at least
        by_hash = sorted(wanted, key=lambda text: xxh3_64_intdigest(text.encode()))
        total = sum(len(ids) for found in splits.values() for ids in found)
        at = 0
        for split, target in (("valid", valid), ("test", test)):
            tokens = sum(map(len, splits[split]))
            taken = len(distinct[split])
            assert distinct[split] == {wanted[text] for text in by_hash[at : at + taken]}
            assert tokens <= min(target, total // 4) or taken == 1
            following = sum(texts.count(by_hash[at + taken]) for texts in sources) * len(wanted[by_hash[at + taken]])
            assert tokens + following > min(target, int(Fraction(1, 4) * total))
            at += taken


def test_what_was_counted_adds_up_and_digests_are_of_the_files(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i}" for i in range(30)] + [None, ""], ["more", *"abcdef"]])
    parts = cut(tmp_path, "x", source, tokenizer, [[[0]], [[1]]], [1, 1], "1/2")
    made = run(parts, source, tmp_path / "out", valid=20, test=20)
    m = made.measures
    assert (m["rows"], m["documents"], m["shards"]) == (39, 37, 2)
    assert m["dropped"] == {"'text' is empty": 1, "no 'text'": 1}
    assert m["documents"] == sum(p["documents"] for split in m["prefixes"].values() for p in split)
    assert m["tokens"] == sum(p["tokens"] for split in m["prefixes"].values() for p in split)
    assert sum(m["lengths"]) == 37
    assert {f["name"] for f in made.contents} == {p.name for p in (tmp_path / "out").iterdir()}
    for file in made.contents:
        data = (tmp_path / "out" / file["name"]).read_bytes()
        assert (file["size"], file["blake3"]) == (len(data), blake3(data).hexdigest())


def test_prefixes_are_contiguous_and_about_equal(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i} of file {n}" for i in range(40)] for n in range(8)])
    parts = cut(tmp_path, "x", source, tokenizer, [[[i]] for i in range(8)], [8], "1/4")
    one = run(parts, source, tmp_path / "one", valid=40, test=40)
    four = run(parts, source, tmp_path / "four", valid=40, test=40, prefixes=4)
    entries = four.measures["prefixes"]["train"]
    assert [entry["prefix"] for entry in entries] == [f"train-0000{i}" for i in range(4)]
    assert max(e["tokens"] for e in entries) < 2 * min(e["tokens"] for e in entries)
    joined = [ids for entry in entries for ids in documents(tmp_path / "four" / entry["prefix"])]
    assert joined == documents(tmp_path / "one" / one.measures["prefixes"]["train"][0]["prefix"])


@pytest.mark.parametrize("prefixes", [1, 3])
def test_the_bytes_are_those_of_megatrons_writer(tokenizer, tmp_path, prefixes):
    source = write_source(tmp_path, [[f"text {i} of file {n}" * (1 + i % 9) for i in range(60)] for n in range(4)])
    parts = cut(tmp_path, "x", source, tokenizer, [[[i]] for i in range(4)], [1, 3], "1/4")
    made = run(parts, source, tmp_path / "out", valid=40, test=40, prefixes=prefixes)
    dtype = DType.optimal_dtype(made.measures["vocab_size"])
    names = [entry["prefix"] for entries in made.measures["prefixes"].values() for entry in entries]
    assert len(names) == prefixes + 2
    for name in names:
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for ids in documents(tmp_path / "out" / name):
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == (tmp_path / f"out/{name}{suffix}").read_bytes()


# -- completeness ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tokenizer, tmp_path):
    """A source of three files and the jobs that made a shard of each."""
    source = write_source(tmp_path, [[f"text {i} of file {n}" for i in range(20)] for n in range(3)])
    return source, cut(tmp_path, "x", source, tokenizer, [[[i]] for i in range(3)], [1, 1, 1], "1")


def edit(part: Path, change) -> None:
    sealed = json.loads((part / "sealed.json").read_text())
    change(sealed)
    (part / "sealed.json").write_text(json.dumps(sealed))


def refused(parts, source, tmp_path) -> str:
    with pytest.raises(NemoflowError) as caught:
        run(parts, source, tmp_path / "out", valid=10, test=10)
    return str(caught.value)


def test_a_missing_job_is_told(three, tmp_path):
    source, parts = three
    assert "holds shards [2], where 1 to 1 are planned" in refused([parts[0], parts[2]], source, tmp_path)
    assert "00002.jsonl: no shard reads this file" in refused(parts[:2], source, tmp_path)
    assert "holds shards [0], where 1 to 1 are planned" in refused([parts[0], parts[0]], source, tmp_path)


def test_a_shard_that_lost_rows_is_told(three, tmp_path):
    source, parts = three
    edit(parts[1], lambda sealed: sealed["measures"]["shards"][0].update(rows=21))
    assert "shard 1: 21 rows, but 20 documents and 0 dropped" in refused(parts, source, tmp_path)


@pytest.mark.parametrize("cut_off", [1, 4])
def test_a_shard_that_was_cut_off_is_told(tokenizer, tmp_path, cut_off):
    source = write_source(tmp_path, [[f"text {i}" for i in range(60)]])
    parts = cut(tmp_path, "x", source, tokenizer, [[[0]]], [1], "1/2")
    path = parts[0] / "00000.train.bin"
    path.write_bytes(path.read_bytes()[:-cut_off])
    assert "00000.train.bin: has " in refused(parts, source, tmp_path)


def test_shards_of_two_tokenizers_are_told(three, tmp_path):
    source, parts = three
    edit(parts[1], lambda sealed: sealed["measures"].update(eod=7))
    assert "eod is 7, 2 in the shards before" in refused(parts, source, tmp_path)


def test_row_groups_are_covered_once(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i}" for i in range(12)], ["x", "y"]], "parquet", group=4)
    good = cut(tmp_path, "good", source, tokenizer, [[[0, 0, 1]], [[0, 1, 3], [1]]], [2], "1")
    made = run(good, source, tmp_path / "fine", valid=4, test=4)
    assert made.measures["rows"] == 14
    for name, plan in {
        "gap": [[[0, 0, 1]], [[0, 2, 3], [1]]],
        "twice": [[[0, 0, 2]], [[0, 1, 3], [1]]],
        "short": [[[0, 0, 1]], [[0, 1, 2]]],
    }.items():
        bad = cut(tmp_path, name, source, tokenizer, plan, [2], "1")
        message = refused(bad, source, tmp_path)
        assert "read the source once and in order" in message or "no shard reads all of this file" in message, name


def test_rows_are_as_many_as_parquet_says(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i}" for i in range(12)]], "parquet")
    parts = cut(tmp_path, "x", source, tokenizer, [[[0]]], [1], "1")
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(13)]}), source / "files/00000.parquet")
    assert "has 13 rows, of which the shards read 12" in refused(parts, source, tmp_path)


def test_too_few_documents_for_three_splits(tokenizer, tmp_path):
    source = write_source(tmp_path, [["a", "a", "b", "b"]])
    parts = cut(tmp_path, "x", source, tokenizer, [[[0]]], [1], "1")
    assert "2 different usable documents, too few for train, valid and test" in refused(parts, source, tmp_path)


def test_more_documents_than_megatron_can_number(three, tmp_path, monkeypatch):
    source, parts = three
    whole = run(parts, source, tmp_path / "whole", valid=10, test=10)
    most = whole.measures["prefixes"]["train"][0]["documents"]
    monkeypatch.setattr(merge, "_MOST_DOCUMENTS", most)
    run(parts, source, tmp_path / "fits", valid=10, test=10)
    monkeypatch.setattr(merge, "_MOST_DOCUMENTS", most - 1)
    said = refused(parts, source, tmp_path)
    assert f"{most} documents in train-00000, of which Megatron can number {most - 1}" in said
    assert not list((tmp_path / "out").iterdir()), "nothing was written"


def test_a_pool_that_is_too_small(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i} " * 9 for i in range(400)]])
    parts = cut(tmp_path, "x", source, tokenizer, [[[0]]], [1], "1/16")
    with pytest.raises(NemoflowError, match="were kept apart, too few for held_out"):
        run(parts, source, tmp_path / "out", valid=3000, test=3000, cap="1/3")


# -- interruptions -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from pathlib import Path
from nemoflow.data import merge
payload, parts, source, out = json.loads(sys.argv[1])
merge.make(payload, {"parts": [Path(p) for p in parts], "source": Path(source)}, Path(out), print, threads=2)
"""


def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(3000)]
    texts = [[" ".join(rng.choice(words, 400)) for _ in range(250)] for _ in range(6)]
    source = write_source(tmp_path, texts)
    parts = cut(tmp_path, "x", source, tokenizer, [[[i]] for i in range(6)], [6], "1/2")
    settings_ = {"valid": 5000, "test": 5000, "prefixes": 3}
    run(parts, source, tmp_path / "whole", **settings_)
    payload = kinds.complete({"kind": "merge", "parts": ["p"] * 6, "source": "s"} | settings_)
    begun = time.monotonic()
    argument = json.dumps([payload, [str(p) for p in parts], str(source), str(tmp_path / "timed")])
    (tmp_path / "timed").mkdir()
    subprocess.run([sys.executable, "-c", PROGRAM, argument], check=True)
    took = time.monotonic() - begun
    killed = 0
    for attempt in range(8):
        out = tmp_path / f"killed-{attempt}"
        out.mkdir()
        argument = json.dumps([payload, [str(p) for p in parts], str(source), str(out)])
        with subprocess.Popen([sys.executable, "-c", PROGRAM, argument], stdout=subprocess.DEVNULL) as process:
            time.sleep(took * (0.55 + 0.05 * attempt))
            process.kill()
        killed += process.returncode == -9
        made = run(parts, source, out, **settings_)
        assert files(out) == files(tmp_path / "whole")
        assert {f["name"] for f in made.contents} == set(files(out))
        shutil.rmtree(out)
    assert killed, "every attempt was done before it was killed"


def test_finished_prefixes_are_kept(tokenizer, tmp_path):
    source = write_source(tmp_path, [[f"text {i} of {n}" for i in range(60)] for n in range(4)])
    parts = cut(tmp_path, "x", source, tokenizer, [[[i]] for i in range(4)], [4], "1/2")
    run(parts, source, tmp_path / "out", valid=20, test=20, prefixes=2)
    before = {p.name: p.stat().st_ino for p in (tmp_path / "out").iterdir()}
    (tmp_path / "out/train-00001.json").unlink()  # as if it had been killed just before
    (tmp_path / "out/train-00001.bin.99.tmp").write_bytes(b"half")
    run(parts, source, tmp_path / "out", valid=20, test=20, prefixes=2)
    after = {p.name: p.stat().st_ino for p in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {
        "train-00001.bin", "train-00001.idx", "train-00001.json"
    }  # fmt: skip
