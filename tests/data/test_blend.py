import json
from fractions import Fraction

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemoflow.data import blend
from nemoflow.errors import NemoflowError


@pytest.fixture
def write_shards(tmp_path):
    """A function that writes the measures of shards with these tokens a prefix and split; returns the directory."""

    def write(name, train, valid=(), **more):
        directory = tmp_path / "shards" / name
        directory.mkdir(parents=True)
        prefixes = {
            split: [{"prefix": f"shard-{i:05d}.{split}", "documents": 1, "tokens": n} for i, n in enumerate(tokens)]
            for split, tokens in (("train", train), ("valid", valid), ("test", ()))
        }
        measures = {"eod": 2, "dtype": "uint16", "vocab_size": 2048, "prefixes": prefixes} | more
        (directory / "sealed.json").write_text(json.dumps({"measures": measures}))
        return directory

    return write


def make(parts, shares, out):
    return blend.make({"parts": [{"share": share} for share in shares]}, {"parts": parts}, out, print)


def test_weights_are_shares_times_part_of_the_source(write_shards, out):
    parts = [write_shards("a-1", [300, 100], [5]), write_shards("b-2", [7], [2])]
    measures = make(parts, ["3/10", "7/10"], out)
    written = json.loads((out / "blend.json").read_text())
    assert written == {
        "train": [
            ["../../shards/a-1/shard-00000.train", "9/40"],
            ["../../shards/a-1/shard-00001.train", "3/40"],
            ["../../shards/b-2/shard-00000.train", "7/10"],
        ],
        "valid": [["../../shards/a-1/shard-00000.valid", "3/10"], ["../../shards/b-2/shard-00000.valid", "7/10"]],
        "test": [],
    }
    assert measures == {
        "tokens": {"train": 407, "valid": 7, "test": 0},
        "documents": {"train": 3, "valid": 2, "test": 0},
    }


def test_a_part_without_validation_tokens_is_left_out_there(write_shards, out):
    make([write_shards("a", [1], []), write_shards("b", [1], [4, 4])], ["1/2", "1/2"], out)
    valid = json.loads((out / "blend.json").read_text())["valid"]
    assert valid == [[f"../../shards/b/shard-0000{i}.valid", "1/4"] for i in range(2)]


def test_prefixes_are_found_from_the_artifact(made):
    written = json.loads((made["blend"] / "blend.json").read_text())
    assert sum(Fraction(weight) for _, weight in written["train"]) == 1
    tokens = {}
    for split, parts in written.items():
        read = [IndexedDataset(str(made["blend"] / prefix)) for prefix, _ in parts]
        tokens[split] = sum(int(data.sequence_lengths.sum()) for data in read)
    assert tokens == json.loads((made["blend"] / "sealed.json").read_text())["measures"]["tokens"]
    assert tokens["train"] > 400_000


def test_shares_must_add_up(write_shards, out):
    with pytest.raises(NemoflowError, match="the shares add up to 9/10, not 1"):
        make([write_shards("a", [1]), write_shards("b", [1])], ["1/5", "7/10"], out)


def test_parts_of_two_tokenizers_do_not_mix(write_shards, out):
    parts = [write_shards("a", [1]), write_shards("b", [1], vocab_size=4096)]
    with pytest.raises(NemoflowError, match="b has vocab_size 4096, a has 2048; blend shards of one tokenizer"):
        make(parts, ["1/2", "1/2"], out)


def test_a_part_with_nothing_to_train_on(write_shards, out):
    with pytest.raises(NemoflowError, match="a has nothing to train on"):
        make([write_shards("a", [], [3])], ["1"], out)


def test_shards_that_are_not_sealed(tmp_path, out):
    with pytest.raises(NemoflowError, match=r"sealed\.json: cannot be read"):
        make([tmp_path], ["1"], out)
