"""Adapters: they train beside a frozen base, resume to the digit, are saved without it, and merge exactly."""

import json
import shutil
import warnings

import pytest
import torch
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, RECIPES, SFT, pretrain, sft

from nemoflow.errors import NemoflowError
from nemoflow.export import adapter, make, special_tokens

pytest_plugins = ["megatron_fixtures"]

# A layer of each kind, and experts enough that the mean of equal numbers is rounded.
WIDE = MODEL | {"model.hybrid_layer_pattern": "ME*-", "model.num_moe_experts": 8}
SETTINGS = {
    "lora": {},
    # peft refuses an adapter of a Mamba layer's out_proj, so here is one that it takes as it is
    "dora": {
        "peft.target_modules": [
            "linear_qkv",
            "linear_proj",
            "in_proj",
            "*.mlp.linear_fc1",
            "*.mlp.linear_fc2",
            "*.shared_experts.linear_fc1",
        ]
    },
}


def adapted(server, data, directory, beneath, scheme, overrides=None, **request):
    settings = {"optimizer.lr": 0.02, "peft.dim": 4, "peft.alpha": 8, "model.moe_router_bias_update_rate": 0.5}
    settings = PRECISION | SFT | settings | SETTINGS[scheme] | (overrides or {})
    function = f"{RECIPES}.nemotron_3_nano_peft_config"
    request = {"function": function, "peft": scheme, "overrides": settings, "wanted": [2]} | request
    return sft(server, data, directory, beneath, **request)


@pytest.fixture(scope="module")
def beneath(server, data, tmp_path_factory):
    """The checkpoint of a pretrained model."""
    directory = tmp_path_factory.mktemp("beneath")
    return pretrain(server, data, directory, overrides=WIDE | PRECISION | PRETRAIN, stop=4).train().checkpoint(4)


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, server, data, beneath, tmp_path_factory):
    """Six iterations of adapters, without an interruption."""
    return adapted(server, data, tmp_path_factory.mktemp(request.param), beneath, request.param).train()


def weights(checkpoint):
    """Name -> (shape, bytes) of the tensors in a checkpoint of one process, but for the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    held = {}
    _load_state_dict(held, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)

    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for name, each in value.items() for k, v in flat(each, f"{prefix}{name}.").items()}
        return {prefix[:-1]: value}

    return {
        name: (tuple(value.shape), value.numpy().tobytes())
        for name, value in flat(held).items()
        if torch.is_tensor(value) and "optimizer." not in name
    }


def test_a_resume_goes_on_to_the_digit(server, data, beneath, trained, tmp_path):
    """Also with a bias of the router that would change at every iteration, did adapters not freeze it."""
    run = adapted(server, data, tmp_path, beneath, trained.request["peft"], stop=2).train()
    run.train(stop=6)
    assert run.digits() == trained.digits()
    assert {n: loss for n, loss in run.validation().items() if n != 2} == trained.validation()
    assert weights(run.checkpoint(6)) == weights(trained.checkpoint(6))


def test_training_learns(trained):
    assert trained.validation()[6] < trained.validation()[0]


def test_checkpoints_hold_adapters_alone(trained, beneath):
    found = weights(trained.checkpoint(6))
    assert found
    assert all(".adapter." in name for name in found)
    assert all(any(data) for _, data in found.values())  # B begins as zero, so each has been trained
    assert size(trained.checkpoint(6)) < size(beneath) / 2


def size(checkpoint):
    return sum(p.stat().st_size for p in checkpoint.glob("*.distcp"))


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_experts_share_adapters_as_on_a_gpu(trained):
    """Stored once for each expert, so that expert parallelism may change."""
    found = {name: t for name, t in weights(trained.checkpoint(6)).items() if ".experts.experts." in name}
    assert {name.partition(".experts.experts.")[2] for name in found} == {
        f"linear_fc{n}.adapter.linear_{way}.weight" for n in (1, 2) for way in ("in", "out")
    }
    for shape, data in found.values():
        assert shape[0] == 8
        assert data == data[: len(data) // 8] * 8


def converted(server, data, out, checkpoint, base=None):
    tokens = special_tokens(data / "tokenizer")
    job = {
        "checkpoint": str(checkpoint),
        "base": base and str(base),
        "tokens": {name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "out": str(out),
    }
    return server.call("peft_jobs:export", job)


@pytest.fixture(scope="module")
def plain(server, data, beneath, tmp_path_factory):
    """The model beneath the adapters, exported."""
    out = tmp_path_factory.mktemp("plain")
    assert converted(server, data, out, beneath) == {}
    return out


def check_logits(plain, out):
    """The merged model in `out`, and `plain` with the adapter there by the `peft` library, compute `logits` there.

    These are Megatron's, with the adapters beside the weights. Returns the adapter's tensors.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    reference = load_file(out / "logits.safetensors")

    def error(model):
        with torch.no_grad():
            return (model.eval()(reference["ids"]).logits - reference["logits"]).abs().max()

    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert error(merged) <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert error(model) > 0.05  # or being close would say little
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of adapters that are missing, and goes on
        model = PeftModel.from_pretrained(model, out / adapter.DIRECTORY)
    assert error(model) <= 1e-4
    return load_file(out / adapter.DIRECTORY / "adapter_model.safetensors")


