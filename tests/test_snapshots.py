"""nano3's configurations, built and overridden as its jobs would, against reviewed ones: every field.

A snapshot holds section.key: value for all of ConfigContainer, of a stage that goes on from another only what differs.
Paths are cut to their last part. After a change that is meant, write them anew and read the difference:

    NEMOFLOW_WRITE_SNAPSHOTS=1 python -m pytest tests/test_snapshots.py
"""

import os
from pathlib import Path

import pytest
import yaml

from nemoflow import recipe as grammar
from nemoflow.stages import Recipe
from nemoflow.store import Store

pytest_plugins = ["megatron_fixtures"]

RECIPES = Path(__file__).resolve().parents[1] / "config/recipes"
SNAPSHOTS = Path(__file__).with_name("snapshots")
LIKE = {"phase1": None, "phase2": "phase1", "lc": "phase1", "sft": None}
"""Stage of nano3 -> the one its snapshot is told by."""
ABSENT = "(absent)"


@pytest.fixture(scope="module")
def built(server, data, tmp_path_factory):
    """Recipe -> its configurations."""

    def build(recipe: str) -> dict[str, dict]:
        scratch = tmp_path_factory.mktemp(recipe)
        job = {"recipe": recipe, "directory": str(RECIPES), "scratch": str(scratch), "tokenizer": f"{data}/tokenizer"}
        return server.call("snapshot_jobs:configurations", job)

    return build


@pytest.fixture(scope="module")
def nano3(built) -> dict[str, dict]:
    return built("nano3")


def difference(one: dict, other: dict) -> dict:
    """What `other` says else than `one`."""
    return {
        k: other.get(k, ABSENT) for k in sorted(one.keys() | other.keys()) if one.get(k, ABSENT) != other.get(k, ABSENT)
    }


@pytest.mark.parametrize("stage", LIKE)
def test_every_field_is_as_reviewed(nano3, stage):
    now = nano3[stage] if LIKE[stage] is None else difference(nano3[LIKE[stage]], nano3[stage])
    file = SNAPSHOTS / f"nano3-{stage}.yaml"
    if os.environ.get("NEMOFLOW_WRITE_SNAPSHOTS"):
        file.write_text(yaml.safe_dump(now, width=120), encoding="utf-8")
    assert difference(yaml.safe_load(file.read_text(encoding="utf-8")), now) == {}


@pytest.mark.parametrize("stage", LIKE)
def test_kernels_are_a_gpu_s(nano3, stage):
    config = nano3[stage]
    assert config["model.transformer_impl"] == "transformer_engine"
    assert config["model.moe_grouped_gemm"] is config["model.moe_permute_fusion"] is True
    assert config["model.moe_token_dispatcher_type"] == "flex"
    assert config["model.use_fused_weighted_squared_relu"] is config["model.gradient_accumulation_fusion"] is True
    assert config["dist.distributed_backend"] == "nccl"
    assert config["ddp.use_distributed_optimizer"] is config["ddp.overlap_grad_reduce"] is True


@pytest.mark.parametrize("name", ["nano3", "super3", "qwen3-8b"])
def test_a_recipe_s_overrides_are_what_megatron_gets(built, nano3, name):
    found = nano3 if name == "nano3" else built(name)
    _, recipe = grammar.load(name, [RECIPES])
    for stage in recipe.stages:
        overrides = {**recipe.overrides["megatron_bridge"], **stage.overrides}
        for key, value in overrides.items():
            if key == "mixed_precision":
                continue  # a name for many values
            got = found[stage.name].get(key, found[stage.name].get(f"{key}._target_"))
            assert got in (value, f"torch.{value}"), (stage.name, key)


def test_nano3_continue_is_nano3_s_sft():
    (_, nano3), (_, other) = (grammar.load(name, [RECIPES]) for name in ("nano3", "nano3-continue"))
    assert other.overrides == nano3.overrides
    base, sft = other.stages
    assert (base.kind, sft.init.stage) == ("import", base.name)
    assert sft.model_copy(update={"init": None}) == nano3.stages[-1].model_copy(update={"init": None})


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_fits_its_gpus(name, tmp_path):
    recipe = Recipe(name, [RECIPES], Store(tmp_path), unlocked=True)
    assert [problem for trained in recipe.trajectories() for problem in recipe.geometry(trained)[1]] == []
