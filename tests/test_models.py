"""Models that are not trained here: imported from Hugging Face, there and back; averages of states."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hf_models import random_model, small_tokenizer
from megatron_fixtures import Run, sft

from nemoflow import average, cpu, export, imports
from nemoflow.errors import NemoflowError

pytest_plugins = ["megatron_fixtures"]


def tensors(directory: Path) -> dict:
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def exported(state: Path, tokenizer: Path, out: Path, lineage=()) -> Path:
    out.mkdir(parents=True)
    payload = {"engine": "megatron_bridge", "dtype": "float32"}
    export.make(payload, {"state": state, "tokenizer": tokenizer}, out, print, list(lineage))
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def nemotron(tokenizer, tmp_path_factory) -> Path:
    """A NemotronH model with random weights, as it is published."""
    state = tmp_path_factory.mktemp("nemotron")
    random_model("ME*M").save_pretrained(state / "checkpoint")
    out = state / "published"
    out.mkdir()
    export.make({"engine": "trl", "dtype": "float32"}, {"state": state, "tokenizer": tokenizer}, out, print, [])
    return out


@pytest.fixture(scope="module")
def imported(nemotron, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported")
    return out, imports.make({}, {"model": nemotron, "tokenizer": tokenizer}, out, print)


def test_every_tensor_is_there_and_back(nemotron, imported, tokenizer, tmp_path):
    before, after = tensors(nemotron), tensors(exported(imported[0], tokenizer, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.equal(after[name]), name


def test_what_an_import_says_of_itself(nemotron, imported):
    out, made = imported
    assert made.measures["parameters"] == sum(t.numel() for n, t in tensors(nemotron).items() if "correction" not in n)
    assert made.measures["hf_config"] == json.loads((nemotron / "config.json").read_text())
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {c["name"] for c in made.contents} == there
    assert all(p.startswith("checkpoint/") for p in there)
    assert not any("tokenizer" in p for p in there)


def test_an_import_is_described_as_on_a_gpu(imported):
    """Who trains it takes its settings from there: those of the machine that converted it must not be among them."""
    model = yaml.safe_load((imported[0] / "checkpoint/run_config.yaml").read_text())["model"]
    changed = [name for name, value in cpu.MODEL.items() if name in model and model[name] != value]
    assert {"transformer_impl", "moe_grouped_gemm", "persist_layer_norm"} & {*changed}
    assert model["hybrid_layer_pattern"] == "ME*M"
    assert model["should_pad_vocab"] is False


def test_an_sft_starts_from_it(imported, server, data, tmp_path):
    start = tmp_path / "iter_0000000"
    start.symlink_to(imported[0] / "checkpoint")
    run = sft(server, data, tmp_path / "sft", start).train()
    losses = [digits[0] for digits in run.digits().values()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    model = yaml.safe_load((run.checkpoint(6) / "run_config.yaml").read_text())["model"]
    assert model["hybrid_layer_pattern"] == "ME*M"


@pytest.mark.slow
def test_a_dense_model_is_there_and_back(tokenizer, tmp_path):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 256}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **more, tie_word_embeddings=False)).save_pretrained(tmp_path / "qwen")
    out = tmp_path / "imported"
    out.mkdir()
    made = imports.make({}, {"model": tmp_path / "qwen", "tokenizer": tokenizer}, out, print)
    payload = {"kind": "import", "model": "b" * 12}
    record = {"kind": "import", "label": "qwen", "identity": "a" * 12, "payload": payload, "inputs": []}
    back = exported(out, tokenizer, tmp_path / "back", [record | {"measures": made.measures}])
    before, after = tensors(tmp_path / "qwen"), tensors(back)
    assert before.keys() == after.keys()
    assert all(t.equal(after[n]) for n, t in before.items())
    loaded, info = Qwen3ForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("cut", r"model.safetensors: has \d+ bytes where its header says \d+; it is cut off"),
        ("missing", r"holds no \*.safetensors file"),
        ("unknown", r"config.json: model_type 'flying_circus': transformers .* does not know it"),
        ("tokens", r"has 512 tokens, the model embeds 256"),
    ],
)
def test_what_cannot_be_imported_is_one_clear_error(nemotron, tokenizer, tmp_path, harm, message):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(nemotron, model)
    out.mkdir()
    weights, config = model / "model.safetensors", model / "config.json"
    match harm:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case "unknown":
            changed = {"model_type": "flying_circus", "architectures": ["FlyingCircusForCausalLM"]}
            config.write_text(json.dumps(json.loads(config.read_text()) | changed))
        case "tokens":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 256}))
    with pytest.raises(NemoflowError, match=message):
        imports.make({}, {"model": model, "tokenizer": tokenizer}, out, print)


# -- averages ----------------------------------------------------------------------------------------------------------


def state_of(run: Run, at: int, directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "checkpoint").symlink_to(run.checkpoint(at))
    return directory


@pytest.mark.slow
def test_an_average_is_the_mean_of_every_weight(straight, data, tmp_path):
    states = [state_of(straight, at, tmp_path / f"at-{at}") for at in (6, 10, 24)]
    mean = tmp_path / "mean"
    mean.mkdir()
    made = average.make({"of": [{}, {}, {}]}, {"states": states}, mean, print)
    assert made.measures["states"] == 3
    assert sorted(p.name for p in mean.iterdir()) == ["checkpoint"]
    parts = [tensors(exported(state, data / "tokenizer", tmp_path / "hf" / state.name)) for state in states]
    found = tensors(exported(mean, data / "tokenizer", tmp_path / "hf" / "mean"))
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        expected = (parts[0][name] + parts[1][name] + parts[2][name]) / 3
        assert tensor.sub(expected).abs().max() <= 1e-6, name
    assert any(not found[name].equal(parts[2][name]) for name in found)


def as_on_a_gpu(run: Run, at: int, directory: Path) -> Path:
    """A state that was trained here, described as one that was trained with kernels this machine lacks."""
    shutil.copytree(run.checkpoint(at), directory / "checkpoint", symlinks=False)
    path = directory / "checkpoint/run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] |= {"apply_rope_fusion": True, "moe_permute_fusion": True, "gradient_accumulation_fusion": True}
    config["model"] |= {"transformer_impl": "transformer_engine", "tensor_model_parallel_size": 2}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return directory


@pytest.mark.slow
def test_states_trained_on_gpus_are_exported_and_averaged_without_one(straight, data, tmp_path):
    first, second = (as_on_a_gpu(straight, at, tmp_path / f"gpu-{at}") for at in (6, 10))
    plain = tensors(exported(state_of(straight, 6, tmp_path / "at-6"), data / "tokenizer", tmp_path / "plain"))
    found = tensors(exported(first, data / "tokenizer", tmp_path / "found"))
    assert found.keys() == plain.keys()
    assert all(tensor.equal(plain[name]) for name, tensor in found.items())
    mean = tmp_path / "mean"
    mean.mkdir()
    average.make({"of": [{}, {}]}, {"states": [first, second]}, mean, print)
    assert (mean / "checkpoint/run_config.yaml").read_bytes() == (first / "checkpoint/run_config.yaml").read_bytes()


def test_states_of_different_models_are_not_averaged(straight, imported, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoint").symlink_to(imported[0] / "checkpoint")
    states = [state_of(straight, 6, tmp_path / "at-6"), other]
    with pytest.raises(NemoflowError, match="is of another model than"):
        average.make({"of": [{}, {}]}, {"states": states}, tmp_path, print)


def test_a_damaged_state_is_not_averaged(straight, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(straight.checkpoint(10), damaged / "checkpoint")
    largest = max((damaged / "checkpoint").glob("*.distcp"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-50])
    states = [state_of(straight, 6, tmp_path / "at-6"), damaged]
    with pytest.raises(NemoflowError, match="it is cut off"):
        average.make({"of": [{}, {}]}, {"states": states}, tmp_path, print)
