"""Sizes of models from settings alone, against models that were published, or made here."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nemoflow.cli import CHECKOUT
from nemoflow.engines.megatron_bridge import layout, size
from nemoflow.errors import NemoflowError
from nemoflow.session import Session
from nemoflow.stages import Recipe
from nemoflow.store import Store


def settings(name: str, tmp_path: Path) -> dict:
    recipe = Recipe(name, [CHECKOUT / "config/recipes"], Store(tmp_path), unlocked=True)
    first = next(iter(recipe.stages.values()))
    return layout.settings(first.spec.function, first.overrides, recipe.spec.hf_config, "pretrain", None)[0]


def test_published_models_have_their_published_sizes(tmp_path):
    assert size.parameters(settings("nano3", tmp_path)) == pytest.approx(31.6e9, rel=0.001)  # arXiv 2512.20848
    assert size.parameters(settings("qwen3-8b", tmp_path)) == 8_190_735_360  # its safetensors index


def test_the_toy_has_the_size_of_its_export(tmp_path):
    assert size.parameters(settings("nano3-tiny", tmp_path) | {"model.vocab_size": 2048}) == 1_397_256


def test_what_the_settings_do_not_say_is_not_guessed(tmp_path):
    assert size.parameters(settings("nano3-tiny", tmp_path)) is None
    assert size.parameters(settings("super3", tmp_path)) is None  # multi-token prediction, latent experts
    assert size.parameters({}) is None


def test_an_export_says_what_it_holds_and_writes(tmp_path):
    recipe = Recipe("nano3", [CHECKOUT / "config/recipes"], Store(tmp_path), unlocked=True)
    memory, written = recipe.export_needs(recipe.view("hf_export", "phase2")[""].stage)
    assert written == pytest.approx(63e9, rel=0.01)
    assert memory == pytest.approx(253e9, rel=0.01)


def test_a_checkpoint_with_its_optimizer(tmp_path):
    recipe = Recipe("nano3", [CHECKOUT / "config/recipes"], Store(tmp_path), unlocked=True)
    assert recipe.checkpoint_needs(recipe.stages["phase1"]) == pytest.approx(442e9, rel=0.01)


def test_no_training_begins_whose_checkpoints_do_not_fit(tmp_path, monkeypatch):
    session = Session(tmp_path / "artifacts", [CHECKOUT / "config/recipes"])
    recipe = session.recipes["nano3"] = Recipe("nano3", session.directories, session.store, unlocked=True)
    needed = {recipe.stages["phase1"].stage.identity}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**12))
    session.check_room(needed)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8 * 10**11))
    with pytest.raises(NemoflowError, match=r"stages\[phase1\]: 2 checkpoints take about 884.* and 800.* are free"):
        session.check_room(needed)
    session.check_room(set())
