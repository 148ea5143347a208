import json
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

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

from benchmarks.corpus import write_tokenizer
from nemoflow.data import encode, rows, shards, tokenizer
from nemoflow.errors import NemoflowError

PAYLOAD = {
    "text_field": "text",
    "append_eod": True,
    "max_broken": "1/1000",
    "control_strings": "plain",
    "pool": "0",
    "first": 0,
    "shards": [[[0]]],
}
TOPICS = [topics[key] for key in sorted(topics)]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return small_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """The same, with one token so far up that ids are int32."""
    added = [{"content": f"<extra{i}>"} for i in range(63_600)]
    return small_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "large", added)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A source of four files: 240 documents, some blank lines."""
    source = tmp_path_factory.mktemp("corpus") / "source"
    (source / "files").mkdir(parents=True)
    for number in range(4):
        texts = [f"{number} {i} {TOPICS[(7 * i + number) % len(TOPICS)][:900]}" for i in range(60)]
        lines = [json.dumps({"text": text}) + "\n" * (1 + (i % 20 == 3)) for i, text in enumerate(texts)]
        (source / f"files/{number:05d}.jsonl").write_text("".join(lines))
    (source / "sealed.json").write_text(json.dumps({"payload": {"kind": "source", "generator": "test", "shards": 4}}))
    return source


@pytest.fixture
def fast(monkeypatch) -> None:
    """Have the fast engine do what is small, too."""
    monkeypatch.setattr(shards, "_SMALL", 0)


def make(source: Path, directory: Path, out: Path, threads: int = 1, engine: str = "gigatoken", **payload):
    inputs = {"source": source, "tokenizer": directory}
    made = shards.make(PAYLOAD | payload, inputs, out, print, threads=threads, launch={"engine": engine})
    for entry in made.contents:
        content = (out / entry["name"]).read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (entry["size"], entry["blake3"])
    assert [entry["name"] for entry in made.contents] == sorted(tree(out))
    return made.measures


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts_in(source: Path, *files: int) -> list[str]:
    lines = [line for n in files for line in (source / f"files/{n:05d}.jsonl").read_text().splitlines() if line]
    return [json.loads(line)["text"] for line in lines]


def by_megatron(prefix: Path, documents, dtype) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def assert_equal_files(one: Path, other: Path) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
@pytest.mark.parametrize("vocab_size", [2048, 131072])
@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2047), min_size=1, max_size=40), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_writer_equals_megatrons_builder(tmp_path_factory, step, vocab_size, documents, cut):
    directory = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_STEP", step)
        writer = shards.IndexedWriter(directory / "ours", shards.id_type(vocab_size))
        for part in (documents[:cut], documents[cut:]):
            ids = np.array([i for document in part for i in document], np.uint32)
            writer.add(ids, np.array([len(document) for document in part], np.int64))
        files = writer.finish()
    by_megatron(directory / "theirs", documents, DType.optimal_dtype(vocab_size))
    assert_equal_files(directory / "ours", directory / "theirs")
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
    for entry in files:
        content = (directory / entry["name"]).read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (entry["size"], entry["blake3"])
    assert len(list(directory.iterdir())) == 4


def test_a_writer_without_documents_leaves_no_files(tmp_path):
    assert shards.IndexedWriter(tmp_path / "none", np.dtype("<i4")).finish() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 131072])
def test_id_type_is_megatrons(vocab_size):
    assert shards.id_type(vocab_size).type is DType.optimal_dtype(vocab_size)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("pool", ["0", "1/3", "1"])
def test_shards_are_megatrons_over_the_whole_source(request, corpus, out, tmp_path, name, pool):
    directory = request.getfixturevalue(name)
    parts = [[[0], [2]], [[1]], [[3]]]
    measures = make(corpus, directory, out, shards=parts, first=5, pool=pool)
    engine = tokenizer.load(directory).engine
    dtype = {"small": np.uint16, "large": np.int32}[name]
    assert (measures["dtype"], measures["eod"]) == (np.dtype(dtype).name, 2)
    assert measures["vocab_size"] == {"small": 2000, "large": 65_600}[name]
    assert [shard["shard"] for shard in measures["shards"]] == [5, 6, 7]
    for shard, units in zip(measures["shards"], parts, strict=True):
        halves = {"train": [], "pool": []}
        texts = texts_in(corpus, *(unit[0] for unit in units))
        for text in texts:
            half = "pool" if Fraction(xxh3_64_intdigest(text.encode()), 2**64) < Fraction(pool) else "train"
            halves[half].append(text)
        lengths = []
        for half, some in halves.items():
            documents = [[*engine.encode(text).ids, 2] for text in some]
            lengths += map(len, documents)
            prefix = f"{shard['shard']:05d}.{half}"
            assert shard[half] == {"documents": len(documents), "tokens": sum(map(len, documents))}
            if documents:
                by_megatron(tmp_path / prefix, documents, dtype)
                assert_equal_files(out / prefix, tmp_path / prefix)
        assert (out / f"{shard['shard']:05d}.pool.hashes").exists() == bool(halves["pool"])
        if halves["pool"]:
            hashes = np.fromfile(out / f"{shard['shard']:05d}.pool.hashes", "<u8")
            assert hashes.tolist() == [xxh3_64_intdigest(text.encode()) for text in halves["pool"]]
        assert shard["lengths"] == [sum(2**k <= n < 2 ** (k + 1) for n in lengths) for k in range(32)]
        assert (shard["rows"], shard["documents"], shard["tokens"]) == (len(texts), len(texts), sum(lengths))
        assert shard["bytes"] == sum(len(text.encode()) for text in texts)
        assert (shard["dropped"], shard["first_dropped"]) == ({}, None)
        assert json.loads((out / f"{shard['shard']:05d}.json").read_text()).items() >= shard.items()


@pytest.mark.usefixtures("fast")
def test_neither_processes_nor_engine_nor_batches_change_a_byte(corpus, small, tmp_path, monkeypatch):
    trees, measures = [], []
    for number, (threads, engine, chunk) in enumerate(
        [(1, "gigatoken", 1 << 20), (3, "gigatoken", 99), (2, "tokenizers", 5000)]
    ):
        monkeypatch.setattr(rows, "_CHUNK", chunk)
        (out := tmp_path / str(number)).mkdir()
        measures.append(make(corpus, small, out, threads, engine, shards=[[[i]] for i in range(4)], pool="1/4"))
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]
    assert measures[0] == measures[1] == measures[2]


def test_megatron_reads_the_documents_back(corpus, small, out):
    make(corpus, small, out, shards=[[[0], [1], [2], [3]]])
    data = IndexedDataset(str(out / "00000.train"))
    engine = tokenizer.load(small).engine
    texts = texts_in(corpus, 0, 1, 2, 3)
    assert len(data) == len(texts) == 240
    for i in range(0, len(data), 7):
        assert data[i][-1] == 2
        assert engine.decode(data[i][:-1].tolist(), skip_special_tokens=False) == texts[i]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_text_that_spells_a_control_token(small, write_source, out, tmp_path, engine):
    texts = ["plain", "an </s> inside", "[INST]user\nhi[/INST]", "<pad", "</s>"]
    source = write_source([{"text": text} for text in texts])
    shard = make(source, small, out, engine=engine)["shards"][0]
    assert (shard["control_strings"], shard["documents"]) == (3, 5)
    data = IndexedDataset(str(out / "00000.train"))
    loaded = tokenizer.load(small).engine
    for i, text in enumerate(texts):
        assert data[i].min() == data[i][-1] == 2
        assert min(data[i][:-1]) >= len(small_tokenizer.SPECIAL)
        assert loaded.decode(data[i][:-1].tolist(), skip_special_tokens=False) == text
    (other := tmp_path / "control").mkdir()
    assert make(source, small, other, engine=engine, control_strings="control")["shards"][0]["control_strings"] == 3
    data = IndexedDataset(str(other / "00000.train"))
    assert data[4].tolist() == [2, 2]
    assert [4 in data[2], 5 in data[2], data[1].tolist().count(2)] == [True, True, 2]


@pytest.mark.usefixtures("fast")
def test_documents_with_letters_of_a_newer_unicode_are_the_references(small, write_source, out):
    source = write_source([{"text": "a\u1acfb"}, {"text": "plain"}])
    assert make(source, small, out)["shards"][0]["by_reference"] == 1


def test_without_end_of_document(small, write_source, out):
    make(write_source([{"text": "a"}, {"text": "b"}]), small, out, append_eod=False)
    assert IndexedDataset(str(out / "00000.train")).sequence_lengths.tolist() == [1, 1]


def test_another_field(small, write_source, out):
    make(write_source([{"body": "a", "text": "never"}]), small, out, text_field="body", append_eod=False)
    data = IndexedDataset(str(out / "00000.train"))
    assert len(data) == 1
    assert tokenizer.load(small).engine.decode(data[0].tolist()) == "a"


@pytest.mark.usefixtures("fast")
def test_row_groups_of_parquet(small, tmp_path, out):
    source = tmp_path / "source"
    (source / "files").mkdir(parents=True)
    table = pa.table({"text": TOPICS[:50], "id": range(50)})
    pq.write_table(table, source / "files/00000.parquet", row_group_size=10)
    (source / "sealed.json").write_text(json.dumps({"payload": {"files": [{}], "format": "parquet"}}))
    measures = make(source, small, out, shards=[[[0, 0, 2]], [[0, 2, 5]]])
    assert [shard["rows"] for shard in measures["shards"]] == [20, 30]
    engine = tokenizer.load(small).engine
    parts = [IndexedDataset(str(out / f"0000{i}.train")) for i in range(2)]
    found = [
        engine.decode(part[i][:-1].tolist(), skip_special_tokens=False) for part in parts for i in range(len(part))
    ]
    assert found == TOPICS[:50]


def test_shards_without_documents_have_only_a_receipt(small, write_source, out):
    measures = make(write_source([b"", b"  "]), small, out)
    assert list(tree(out)) == ["00000.json"]
    assert measures["shards"][0]["rows"] == 0


BAD = [b"{", {"text": ""}, {"text": 3}, {"body": "x"}, {"text": None}, b'{"text": "\\ud800"}', b'{"text": "\xff"}']


def test_broken_rows_are_counted_and_left_out(small, write_source, out):
    source = write_source([{"text": f"document {i}"} for i in range(20)] + BAD)
    shard = make(source, small, out, max_broken="3/10")["shards"][0]
    assert shard["dropped"] == {
        "'text' has a lone surrogate": 1,
        "'text' is empty": 1,
        "'text' is not a string": 1,
        "no 'text'": 2,
        "not JSON": 1,
        "not UTF-8": 1,
    }
    assert shard["first_dropped"] == [0, 21, "not JSON"]
    assert shard["rows"] == 27 == shard["documents"] + sum(shard["dropped"].values())


def dirty(corpus: Path, tmp_path: Path, bad: dict[int, int]) -> Path:
    """The corpus with some broken lines at the end of some files."""
    source = tmp_path / "dirty"
    (source / "files").mkdir(parents=True)
    (source / "sealed.json").write_bytes((corpus / "sealed.json").read_bytes())
    for path in sorted((corpus / "files").iterdir()):
        count = bad.get(int(path.name[:5]), 0)
        (source / "files" / path.name).write_bytes(path.read_bytes() + b"{\n" * count)
    return source


@pytest.mark.parametrize("threads", [1, 2])
def test_too_many_broken_rows_name_the_worst_shard(corpus, small, out, tmp_path, threads):
    source = dirty(corpus, tmp_path, {0: 1, 1: 9, 2: 2})
    payload = {"shards": [[[0]], [[1]], [[2]], [[3]]], "max_broken": "1/20"}
    message = (
        r"shard 1: .*/files/00001\.jsonl:64: not JSON \(the first of 9 broken rows in 69; max_broken allows 1/20\)\. "
        "Repair the data"
    )
    for _ in range(2):
        with pytest.raises(NemoflowError, match=message):
            make(source, small, out, threads, **payload)
        assert not list(out.glob("*.tmp"))
        assert (out / "00001.json").exists()


def test_the_worst_of_several_is_named(corpus, small, out, tmp_path):
    source = dirty(corpus, tmp_path, {0: 1, 1: 1, 3: 5})
    make(source, small, out, shards=[[[i]] for i in range(4)], max_broken="1/10")
    with pytest.raises(NemoflowError, match=r"shard 3: .*5 broken rows in 65"):
        make(source, small, out, shards=[[[i]] for i in range(4)], max_broken="1/100")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_that_differs_is_found_out(corpus, small, out, monkeypatch, threads):
    load = encode._Gigatoken._load

    def wrong(self):
        load(self)
        right = self.encode
        self.encode = lambda text: right(text.replace(b"1 17 ", b"1 71 "))

    monkeypatch.setattr(encode._Gigatoken, "_load", wrong)
    monkeypatch.setattr(encode.Sample, "COUNT", 100)
    message = (
        r"/files/00001\.jsonl:19: gigatoken gives this document other ids than tokenizers does; set "
        r"tokenizer\.engine: tokenizers"
    )
    with pytest.raises(NemoflowError, match=message):
        make(corpus, small, out, threads, shards=[[[0]], [[1]], [[2]]])
    assert not (out / "00001.json").exists()
    make(corpus, small, out, threads, "tokenizers", shards=[[[0]], [[1]], [[2]]])


def test_a_document_longer_than_the_index_can_tell(corpus, small, out, monkeypatch):
    monkeypatch.setattr(shards, "_LONGEST", 200)
    with pytest.raises(NemoflowError, match=r"00000\.jsonl:\d+: \d+ tokens in one document, of which Megatron's index"):
        make(corpus, small, out)


def test_a_source_that_is_not_finished(small, tmp_path, out):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NemoflowError, match="the source is incomplete"):
        make(tmp_path / "empty", small, out)


def test_finished_shards_are_kept_and_the_broken_one_is_redone(corpus, small, tmp_path):
    payload = {"shards": [[[i]] for i in range(4)], "pool": "1/4"}
    (whole := tmp_path / "whole").mkdir()
    measures = make(corpus, small, whole, **payload)
    (out := tmp_path / "out").mkdir()
    make(corpus, small, out, **payload)
    (out / "00000.json").unlink()
    (out / "00001.pool.bin").unlink()
    (out / "00002.train.idx").write_bytes((out / "00002.train.idx").read_bytes()[:-1])
    (out / "00002.train.bin.99.tmp").write_bytes(b"half")
    kept = (out / "00003.train.bin").stat()
    assert make(corpus, small, out, **payload) == measures
    assert tree(out) == tree(whole)
    assert (out / "00003.train.bin").stat() == kept
    (out / "00002.json").write_text("{")
    assert make(corpus, small, out, 2, **payload) == measures
    assert tree(out) == tree(whole)


def test_nothing_left_to_do_loads_no_engine(corpus, small, out, monkeypatch):
    measures = make(corpus, small, out)
    monkeypatch.setattr(shards, "Encoder", None)
    assert make(corpus, small, out) == measures


KILLED = """
import os, sys, json, signal, time
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from nemoflow.data import shards
at, victim, source, tokenizer, out, threads, payload = json.loads(sys.argv[2])
parent = os.getpid()
events = 0
def event(*_):
    global events
    events += 1
    if events == at:
        os.kill(parent if victim == "parent" else os.getpid(), signal.SIGKILL)
        time.sleep(1)
