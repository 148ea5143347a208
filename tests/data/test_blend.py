import csv
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemoflow.data import blend
from nemoflow.errors import NemoflowError


@pytest.fixture
def write_merge(tmp_path):
    """A function that writes the record of a merge with these tokens a prefix and split; returns the directory."""

    def write(name, train, valid=(5,), test=(2,), **more):
        directory = tmp_path / "merge" / name
        directory.mkdir(parents=True)
        prefixes = {
            split: [{"prefix": f"{split}-{i:05d}", "documents": 1, "tokens": n} for i, n in enumerate(tokens)]
            for split, tokens in (("train", train), ("valid", valid), ("test", test))
        }
        total = sum((*train, *valid, *test))
        documents = len(train) + len(valid) + len(test)
        measures = {"eod": 2, "dtype": "uint16", "vocab_size": 2048, "prefixes": prefixes, "tokens": total}
        measures |= {"documents": documents, "rows": documents + 1, "bytes": 4 * total, "shards": 2}
        measures |= {"dropped": {"not JSON": 1}, "control_strings": 3, "by_reference": 0, "lengths": [0, documents, 1]}
        record = {"inputs": [{"role": "source", "label": f"source-{name}"}], "measures": measures | more}
        (directory / "sealed.json").write_text(json.dumps(record))
        return directory

    return write


def make(parts, shares, out):
    return blend.make({"parts": [{"share": share} for share in shares]}, {"parts": parts}, out, print)


def test_weights_are_shares_times_part_of_the_source(write_merge, out):
    made = make([write_merge("a-1", [300, 100]), write_merge("b-2", [7], [2])], ["3/10", "7/10"], out)
    assert json.loads((out / "weights.json").read_text()) == {
        "train": [
            ["../../merge/a-1/train-00000", "9/40"],
            ["../../merge/a-1/train-00001", "3/40"],
            ["../../merge/b-2/train-00000", "7/10"],
        ],
        "valid": [["../../merge/a-1/valid-00000", "3/10"], ["../../merge/b-2/valid-00000", "7/10"]],
        "test": [["../../merge/a-1/test-00000", "3/10"], ["../../merge/b-2/test-00000", "7/10"]],
    }
    assert made.measures == {
        "tokens": {"train": 407, "valid": 7, "test": 4},
        "documents": {"train": 3, "valid": 2, "test": 2},
        "parts": [
            {"source": "source-a-1", "share": "3/10", "tokens": {"train": 400, "valid": 5, "test": 2}},
            {"source": "source-b-2", "share": "7/10", "tokens": {"train": 7, "valid": 2, "test": 2}},
        ],
    }


def test_what_holds_paths_of_this_place_is_not_sealed(write_merge, out):
    made = make([write_merge("a", [1])], ["1"], out)
    assert [file["name"] for file in made.contents] == ["summary.csv", "summary.svg", "weights.json"]
    assert str(out.parent) in (out / "blend.json").read_text()
    for file in made.contents:
        assert str(out.parent) not in (out / file["name"]).read_text()


def test_megatron_bridge_reads_the_file_as_it_is(made):
    program = """
import json, sys
from nemoflow import cpu
if cpu.needed():
    cpu.enable()
from megatron.bridge.recipes.utils.dataset_utils import get_blend_fields_from_data_paths
print(json.dumps(get_blend_fields_from_data_paths(per_split_data_args_path=sys.argv[1])))
"""
    command = [sys.executable, "-c", program, str(made["blend"] / "blend.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    whole, per_split, split = json.loads(printed.splitlines()[-1])
    assert (whole, split) == (None, None)
    for (prefixes, weights), exact in zip(
        per_split, json.loads((made["blend"] / "weights.json").read_text()).values(), strict=True
    ):
        assert weights == [float(Fraction(weight)) for _, weight in exact]
        for absolute, (relative, _) in zip(prefixes, exact, strict=True):
            assert Path(absolute) == (made["blend"] / relative).resolve()
            assert len(IndexedDataset(absolute)) > 0


def test_prefixes_are_found_from_the_artifact(made):
    written = json.loads((made["blend"] / "weights.json").read_text())
    tokens = {}
    for split, parts in written.items():
        assert sum(Fraction(weight) for _, weight in parts) == 1
        read = [IndexedDataset(str(made["blend"] / prefix)) for prefix, _ in parts]
        tokens[split] = sum(int(data.sequence_lengths.sum()) for data in read)
    assert tokens == json.loads((made["blend"] / "sealed.json").read_text())["measures"]["tokens"]
    assert tokens["train"] > 400_000


def test_the_table_has_a_line_per_source_and_a_column_per_reason(write_merge, out):
    parts = [write_merge("a", [30]), write_merge("b", [1], dropped={"no 'text'": 4}, rows=7)]
    make(parts, ["1/3", "2/3"], out)
    with (out / "summary.csv").open() as file:
        a, b = csv.DictReader(file)
    assert (a["source"], a["share"], a["train tokens"], a["dropped"]) == ("source-a", "1/3", "30", "1")
    assert (a["dropped: not JSON"], a["dropped: no 'text'"]) == ("1", "0")
    assert (b["dropped: not JSON"], b["dropped: no 'text'"], b["rows"]) == ("0", "4", "7")


@pytest.mark.parametrize("count", [1, 23])
def test_the_picture_is_an_svg_and_the_same_bytes_each_time(write_merge, tmp_path, count):
    parts = [write_merge(f"s{i}", [10 ** (1 + i % 6)], dropped={"not JSON": 1} if i % 2 else {}) for i in range(count)]
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make(parts, [f"1/{count}"] * count, tmp_path / name)
        drawn.append((tmp_path / name / "summary.svg").read_bytes())
    assert drawn[0] == drawn[1]
    assert ElementTree.fromstring(drawn[0]).tag.endswith("svg")


def test_sources_of_one_label_are_told_apart(write_merge, out):
    parts = [write_merge("a-1", [3]), write_merge("a-2", [4])]
    for part in parts:
        record = json.loads((part / "sealed.json").read_text())
        record["inputs"][0]["label"] = "jsonl-1-files"
        (part / "sealed.json").write_text(json.dumps(record))
    assert [p["source"] for p in make(parts, ["1/2", "1/2"], out).measures["parts"]] == ["a-1", "a-2"]


def test_shares_must_add_up(write_merge, out):
    with pytest.raises(NemoflowError, match="the shares add up to 9/10, not 1"):
        make([write_merge("a", [1]), write_merge("b", [1])], ["1/5", "7/10"], out)


def test_parts_of_two_tokenizers_do_not_mix(write_merge, out):
    parts = [write_merge("a", [1]), write_merge("b", [1], vocab_size=4096)]
    with pytest.raises(NemoflowError, match="b has vocab_size 4096, a has 2048; blend sources of one tokenizer"):
        make(parts, ["1/2", "1/2"], out)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_source_is_in_every_split(write_merge, out, split):
    parts = [write_merge("a", [1]), write_merge("b", **{"train": [1], split: []})]
    with pytest.raises(NemoflowError, match=f"b has nothing in its {split} split"):
        make(parts, ["1/2", "1/2"], out)


def test_a_merge_that_is_not_sealed(tmp_path, out):
    with pytest.raises(NemoflowError, match=r"sealed\.json: cannot be read"):
        make([tmp_path], ["1"], out)
