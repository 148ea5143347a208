"""A published model from a hub over HTTP, through the real `snakemake`: imported, fine-tuned, averaged, exported."""

import json
import os
import shutil
from pathlib import Path

import pytest
from graph import Work
from hf_models import random_model, small_tokenizer
from hub_server import Hub

from nemoflow import export, gc
from nemoflow.store import Store

pytestmark = pytest.mark.slow

RECIPE = """\
description: from a published model
tokenizer: {files: "hf://org/base"}
sources:
  sums: {generator: arithmetic_chats, shards: 1, args: {count: 200, max_operand: 5}}
overrides:
  megatron_bridge:
    mixed_precision: null
    model.bf16: false
    model.params_dtype: float32
    model.pipeline_dtype: float32
    optimizer.bf16: false
    optimizer.params_dtype: float32
    model.expert_model_parallel_size: 1
    model.moe_token_dispatcher_type: alltoall
    model.moe_flex_dispatcher_backend: null
    model.calculate_per_token_loss: true
    train.global_batch_size: 2
    train.micro_batch_size: 1
    optimizer.lr: 0.001
    scheduler.lr_decay_iters: 6
    scheduler.lr_warmup_iters: 1
    validation.eval_interval: 50
    validation.eval_iters: 1
stages:
  - {name: base, kind: import, model: "hf://org/base"}
  - name: sft
    kind: sft
    function: megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_sft_config
    init: {from: base, carry: weights}
    data: {chats: {sums: 1}, pack_size: 64}
    until: 6
    milestones: [4]
  - {name: mean, kind: average, of: {stage: sft, at: [4, 6]}}
export: {dtype: float32}
"""


@pytest.fixture
def published(tmp_path) -> Path:
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    random_model("ME*M").save_pretrained(tmp_path / "state/checkpoint")
    out = tmp_path / "published"
    out.mkdir()
    state = {"state": tmp_path / "state", "tokenizer": tokenizer}
    export.make({"engine": "trl", "dtype": "float32"}, state, out, print, [])
    return out


def tensors(directory: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_from_a_published_model_to_an_export(published, tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("HF_")]:
        monkeypatch.delenv(key)
    work = Work(tmp_path / "work")
    (work.path / "config/recipes").mkdir(parents=True)
    work.recipe().write_text(RECIPE)
    with Hub() as hub:
        hub.models["org/base"].commit({p.name: p.read_bytes() for p in published.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        assert "not locked yet: tokenizer, models.base; run" in work.nemoflow("check", "demo", check=True).stdout
        work.nemoflow("lock", "demo", check=True)
        work.run("import/demo")
    # From here on without a hub
    work.run("hf_export/demo@base", "hf_export/demo", "hf_export/demo@mean")
    before = tensors(published)
    back, tuned = tensors(work.path / "hf_export/demo@base"), tensors(work.path / "hf_export/demo")
    assert all(tensor.equal(back[name]) for name, tensor in before.items())
    assert {n: t.shape for n, t in tuned.items()} == {n: t.shape for n, t in before.items()}
    assert not tuned["lm_head.weight"].equal(before["lm_head.weight"])
    assert tensors(work.path / "hf_export/demo@mean").keys() == before.keys()
    record = json.loads((work.path / "import/demo/artifact.json").read_text())
    assert record["label"] == "base"
    assert [i["role"] for i in record["inputs"]] == ["model", "tokenizer"]
    source = record["inputs"][0]["identity"]
    (files,) = (work.path / "artifacts/source").glob(f"base-{source}")
    assert (files / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert work.planned("hf_export/demo") == {}
    without_the_optimizer(work, monkeypatch)


def without_the_optimizer(work: Work, monkeypatch) -> None:
    """The SFT's last state weighs a third, and is exported to the same bytes; it cannot be trained on."""
    mean = tensors(work.path / "hf_export/demo@mean")
    (listed,) = json.loads(work.nemoflow("gc", "--optimizer", "--json", check=True).stdout)["terminal"]
    assert listed["title"] == "sft of demo to 6"
    with monkeypatch.context() as here:
        here.chdir(work.path)
        here.setattr(gc.slurm, "mine", list)  # this machine may have squeue, and no cluster
        gc.run_optimizer(Store("artifacts"), [Path("config/recipes")], really=True, as_json=False)
    work.run("sft/demo")
    state = (work.path / "sft/demo").resolve()
    left = sum(p.stat().st_size for p in (state / "checkpoint/").iterdir())
    assert left < 0.4 * listed["bytes"]
    assert json.loads(work.nemoflow("gc", "--optimizer", "--json", check=True).stdout)["terminal"] == []
    checked = work.nemoflow("verify", "--deep", "sft/demo")
    assert checked.returncode == 0, checked.stderr
    before = tensors(work.path / "hf_export/demo")
    for kind in ("average", "hf_export"):
        shutil.rmtree(work.path / "artifacts" / kind)
    work.run("hf_export/demo", "hf_export/demo@mean")
    assert all(tensor.equal(before[name]) for name, tensor in tensors(work.path / "hf_export/demo").items())
    assert all(tensor.equal(mean[name]) for name, tensor in tensors(work.path / "hf_export/demo@mean").items())
    text = work.recipe().read_text()
    work.recipe().write_text(text.replace("lr_decay_iters: 6", "lr_decay_iters: 8").replace("until: 6", "until: 5"))
    work.run("sft/demo")  # another schedule is another training
    work.recipe().write_text(text.replace("until: 6", "until: 5"))
    assert "the optimizer of state 6 was deleted by `nemoflow gc --optimizer`" in work.refused("-n", "sft/demo")
    weights = next((state / "checkpoint").resolve().glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    work.recipe().write_text(text)
    checked = work.nemoflow("verify", "--deep", "sft/demo")
    assert checked.returncode == 1
    assert f"{weights.name}: has other bytes than it was sealed with" in checked.stderr