def counted(function):
    def wrapper(*arguments, **options):
        event()
        done = function(*arguments, **options)
        event()
        return done
    return wrapper
for name in ("__init__", "write", "finish"):
    setattr(shards.HashedFile, name, counted(getattr(shards.HashedFile, name)))
shards.IndexedWriter.finish = counted(shards.IndexedWriter.finish)
shards._remove_all_but = counted(shards._remove_all_but)
shards._SMALL = 0
shards.texts.__globals__["_CHUNK"] = 10000
shards.make(payload, {"source": Path(source), "tokenizer": Path(tokenizer)}, Path(out), print, threads=threads)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(corpus, small, tmp_path, threads):
    payload = PAYLOAD | {"shards": [[[i]] for i in range(4)], "pool": "1/4"}
    (whole := tmp_path / "whole").mkdir()
    make(corpus, small, whole, **payload)
    expected = tree(whole)
    random_ = random.Random(threads)
    kills = {"parent": 0, "self": 0}
    for trial in range(3):
        (out := tmp_path / str(trial)).mkdir()
        for attempt in range(40):
            # few events at first, so that a run is killed several times before it gets through
            at, victim = random_.randrange(1, 25 * (1 + attempt)), random_.choice(sorted(kills))
            arguments = [at, victim, str(corpus), str(small), str(out), threads, payload]
            done = subprocess.run(
                [sys.executable, "-c", KILLED, json.dumps(sys.path), json.dumps(arguments)],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL or "has died" in done.stderr, done.stderr
            kills[victim] += 1
            for path in out.glob("*.json"):  # what has a receipt is as it will be
                assert path.read_bytes() == expected[path.name]
                for entry in json.loads(path.read_text())["files"]:
                    assert (out / entry["name"]).read_bytes() == expected[entry["name"]]
        assert tree(out) == expected
    assert min(kills.values()) >= 2


def test_workers_die_with_their_parent(corpus, small, tmp_path):
    (out := tmp_path / "out").mkdir()
    slow = KILLED.replace("events += 1", "events += 1; time.sleep(0.2)")
    slow = slow.replace("shards.make", "print('up', flush=True); shards.make")
    arguments = [-1, "self", str(corpus), str(small), str(out), 3, PAYLOAD | {"shards": [[[i]] for i in range(4)]}]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, json.dumps(sys.path), json.dumps(arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(found := children.read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_progress_says_how_fast_and_how_long(corpus, small, out, monkeypatch):
    monkeypatch.setattr("nemoflow.data.processes.EVERY", 0)
    said: list[str] = []
    shards.make(
        PAYLOAD | {"shards": [[[i]] for i in range(4)]}, {"source": corpus, "tokenizer": small}, out, said.append
    )
    assert len(said) == 4
    assert re.fullmatch(
        r"3/4 shards, 240 documents, \d+\.\d kB, \d\d,\d{3} tokens; "
        r"[\d,]+ documents/s, \d+\.\d MB/s, \d+\.\d Mtokens/s, \d+ s left",
        said[-1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_memory_is_bounded_also_for_text_in_which_every_word_is_new(tmp_path, format_):
    write_tokenizer(tmp_path / "tekken")
    source = tmp_path / "source"
    (source / "files").mkdir(parents=True)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz   \n", np.uint8)
    draw = np.random.default_rng(0)
    texts = [letters[draw.integers(0, len(letters), 50_000)].tobytes().decode() for _ in range(1_600)]
    if format_ == "parquet":
        pq.write_table(pa.table({"text": texts}), source / "files/00000.parquet")
    else:
        (source / "files/00000.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (source / "sealed.json").write_text(json.dumps({"payload": {"files": [{}], "format": format_}}))
    (tmp_path / "out").mkdir()
    arguments = [-1, "self", str(source), str(tmp_path / "tekken"), str(tmp_path / "out"), 1, PAYLOAD]
    program = KILLED.replace('_CHUNK"] = 10000', '_CHUNK"] = 1 << 20')
    program += "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(sys.path), json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) < 600_000  # kB
