"""The export: against Megatron's own logits, there and back, the files around the weights, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import random_model, small_tokenizer

from nemoflow.errors import NemoflowError
from nemoflow.export import layout, make, special_tokens
from nemoflow.store import file_digest

HERE = Path(__file__).parent
NOBODY = print  # progress goes to the captured output

LINEAGE = [
    {
        "kind": "source",
        "label": "stdlib-topics",
        "identity": "aaaaaaaaaaaa",
        "payload": {"kind": "source", "generator": "stdlib_topics", "args": {"count": 3}},
        "inputs": [],
        "measures": {"documents": 1234, "bytes": 99},
    },
    {
        "kind": "blend",
        "label": "stdlib-topics",
        "identity": "bbbbbbbbbbbb",
        "payload": {"kind": "blend"},
        "inputs": [{"role": "parts", "kind": "shards", "label": "s", "identity": "c" * 12, "sha256": "0"}],
        "measures": {"tokens": {"train": 424242, "valid": 1}, "documents": {"train": 1200}},
    },
    {
        "kind": "pretrain",
        "label": "nemotron-3-nano",
        "identity": "dddddddddddd",
        "at": 150,
        "payload": {"kind": "pretrain"},
        "inputs": [],
        "measures": {
            "iterations": 150,
            "tokens": 614400,
            "loss": 3.25,
            "valid_loss_first": 7.625,
            "valid_loss": 3.5,
        },
    },
    {
        "kind": "rl",
        "label": "grpo",
        "identity": "eeeeeeeeeeee",
        "at": 60,
        "payload": {"kind": "rl"},
        "inputs": [],
        "measures": {"iterations": 60, "loss": 0.001, "reward_first": 0.25, "reward": 0.375},
    },
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return random_model("MEM*EME-")


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    """A state whose checkpoint is the model as transformers saves it."""
    state = tmp_path_factory.mktemp("saved")
    model.save_pretrained(state / "checkpoint")
    tokens = special_tokens(tokenizer)
    assert (tokens["bos_token_id"], tokens["eos_token_id"], tokens["pad_token_id"]) == (1, 2, 3)
    return state


@pytest.fixture(scope="module")
def published(saved, tokenizer, tmp_path_factory) -> Path:
    """The saved model, exported."""
    return exported("trl", saved, tokenizer, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def megatron(published, tmp_path_factory) -> Path:
    """A state whose checkpoint is the model as Megatron-Bridge saves it, and Megatron's logits beside it."""
    out = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, str(HERE / "export_model.py"), str(published), str(out)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "checkpoint").symlink_to("iter_0000000")
    return out


@pytest.fixture(scope="module")
def converted(megatron, tokenizer, tmp_path_factory) -> Path:
    """The Megatron checkpoint, exported."""
    return exported("megatron_bridge", megatron, tokenizer, tmp_path_factory.mktemp("converted"))


def exported(engine: str, state: Path, tokenizer: Path, out: Path, dtype: str = "float32") -> Path:
    make({"engine": engine, "dtype": dtype}, {"state": state, "tokenizer": tokenizer}, out, NOBODY, LINEAGE)
    return out


def tensors(directory: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_the_logits_are_megatrons(megatron, converted):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info
    reference = load_file(megatron / "logits.safetensors")
    with torch.no_grad():
        logits = loaded(reference["ids"]).logits
        for module in loaded.modules():
            if hasattr(module, "time_step_min"):
                module.time_step_min = 1e-3
        bounded = loaded(reference["ids"]).logits
    assert reference["logits"].std() > 0.5  # or a small difference would say little
    assert (logits - reference["logits"]).abs().max() <= 1e-4
    assert (bounded - reference["logits"]).abs().max() > 1e-4  # why config.json lowers time_step_min


def test_there_and_back_is_bit_identical(published, converted):
    before, after = tensors(published), tensors(converted)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    biases = [name for name in after if name.endswith(layout.ROUTER_BIAS)]
    assert len(biases) == 3
    assert all(after[name].abs().min() > 0 for name in biases)
    assert (published / "config.json").read_bytes() == (converted / "config.json").read_bytes()


def test_twice_the_same_bytes(megatron, converted, tokenizer, tmp_path):
    again = exported("megatron_bridge", megatron, tokenizer, tmp_path)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in converted.iterdir()}


