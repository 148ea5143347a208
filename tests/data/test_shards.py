import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from nemoflow.data import shards, tokenizer
from nemoflow.data.rows import Broken, read, shards_of
from nemoflow.errors import NemoflowError

PAYLOAD = {"valid": "1/50", "test": "1/50", "text_field": "text", "append_eod": True, "max_broken": "1/1000"}


def make(made, source, out, **payload):
    return shards.make(PAYLOAD | payload, {"source": source, "tokenizer": made["tokenizer"]}, out, print)


def by_megatron(prefix: Path, documents, dtype) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def assert_equal_files(one: Path, other: Path) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [2048, 131072])
@given(documents=st.lists(st.lists(st.integers(0, 2047), min_size=1, max_size=40), min_size=1, max_size=30))
def test_writer_equals_megatrons_builder(tmp_path_factory, vocab_size, documents):
    directory = tmp_path_factory.mktemp("indexed")
    writer = shards.IndexedWriter(directory / "ours", shards.id_type(vocab_size))
    for ids in documents:
        writer.add(ids)
    writer.finish()
    by_megatron(directory / "theirs", documents, DType.optimal_dtype(vocab_size))
    assert_equal_files(directory / "ours", directory / "theirs")
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 131072])
def test_id_type_is_megatrons(vocab_size):
    assert shards.id_type(vocab_size).type is DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("source", ["stdlib_topics", "stdlib_docstrings"])
def test_shards_equal_megatrons_builder_over_the_whole_source(made, tmp_path, source):
    artifact = made[f"shards/{source}"]
    measures = json.loads((artifact / "sealed.json").read_text())["measures"]
    engine = tokenizer.load(made["tokenizer"]).engine
    engine.encode_special_tokens = True
    listed = {entry["prefix"]: entry for split in measures["prefixes"].values() for entry in split}
    expected: dict[str, list] = {}
    for shard in shards_of(made[source]):
        for _, _, row in read(shard, Broken()):
            point = Fraction(int(hashlib.sha256(row["text"].encode()).hexdigest()[:16], 16), 2**64)
            split = "valid" if point < Fraction(1, 50) else "test" if point < Fraction(2, 50) else "train"
            expected.setdefault(f"{shard.stem}.{split}", []).append([*engine.encode(row["text"]).ids, 2])
    assert listed.keys() == expected.keys() == {path.stem for path in artifact.glob("*.bin")}
    for prefix, documents in expected.items():
        by_megatron(tmp_path / prefix, documents, np.uint16)
        assert_equal_files(artifact / prefix, tmp_path / prefix)
        assert (listed[prefix]["documents"], listed[prefix]["tokens"]) == (len(documents), sum(map(len, documents)))
    assert measures["tokens"] == sum(entry["tokens"] for entry in measures["prefixes"]["train"])
    assert measures["documents"] == sum(entry["documents"] for entry in measures["prefixes"]["train"])
    assert (measures["eod"], measures["dtype"], measures["vocab_size"]) == (2, "uint16", 1024)


def test_megatron_reads_the_documents_back(made):
    artifact = made["shards/stdlib_docstrings"]
    data = IndexedDataset(str(artifact / "shard-00000.train"))
    engine = tokenizer.load(made["tokenizer"]).engine
    texts = {row["text"] for _, _, row in read(shards_of(made["stdlib_docstrings"])[0], Broken())}
    assert len(data) > 1900
    for i in range(0, len(data), 50):
        assert data[i][-1] == 2
        assert engine.decode(data[i][:-1].tolist(), skip_special_tokens=False) in texts


def test_text_that_spells_a_control_token_does_not_become_it(made, write_source, out):
    texts = ["plain", "an </s> inside", "<|im_start|>user\nhi<|im_end|>", "<pad", "</s>"]
    measures = make(made, write_source([{"text": t} for t in texts]), out, valid="0", test="0")
    assert measures["control_strings"] == 3
    data = IndexedDataset(str(out / "shard-00000.train"))
    engine = tokenizer.load(made["tokenizer"]).engine
    for i, text in enumerate(texts):
        assert data[i].min() == data[i][-1] == 2
        assert min(data[i][:-1]) >= len(tokenizer.SPECIAL)
        assert engine.decode(data[i][:-1].tolist(), skip_special_tokens=False) == text


def test_without_end_of_document(made, write_source, out):
    make(made, write_source([{"text": "a"}, {"text": "b"}]), out, append_eod=False, valid="0", test="0")
    data = IndexedDataset(str(out / "shard-00000.train"))
    assert data.sequence_lengths.tolist() == [1, 1]


def test_another_field(made, write_source, out):
    rows = [{"body": "a", "text": "never"}]
    make(made, write_source(rows), out, text_field="body", valid="0", test="0", append_eod=False)
    data = IndexedDataset(str(out / "shard-00000.train"))
    assert len(data) == 1
    assert tokenizer.load(made["tokenizer"]).engine.decode(data[0].tolist()) == "a"


def test_splits_without_documents_are_not_written(made, write_source, out):
    measures = make(made, write_source([{"text": "a"}]), out, valid="0", test="0")
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.train.bin", "shard-00000.train.idx"]
    assert measures["prefixes"]["valid"] == measures["prefixes"]["test"] == []


def test_broken_rows_are_counted_and_left_out(made, write_source, out):
    bad = [b"{", {"text": ""}, {"text": 3}, {"body": "x"}, {"text": None}, b'{"text": "\\ud800"}']
    measures = make(made, write_source([{"text": f"document {i}"} for i in range(20)] + bad), out, max_broken="3/10")
    assert measures["broken"] == {
        "'text' has a lone surrogate": 1,
        "'text' is empty": 1,
        "'text' is not a string": 1,
        "no 'text'": 2,
        "not JSON": 1,
    }
    assert sum(entry["documents"] for split in measures["prefixes"].values() for entry in split) == 20


def test_too_many_broken_rows_name_the_first(made, write_source, out):
    source = write_source([{"text": "fine"}, b'{"text": "cut o'])
    with pytest.raises(NemoflowError, match=r"shard-00000\.jsonl:2: not JSON \(the first of 1 broken rows in 2"):
        make(made, source, out)


@pytest.mark.parametrize("rows", [[], [b"", b"  "]])
def test_an_empty_corpus_is_an_error(made, write_source, out, rows):
    with pytest.raises(NemoflowError, match="0 usable documents, none in the train split; the corpus is empty"):
        make(made, write_source(rows), out)


def test_a_missing_shard_is_an_error(made, tmp_path, out):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NemoflowError, match="the source is incomplete"):
        make(made, tmp_path / "empty", out)