def exported(server, data, beneath, run, out):
    """The adapters of a run, exported, with Megatron's logits beside them."""
    job = {"checkpoint": str(run.checkpoint(6)), "base": str(beneath), "out": str(out / "logits.safetensors")}
    assert server.call("peft_jobs:logits", job) == 0
    assert converted(server, data, out, run.checkpoint(6), beneath) == {}
    return out


@pytest.fixture
def any_layer(monkeypatch):
    """The `peft` library takes adapters of a Mamba layer's out_proj, which in transformers' torch path is a layer."""
    from peft.tuners import tuners_utils

    monkeypatch.setattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
@pytest.mark.usefixtures("any_layer")
def test_lora_merged_and_beside_computes_what_megatron_does(server, data, beneath, plain, trained, tmp_path):
    found = check_logits(plain, exported(server, data, beneath, trained, tmp_path))
    assert not any("magnitude" in name for name in found)
    assert "refuses adapters of a Mamba layer's `out_proj`" in (tmp_path / adapter.DIRECTORY / "README.md").read_text()


@pytest.mark.parametrize("trained", ["dora"], indirect=True)
def test_dora_merged_and_beside_computes_what_megatron_does(server, data, beneath, plain, trained, tmp_path):
    found = check_logits(plain, exported(server, data, beneath, trained, tmp_path))
    assert any("magnitude" in name for name in found)
    assert "PeftModel.from_pretrained" in (tmp_path / adapter.DIRECTORY / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_a_dense_model_whose_layers_megatron_fuses(server, tmp_path, scheme):
    """q, k and v, gate and up: of Qwen3, whose export is the bridge's own here."""
    (tmp_path / "out").mkdir()
    job = {"base": str(tmp_path / "base"), "out": str(tmp_path / "out"), "scheme": scheme}
    assert server.call("peft_jobs:dense", job) == 0
    found = check_logits(tmp_path / "base", tmp_path / "out")
    assert len(found) == 2 * 7 * {"lora": 2, "dora": 3}[scheme]


@pytest.mark.slow
@pytest.mark.usefixtures("any_layer")
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("lora", {"peft.share_expert_adapters": False, "peft.normalize_moe_lora": True}),
        ("dora", {"peft.target_modules": ["in_proj", "out_proj", "*.shared_experts.linear_fc2"]}),
    ],
)
def test_other_settings_are_exported_as_well(server, data, beneath, plain, tmp_path, scheme, settings):
    run = adapted(server, data, tmp_path / "run", beneath, scheme, settings).train()
    if scheme == "lora":  # each expert has its own, of half the rank
        name = "decoder.layers.1.mlp.experts.experts.linear_fc1.adapter.linear_in.weight"
        shape, values = weights(run.checkpoint(6))[name]
        assert shape == (8, 2, 32)
        assert values != values[: len(values) // 8] * 8
    (tmp_path / "out").mkdir()
    check_logits(plain, exported(server, data, beneath, run, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["dora"], indirect=True)
def test_an_artifact_with_an_adapter(data, beneath, trained, tmp_path):
    from safetensors.torch import load_file

    inputs = {"tokenizer": data / "tokenizer"}
    for role, checkpoint in (("state", trained.checkpoint(6)), ("base", beneath)):
        inputs[role] = tmp_path / role
        inputs[role].mkdir()
        (inputs[role] / "checkpoint").symlink_to(checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    make({"engine": "megatron_bridge", "dtype": "bfloat16"}, inputs, out, lambda _: None, [])
    found = load_file(out / adapter.DIRECTORY / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert sorted(p.name for p in (out / adapter.DIRECTORY).iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    ]


def test_an_export_of_adapters_without_their_base(trained, beneath):
    with pytest.raises(NemoflowError, match="holds adapters alone"):
        adapter.check(trained.checkpoint(6), None)
    with pytest.raises(NemoflowError, match="holds a whole model"):
        adapter.check(beneath, beneath)


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_adapters_of_another_model(server, data, beneath, trained, tmp_path):
    other = shutil.copytree(trained.checkpoint(6), tmp_path / "iter_0000006")
    config = (other / "run_config.yaml").read_text()
    assert config.count("  - out_proj\n") == 1
    (other / "run_config.yaml").write_text(config.replace("  - out_proj\n", ""))
    (tmp_path / "out").mkdir()
    said = converted(server, data, tmp_path / "out", other, beneath)["error"]
    assert "adapters of another model: decoder.layers.0.mixer.out_proj.adapter" in said


PEFT = f"{RECIPES}.nemotron_3_nano_peft_config"
WHOLE = f"{RECIPES}.nemotron_3_nano_sft_config"


@pytest.mark.parametrize(
    ("function", "scheme", "kind", "targets"),
    [
        (PEFT, "lora", "LoRA", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"]),
        (WHOLE, "lora", "LoRA", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"]),
        (
            PEFT,
            "dora",
            "DoRA",
            [
                *("linear_qkv", "linear_proj"),
                *("*.mlp.linear_fc1", "*.shared_experts.linear_fc1"),
                *("*.mlp.linear_fc2", "*.shared_experts.linear_fc2"),
                *("in_proj", "out_proj"),
            ],
        ),
    ],
)
def test_a_scheme_becomes_settings(server, data, beneath, tmp_path, function, scheme, kind, targets):
    run = sft(server, data, tmp_path, beneath, function=function, peft=scheme)
    found = server.call("peft_jobs:configure", run.request)
    alpha = {"lora": 32, "dora": 64}[scheme]
    assert found == {"kind": kind, "target_modules": targets, "dim": 32, "alpha": alpha, "dropout": 0.0}


@pytest.mark.parametrize(
    ("request_", "overrides", "message"),
    [
        ({"function": PEFT, "peft": None}, {}, "trains adapters; write the stage's `peft: lora`"),
        ({"function": WHOLE, "peft": None}, {"peft.dim": 8}, "overrides.peft.dim: the stage trains no adapters"),
        ({"function": WHOLE, "peft": "lora"}, {"peft": None}, "overrides.peft: the stage says `peft: lora`"),
        ({"function": PEFT, "peft": "lora"}, {"peft.dim": 0}, "overrides.peft.dim: 0: must be 1 or more"),
        ({"function": PEFT, "peft": "lora"}, {"peft.target_modules": ["router"]}, "target_modules: router"),
        ({"function": PEFT, "peft": "lora"}, {"peft.dim": 3, "peft.normalize_moe_lora": True}, "multiple of model.moe"),
        ({"function": PEFT, "peft": "dora"}, {"peft.dropout_position": "post"}, "peft.dropout_position: DoRA"),
        ({"function": PEFT, "peft": "dora"}, {"peft.target_modules": ["linear_fc1"]}, "names the routed experts too"),
        ({"function": PEFT, "peft": "dora"}, {"peft.target_modules": ["*.linear_fc2"]}, "names the routed experts too"),
        ({"function": PEFT, "peft": "lora", "carry": "all"}, {}, "init.carry: all: adapters are new"),
    ],
)
def test_what_cannot_be(server, data, beneath, tmp_path, request_, overrides, message):
    run = sft(server, data, tmp_path, beneath, overrides=PRECISION | SFT | overrides)
    request = run.request | {name: value for name, value in request_.items() if name != "carry"}
    request["init"] = request["init"] | {"carry": request_.get("carry", "weights")}
    assert message in server.call("peft_jobs:configure", request)["error"]


def test_a_target_that_names_no_layer(server, data, beneath, tmp_path):
    run = adapted(server, data, tmp_path, beneath, "lora", {"peft.target_modules": ["linear_qkv", "linear_qvk"]})
    assert "overrides.peft.target_modules: linear_qvk: names no layer of this model" in run.fails()


def test_a_resume_without_the_base(beneath, trained, tmp_path):
    moved = shutil.copytree(beneath, tmp_path / "iter_0000004")
    (moved / "metadata.json").unlink()
    init = trained.request["init"] | {"checkpoint": str(moved)}
    said = trained.fails(init=init, stop=7, horizon=7)
    assert f"{moved}/metadata.json: missing" in said
    assert json.loads((trained.directory / "request.json").read_text())["init"] == init


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_dealt_out_to_two_processes(server, data, beneath, tmp_path, scheme):
    """The same training, from the same numbers, however model and experts are dealt out; and it resumes."""

    def world(name, processes, overrides, *stops):
        run = adapted(server, data, tmp_path / name, beneath, scheme, overrides | {"peft.target_modules": targets})
        for stop in stops:
            path = run.directory / "request.json"
            path.write_text(json.dumps(run.request | {"stop": stop}))
            assert server.call("peft_jobs:train", {"request": str(path), "processes": processes}) == 0
        return run

    experts = ["linear_fc1", "linear_fc2"] if scheme == "lora" else ["*.mlp.linear_fc1", "*.mlp.linear_fc2"]
    targets = ["linear_qkv", "linear_proj", "in_proj", "out_proj", *experts]
    one = world("one", 1, {}, 6).digits()
    for name, overrides in {
        "experts": {"model.expert_model_parallel_size": 2},
        "tensors": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    }.items():
        two = world(name, 2, overrides, 6).digits()
        assert [d[0] for d in two.values()] == pytest.approx([d[0] for d in one.values()], abs=1e-4), name
        assert [d[2] for d in two.values()] == pytest.approx([d[2] for d in one.values()], rel=1e-3), name
        assert world(f"{name} in two", 2, overrides, 2, 6).digits() == two, name