def test_what_transformers_saved_is_what_it_loads(model, published):
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert "backbone.embeddings.weight" in tensors(published)


def test_config_is_plain_json_for_older_readers(converted):
    from transformers import AutoConfig

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    config = json.loads((converted / "config.json").read_text(), parse_constant=refuse)
    assert config["hybrid_override_pattern"] == "MEM*EME-"
    assert config["num_hidden_layers"] == 8
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert config["time_step_limit"][1] == torch.finfo(torch.float32).max
    assert "auto_map" not in config
    assert AutoConfig.from_pretrained(converted).layers_block_type == [
        *("mamba", "moe", "mamba", "attention", "moe", "mamba", "moe", "mlp"),
    ]


def test_it_chats_and_stops(converted, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, reader = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    end, turn = reader.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert loaded.generation_config.eos_token_id == [end, turn]
    assert loaded.generation_config.pad_token_id == reader.pad_token_id
    chat = [{"role": "user", "content": "What is 3 + 5?"}]
    inputs = reader.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    assert reader.decode(inputs["input_ids"][0]).endswith("<|im_start|>assistant\n")
    with torch.no_grad():
        loaded.lm_head.weight[turn] = 0  # its logit is 0 now, and beats the others once they are far below
        loaded.lm_head.weight[torch.arange(512) != turn] *= 0
        loaded.lm_head.weight[turn] += loaded(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0, prompt:].tolist() == [turn]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (converted / name).read_bytes() == (tokenizer / name).read_bytes()


def test_measures(saved, tokenizer, model, tmp_path):
    payload = {"engine": "trl", "dtype": "bfloat16"}
    measures, contents = make(payload, {"state": saved, "tokenizer": tokenizer}, tmp_path, NOBODY, LINEAGE)
    file = tmp_path / "model.safetensors"
    assert measures == {"parameters": model.num_parameters(), "bytes": file.stat().st_size, "dtype": "bfloat16"}
    assert {p.name for p in tmp_path.iterdir()} - {entry["name"] for entry in contents} == {"README.md"}
    assert all(file_digest(tmp_path / entry["name"]) == entry["sha256"] for entry in contents)
    assert json.loads((tmp_path / "lineage.json").read_text()) == {"artifacts": LINEAGE}


def test_bfloat16_leaves_the_router_bias_alone(saved, published, tokenizer, tmp_path):
    exact, rounded = tensors(published), tensors(exported("trl", saved, tokenizer, tmp_path, "bfloat16"))
    for name, tensor in rounded.items():
        kept = name.endswith(layout.ROUTER_BIAS)
        assert torch.equal(tensor, exact[name] if kept else exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("more", [{}, {"moe_latent_size": 24}])
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-"])
def test_the_layout_is_that_of_the_model(pattern, more, tmp_path):
    """Against what transformers saves, an account of the names and shapes that is not ours."""
    from nemoflow.export.config import published as spelled

    made = random_model(pattern, **more)
    made.save_pretrained(tmp_path)
    found = {
        name.replace("backbone.embedding.", "backbone.embeddings."): tuple(entry["shape"])
        for name, entry in layout.weights(tmp_path).items()
    }
    assert layout.expected(spelled(made.config, "float32")) == found
    assert layout.parameters(layout.weights(tmp_path)) == made.num_parameters()


def damaged(state: Path, tmp_path: Path) -> Path:
    """A copy of a state, to be damaged."""
    shutil.copytree(state / "checkpoint", tmp_path / "checkpoint")
    return tmp_path


def cut(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def refused(engine: str, state: Path, tokenizer: Path, tmp_path: Path) -> str:
    """The message of an export that is refused; nothing that could be taken for a model is left."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(NemoflowError) as caught:
        exported(engine, state, tokenizer, out)
    assert not (out / "README.md").exists()
    return str(caught.value)


def test_a_truncated_megatron_checkpoint(megatron, tokenizer, tmp_path):
    state = damaged(megatron, tmp_path)
    file = next((state / "checkpoint").glob("*.distcp"))
    cut(file)
    assert f"{file.name}: has {file.stat().st_size} bytes" in refused("megatron_bridge", state, tokenizer, tmp_path)


@pytest.mark.parametrize("name", [".metadata", "run_config.yaml", "__0_0.distcp"])
def test_a_megatron_checkpoint_with_a_file_missing(megatron, tokenizer, tmp_path, name):
    state = damaged(megatron, tmp_path)
    (state / "checkpoint" / name).unlink()
    message = refused("megatron_bridge", state, tokenizer, tmp_path)
    assert name in message
    assert "is missing" in message


def test_a_truncated_transformers_checkpoint(saved, tokenizer, tmp_path):
    state = damaged(saved, tmp_path)
    cut(state / "checkpoint" / "model.safetensors")
    assert "it is cut off" in refused("trl", state, tokenizer, tmp_path)


@pytest.mark.parametrize(("change", "message"), [("drop", "missing"), ("add", "unexpected"), ("cut", "has the shape")])
def test_a_tensor_too_few_too_many_or_too_small(saved, tokenizer, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    state = damaged(saved, tmp_path)
    file = state / "checkpoint" / "model.safetensors"
    found = load_file(file)
    name = "backbone.layers.0.mixer.D"
    if change == "add":
        found["backbone.layers.9.mixer.D"] = found[name].clone()
    elif change == "drop":
        del found[name]
    else:
        found[name] = found[name][:-1].clone()
    save_file(found, file)
    assert message in refused("trl", state, tokenizer, tmp_path)


def test_a_model_that_the_format_cannot_say(megatron, tokenizer, tmp_path):
    state = damaged(megatron, tmp_path)
    file = state / "checkpoint" / "run_config.yaml"
    text = file.read_text()
    assert "moe_router_score_function: sigmoid" in text
    file.write_text(text.replace("moe_router_score_function: sigmoid", "moe_router_score_function: softmax"))
    message = refused("megatron_bridge", state, tokenizer, tmp_path)
    assert message.startswith("model.moe_router_score_function: softmax cannot be said")


def test_a_megatron_checkpoint_with_a_layer_too_many(megatron, tokenizer, tmp_path):
    state = damaged(megatron, tmp_path)
    file = state / "checkpoint" / "run_config.yaml"
    text = file.read_text()
    assert "hybrid_layer_pattern: MEM*EME-\n" in text
    assert "num_layers: 8\n" in text
    file.write_text(text.replace("MEM*EME-\n", "MEM*EME\n").replace("num_layers: 8\n", "num_layers: 7\n"))
    assert "they do not belong together" in refused("megatron_bridge", state, tokenizer, tmp_path)


def test_a_tokenizer_of_another_model(saved, tokenizer, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    model = json.loads((other / "tokenizer.json").read_text())
    model["model"]["vocab"]["unheard of"] = 512
    (other / "tokenizer.json").write_text(json.dumps(model))
    assert "has 513 tokens, the model embeds 512" in refused("trl", saved, other, tmp_path)


def test_a_tokenizer_without_an_end(saved, tokenizer, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    assert "eos_token: names no token" in refused("trl", saved, other, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk(saved, tokenizer, tmp_path):
    small = tmp_path / "out"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(NemoflowError, match=f"no space left where {small} is"):
            exported("trl", saved, tokenizer, small)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_state_without_its_checkpoint(tokenizer, tmp_path):
    assert "is missing" in refused("trl", tmp_path, tokenizer, tmp_path)
