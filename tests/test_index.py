"""Index caches: the same bytes in any store, made before training and only read by it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, RECIPES, make_blend, pretrain

from nemoflow.data import index
from nemoflow.engines.megatron_bridge import index_overrides
from nemoflow.engines.megatron_bridge.train import fits
from nemoflow.errors import NemoflowError

pytest_plugins = ["megatron_fixtures"]

OVERRIDES = MODEL | PRECISION | PRETRAIN


def files(directory: Path) -> dict[str, str]:
    """Every file and link below: its bytes' digest, or what it points to."""
    return {
        p.relative_to(directory).as_posix(): str(p.readlink())
        if p.is_symlink()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def made(store: Path, progress=lambda _: None, launch=None, **changes) -> tuple[Path, dict]:
    """An index artifact of the store's blend, made as a job makes it: in partial/, then taken one level up."""
    blend = make_blend(store)
    payload = {
        "engine": "megatron_bridge",
        "function": f"{RECIPES}.nemotron_3_nano_pretrain_config",
        "overrides": index_overrides(OVERRIDES),
        "samples": 16,
        **changes,
    }
    directory = store / "index" / "made"
    out = directory / "partial"
    out.mkdir(parents=True)
    inputs = {"data": blend, "tokenizer": store / "tokenizer"}
    measures = index.make(payload, inputs, out, progress, launch or {"max_epochs": "4"})
    for path in out.iterdir():
        path.rename(directory / path.name)
    out.rmdir()
    return directory, measures


@pytest.fixture(scope="session")
def store(data, tmp_path_factory) -> Path:
    """A store with an index artifact; never trained from."""
    store = tmp_path_factory.mktemp("store") / "first"
    for name in ("merge", "tokenizer"):
        shutil.copytree(data / name, store / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOFLOW_CPU", "1")
        _, measures = made(store)
    (store / "measures.json").write_text(json.dumps(measures))
    return store


def request_data(store: Path, samples: int = 16) -> dict:
    """What the driver of a trajectory tells the trainer about its data."""
    directory = store / "index" / "made"
    return {"blend": str((directory / "blend").resolve()), "cache": str(directory / "cache"), "samples": samples}


def test_an_index_holds_caches_a_link_to_its_blend_and_how_many_samples_there_are(store):
    found = files(store / "index" / "made")
    assert found.pop("blend") == "../../blend/a1.2-b1.2"
    assert (store / "index" / "made" / "blend" / "weights.json").exists()
    assert json.loads((store / "index" / "made" / "index.json").read_text()) == {"samples": {"train": 16, "valid": 8}}
    kinds = sorted(name.partition("-")[2] for name in found if name != "index.json")
    of_source = ["description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"]
    of_blend = ["dataset_index.npy", "dataset_sample_index.npy", "description.txt"]
    expected = [f"GPTDataset-{s}-{f}" for s in ("train", "valid") for f in of_source for _ in "ab"]
    assert kinds == sorted(expected + [f"BlendedDataset-{s}-{f}" for s in ("train", "valid") for f in of_blend])


def test_measures_are_samples_and_epochs_of_what_is_read(store):
    measures = json.loads((store / "measures.json").read_text())
    assert measures["samples"] == {"train": 16, "valid": 8}
    parts = json.loads((make_blend(store) / "sealed.json").read_text())["measures"]["parts"]
    for part in parts:
        assert measures["epochs"][part["source"]] == round(16 * 64 / 2 / part["tokens"]["train"], 3)


def test_the_bytes_are_the_same_in_another_store_and_name_no_place(store, data, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOFLOW_CPU", "1")
    other = tmp_path / "a place with another name"
    for name in ("merge", "tokenizer"):
        shutil.copytree(data / name, other / name)
    directory, _ = made(other)
    assert files(directory) == files(store / "index" / "made")
    for path in (directory / "cache").iterdir():
        assert b'"/' not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_training_from_a_moved_store_reads_the_same_samples_and_writes_nothing(server, store, tmp_path):
    digits = []
    for n, name in enumerate(("before", "after")):
        place = tmp_path / name
        if n == 0:
            shutil.copytree(store, place, symlinks=True)
        else:
            (tmp_path / "before").rename(place)
        known = {"data": request_data(place), "tokenizer": str(place / "tokenizer"), "horizon": 4, "stop": 3}
        run = pretrain(server, place, tmp_path / f"run{n}", **known)
        before = {str(p): p.stat().st_mtime_ns for p in place.rglob("*")}
        run.train()
        assert {str(p): p.stat().st_mtime_ns for p in place.rglob("*")} == before
        digits.append((run.digits(), run.validation()))
    assert list(digits[0][0]) == [1, 2, 3]
    assert digits[0] == digits[1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.seq_length", 32, "sequence_length 64 in the index, 32 here"),
        ("dataset.random_seed", 7, "random_seed 1234 in the index, 7 here"),
        ("validation.eval_iters", 5, "(valid): num_samples"),
    ],
)
def test_an_index_of_other_settings_is_one_clear_error(server, store, tmp_path, key, value, said):
    known = {"data": request_data(store), "tokenizer": str(store / "tokenizer"), "horizon": 4, "stop": 4}
    before = files(store)
    run = pretrain(server, store, tmp_path, overrides=OVERRIDES | {key: value}, **known)
    line = run.fails()
    assert f"{store}/index/made/cache: does not fit this stage" in line
    assert said in line
    assert files(store) == before


def test_a_missing_file_is_not_built_again(server, store, tmp_path):
    place = tmp_path / "store"
    shutil.copytree(store, place, symlinks=True)
    next((place / "index" / "made" / "cache").glob("*Blended*train-dataset_index.npy")).unlink()
    before = files(place)
    known = {"data": request_data(place), "tokenizer": str(place / "tokenizer"), "horizon": 4, "stop": 4}
    line = pretrain(server, place, tmp_path / "run", **known).fails()
    assert "BlendedDataset-train-dataset_index.npy is missing" in line
    assert files(place) == before


@pytest.mark.slow
def test_several_processes_only_read(store, tmp_path):
    """Two ranks, each with its half of every batch."""
    place = tmp_path / "store"
    shutil.copytree(store, place, symlinks=True)
    run = pretrain(
        None, place, tmp_path / "run", data=request_data(place), tokenizer=str(place / "tokenizer"), horizon=4, stop=2
    )
    request = tmp_path / "request.json"
    before = files(place)
    environment = {**os.environ, "NEMOFLOW_CPU": "1", "NEMOFLOW_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "nemoflow.engines.megatron_bridge.train", str(request)]

    def ends() -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    request.write_text(json.dumps(run.request))
    done = ends()
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(run.digits()) == [1, 2]
    assert files(place) == before

    other = {**run.request, "checkpoints": str(tmp_path / "other"), "config": str(tmp_path / "other.yaml")}
    request.write_text(json.dumps(other | {"overrides": OVERRIDES | {"model.seq_length": 32}}))
    done = ends()
    assert done.returncode != 0
    assert "sequence_length 64 in the index, 32 here" in done.stderr
    assert files(place) == before


def test_an_index_ends_where_the_horizon_does():
    request = {"data": {"samples": 98}, "horizon": 24}
    fits(request, 0, 4)
    fits(request, 3, 4)  # after another batch size, what fills no batch is left over
    with pytest.raises(
        NemoflowError, match=r"has 98 samples, and until iteration 24 the stage reads 94 .* batches of 4"
    ):
        fits(request, 4, 4)
    with pytest.raises(NemoflowError, match=r"the stage reads 192 of them in batches of 8: the frozen stage"):
        fits(request, -94, 8)


def written_blend(store: Path, parts: list[tuple[str, str, int]], prefixes: int = 1) -> None:
    blend = store / "blend" / "mix"
    blend.mkdir(parents=True)
    listed = [{"source": n, "share": share, "tokens": {"train": tokens}} for n, share, tokens in parts]
    (blend / "sealed.json").write_text(json.dumps({"measures": {"parts": listed}}))
    weights = [[f"../../merge/{n}/train-{i:05d}", share] for n, share, _ in parts for i in range(prefixes)]
    (blend / "weights.json").write_text(json.dumps({"train": weights, "valid": weights[:1]}))


def slept(store: Path, samples: int, launch: dict, length: int | None = 10) -> dict:
    """What an index by the engine of the graph's tests measures."""
    payload = {"engine": "sleep_engine", "overrides": {"sleep.length": length}, "samples": samples}
    out = store / "index" / "made" / "partial"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    inputs = {"data": store / "blend" / "mix", "tokenizer": store / "tokenizer"}
    return index.make(payload, inputs, out, lambda _: None, launch)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("importable")
def test_a_source_may_be_read_so_often_and_not_a_token_more(tmp_path):
    written_blend(tmp_path, [("rare", "1/10", 1000), ("common", "9/10", 10**6)])
    assert slept(tmp_path, 4000, {})["epochs"] == {"rare": 4.0, "common": 0.036}
    with pytest.raises(NemoflowError) as error:
        slept(tmp_path, 4001, {})
    said = str(error.value)
    assert said.startswith("data.blend.rare: would be read 4.001 times, and max_epochs is 4: the stage reads 40,010 ")
    assert "4,001 of them from this source (share 1/10), which has 1,000; " in said
    assert "a share of at most 0.0999, raise data.max_epochs, or train on fewer tokens" in said
    assert not list((tmp_path / "index" / "made" / "partial").iterdir()), "nothing was built"
    assert slept(tmp_path, 4001, {"max_epochs": "5"})["epochs"]["rare"] == 4.001
    with pytest.raises(NemoflowError, match="max_epochs is 1/2"):
        slept(tmp_path, 501, {"max_epochs": "1/2"})


@pytest.mark.usefixtures("importable")
def test_a_stage_that_stops_early_reads_less_than_its_order_has(tmp_path):
    written_blend(tmp_path, [("all", "1", 1000)])
    assert slept(tmp_path, 4000, {"reads": 50})["epochs"] == {"all": 40.0}, "of the whole order"


def test_epochs_are_exact():
    parts = [{"source": "a", "share": "1/3", "tokens": {"train": 7 * 10**12}}]
    assert index.epochs(parts, 25 * 10**12) == {"a": Fraction(25, 21)}


@pytest.mark.usefixtures("importable")
def test_a_blend_of_too_many_files_is_refused(tmp_path):
    written_blend(tmp_path, [("a", "1", 10**9)], prefixes=100)
    slept(tmp_path, 1, {})
    shutil.rmtree(tmp_path / "blend")
    written_blend(tmp_path, [("a", "1", 10**9)], prefixes=101)
    with pytest.raises(NemoflowError, match="train has 101 files, and at most 100 are blended: Megatron compares all"):
        slept(tmp_path, 1, {})


def test_without_a_sequence_length_epochs_cannot_be_told(tmp_path):
    written_blend(tmp_path, [("a", "1", 10**9)])
    with pytest.raises(NemoflowError, match=r"do not say the sequence length.* write model\.seq_length"):
        slept(tmp_path, 1, {}, length=None)


def test_what_the_engine_refuses_is_said_in_its_words(store, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOFLOW_CPU", "1")
    place = tmp_path / "store"
    shutil.copytree(store, place, symlinks=True, ignore=shutil.ignore_patterns("index"))
    with pytest.raises(NemoflowError, match=r"function: nowhere\.config: there is no module 'nowhere'"):
        made(place, function="nowhere.config")


def test_only_what_the_order_depends_on_makes_another_index():
    assert index_overrides(OVERRIDES) == {
        "model.seq_length": 64,
        "train.global_batch_size": 4,
        "validation.eval_iters": 2,
    }
    changed = {
        "dataset.random_seed": 7,
        "dataset.num_workers": 3,
        "dataset.reset_position_ids": True,
        "dataset.mid_level_dataset_surplus": 0.01,
        "tokenizer.hf_tokenizer_kwargs": {},
        "validation.eval_global_batch_size": 2,
        "rng.seed": 5,
        "optimizer.lr": 1.0,
    }
    assert sorted(index_overrides(OVERRIDES | changed)) == [
        "dataset.mid_level_dataset_surplus",
        "dataset.random_seed",
        "model.seq_length",
        "tokenizer.hf_tokenizer_kwargs",
        "validation.eval_global_batch_size",
        "validation.eval_iters",
    ]
