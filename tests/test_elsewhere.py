"""nemoflow import: what was made elsewhere becomes an artifact, and is used like any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from graph import Work
from hf_models import random_model, small_tokenizer
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemoflow import export, imports
from nemoflow.data import indexed
from nemoflow.errors import NemoflowError

EOD = 2
TOY = {"engine": "sleep_engine", "function": "toys.toy_pretrain_config", "save_interval": 5}


def write(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """Documents of sequences of ids, by Megatron-Core's own writer."""
    import torch

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin")


def texts(count: int, seed: int = 0) -> list[list[list[int]]]:
    drawn = np.random.default_rng(seed)
    return [[[*drawn.integers(3, 200, drawn.integers(1, 60)).tolist(), EOD]] for _ in range(count)]


def all_of(bin_: Path, vocab_size: int = 512, eod: int | None = EOD) -> list[list[int]]:
    found = []
    for ids, lengths, hashes in indexed.read(bin_, str(bin_), vocab_size, eod):
        assert len(hashes) == len(lengths)
        found += [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
    return found


def test_documents_are_read_as_megatron_wrote_them(tmp_path, monkeypatch):
    documents = [*texts(50), [[7, 8], [9]], [[11]]]
    bin_ = write(tmp_path / "web", documents)
    plain = [[one for sequence in document for one in sequence] for document in documents]
    assert all_of(bin_, eod=None) == plain
    assert all_of(bin_) == [*plain[:-2], [7, 8, 9, EOD], [11, EOD]], "each ends with the token that ends documents"
    monkeypatch.setattr(indexed, "_TOKENS", 16)
    assert all_of(bin_, eod=None) == plain


def replaced(file: Path, at: int, new: bytes) -> None:
    text = file.read_bytes()
    file.write_bytes(text[:at] + new + text[at + len(new) :])


@pytest.mark.parametrize(
    ("suffix", "harm", "message"),
    [
        (".bin", lambda f: f.write_bytes(f.read_bytes()[:-2]), "its .idx says"),
        (".idx", lambda f: f.write_bytes(f.read_bytes()[:-8]), "its header says .* it is cut off"),
        (".idx", lambda f: f.write_bytes(b"hello"), "web.idx: is no index of Megatron's"),
        (".idx", lambda f: replaced(f, 17, bytes([6])), "ids of type 6"),
        (".idx", lambda f: replaced(f, f.stat().st_size - 16, bytes(8)), "do not follow each other"),
        (".bin", lambda f: replaced(f, 0, b"\xff\xff"), "has the id 65,535, the tokenizer has 512"),
    ],
)
def test_what_is_damaged_or_of_another_tokenizer_is_one_error(tmp_path, suffix, harm, message):
    bin_ = write(tmp_path / "web", texts(20))
    harm(bin_.with_suffix(suffix))
    with pytest.raises(NemoflowError, match=message):
        all_of(bin_)


@pytest.fixture
def work(tmp_path) -> Work:
    """A directory with a tokenizer, and data that others made with it."""
    work = Work(tmp_path / "work")
    (work.path / "config/recipes").mkdir(parents=True)
    small_tokenizer(work.path / "elsewhere/tokenizer")
    write(work.path / "elsewhere/web", texts(300))
    write(work.path / "elsewhere/code", texts(200, seed=1))
    (work.path / "elsewhere/blend.txt").write_text("3 web 1 code\n")
    return work


def test_data_becomes_an_artifact_and_is_trained_on(work: Work):
    done = work.nemoflow("import", "elsewhere/blend.txt", "--as", "mixed", "--tokenizer", "elsewhere/tokenizer")
    assert "`snakemake data/mixed` makes the artifact" in done.stdout, done.stderr
    recipe = yaml.safe_load(work.recipe("mixed").read_text())
    assert recipe["datasets"] == {"mixed": {"blend": {"web": "3/4", "code": "1/4"}}}
    stage = TOY | {"name": "base", "kind": "pretrain", "data": {"blend": {"web": 1}}, "until": 5, "horizon": 5}
    mine = {"extends": "mixed", "held_out": {"valid": 300, "test": 300, "cap": "1/5"}, "stages": [stage]}
    mine["overrides"] = {"sleep_engine": {"train.global_batch_size": 2}}
    work.recipe("mine").write_text(yaml.safe_dump(mine))
    work.run("data/mine@mixed", "pretrain/mine")
    trace = json.loads(work.nemoflow("trace", "--json", "pretrain/mine").stdout)
    (merged,) = (one["record"] for one in trace["artifacts"] if one["record"]["kind"] == "merge")
    assert merged["measures"]["documents"] == 300
    assert len([file for file in trace["raw_files"] if file["artifact"].startswith("source/megatron")]) == 2


def test_what_cannot_be_imported_leaves_nothing_behind(work: Work):
    (work.path / "elsewhere/code.idx").unlink()
    (work.path / "elsewhere/empty").mkdir()
    (work.path / "elsewhere/odd.txt").write_text("web 3\n")
    given = ["--tokenizer", "elsewhere/tokenizer"]
    for arguments, message in (
        (["elsewhere/blend.txt", "--as", "x", *given], "code.bin: has no code.idx beside it"),
        (
            ["elsewhere/empty", "--as", "x", *given],
            "elsewhere/empty: is nothing that can be imported: a directory with",
        ),
        (["elsewhere/odd.txt", "--as", "x", *given], "odd.txt: is no blend: weights and prefixes by turns"),
        (["elsewhere/web", "--as", "x"], "--tokenizer is missing: elsewhere/web does not say"),
        (["elsewhere/web", "--as", "nano3", *given], "--as nano3: there is a recipe of this name"),
        (["elsewhere/web", "--as", "a/b", *given], "--as a/b: a name is letters"),
    ):
        done = work.nemoflow("import", *arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert list((work.path / "config/recipes").iterdir()) == []


@pytest.mark.slow
def test_a_megatron_checkpoint_is_imported_exported_and_verified(tmp_path):
    """One that this project's own import of a published model wrote: what comes out is what went in."""
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    random_model("ME*M").save_pretrained(tmp_path / "state/checkpoint")
    published = tmp_path / "published"
    published.mkdir()
    state = {"state": tmp_path / "state", "tokenizer": tokenizer}
    export.make({"engine": "trl", "dtype": "float32"}, state, published, print, [])
    (tmp_path / "made").mkdir()
    imports.make({}, {"model": published, "tokenizer": tokenizer}, tmp_path / "made", print)
    work = Work(tmp_path / "work")
    (work.path / "config/recipes").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "made/checkpoint", tmp_path / "run/iter_0000010")
    done = work.nemoflow("import", str(tmp_path / "run"), "--as", "theirs", "--tokenizer", str(tokenizer))
    assert "`snakemake import/theirs`" in done.stdout, done.stderr
    work.recipe("theirs").write_text(work.recipe("theirs").read_text() + "export: {dtype: float32}\n")
    work.run("import/theirs", "hf_export/theirs")
    from safetensors.torch import load_file

    before, after = (load_file(d / "model.safetensors") for d in (published, work.path / "hf_export/theirs"))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    checked = work.nemoflow("verify", "--deep", "import/theirs")
    assert checked.returncode == 0, checked.stderr
    origin = json.loads(work.nemoflow("trace", "--json", "hf_export/theirs").stdout)["raw_files"]
    assert {"run_config.yaml", ".metadata"} <= {file.get("path") for file in origin}
    assert "import theirs of theirs" in work.nemoflow("show", "hf_export/theirs").stdout
    (tmp_path / "run/iter_0000010/run_config.yaml").write_text("{}")
    assert "run_config.yaml: changed since it was pinned" in work.refused("-n", "import/theirs")
