"""Exports of what NeMo-RL saves, by the same conversions as of the other engines."""

import json
from pathlib import Path

import pytest
from hf_models import random_model, small_tokenizer
from safetensors.torch import load_file

from nemoflow import export
from nemoflow.errors import NemoflowError
from nemoflow.export.convert import policy

pytest_plugins = ["megatron_fixtures"]


def exported(engine: str, checkpoint: Path, tokenizer: Path, home: Path) -> dict:
    """The tensors of an export."""
    state, out = home / "state", home / "out"
    state.mkdir(parents=True)
    out.mkdir()
    (state / "checkpoint").symlink_to(checkpoint)
    export.make({"engine": engine, "dtype": "float32"}, {"state": state, "tokenizer": tokenizer}, out, print, [])
    return load_file(out / "model.safetensors")


@pytest.mark.slow
def test_a_policy_on_megatron_is_exported_as_megatron_bridge_s_own(straight, data, tmp_path):
    """step_6/policy/weights/iter_0000000 is a checkpoint of Megatron-Bridge, whatever the step."""
    weights = tmp_path / "step_6/policy/weights"
    weights.mkdir(parents=True)
    (weights / "iter_0000000").symlink_to(straight.checkpoint(6))
    (weights / "latest_checkpointed_iteration.txt").write_text("0")
    (tmp_path / "step_6/training_info.json").write_text(json.dumps({"total_steps": 6}))
    own = exported("megatron_bridge", straight.checkpoint(6), data / "tokenizer", tmp_path / "own")
    found = exported("nemo_rl", tmp_path / "step_6", data / "tokenizer", tmp_path / "found")
    assert found.keys() == own.keys()
    assert all(tensor.equal(own[name]) for name, tensor in found.items())


def test_a_policy_on_dtensor_is_exported_from_its_consolidated_model(tmp_path):
    """step_6/policy/weights/model/consolidated is what transformers saved, with the shards it was made of beside it."""
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    model = tmp_path / "step_6/policy/weights/model"
    random_model("ME*M").save_pretrained(model / "consolidated")
    (model / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"sharded")
    found = exported("nemo_rl", tmp_path / "step_6", tokenizer, tmp_path / "found")
    own = exported("trl", model / "consolidated", tokenizer, tmp_path / "own")
    assert found.keys() == own.keys()
    assert all(tensor.equal(own[name]) for name, tensor in found.items())


def test_what_cannot_be_exported_is_one_error(tmp_path):
    weights = tmp_path / "step_6/policy/weights"
    weights.mkdir(parents=True)
    (weights / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(
        NemoflowError, match=r"step_6: holds neither policy/weights/iter_0000000 nor a whole checkpoint"
    ):
        policy(tmp_path / "step_6")
