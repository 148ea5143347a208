"""The shipped blends: what the published recipe lists, and the rule its weights follow."""

import re
from fractions import Fraction
from pathlib import Path

import pytest

from nemoflow import recipe as grammar

CONFIG = Path(__file__).resolve().parents[1] / "config"
README = (CONFIG / "blends/README.md").read_text()

BILLIONS = {
    name.strip(): float(count)
    for row in re.findall(r"^\| (.*) \|$", README, re.M)
    for name, count in zip(*[iter(row.split(" | "))] * 2, strict=False)
    if re.fullmatch(r"[\d.]+", count.strip())
}
"""Subset, as the README calls it -> its tokens."""

OF_SUPER = {"Code-Concepts", "Multiple-Choice", "Unconditional-Algorithmic", "Formal-Logic", "Economics"}
UNCOUNTED = {"finepdfs", "long-context-qa"}


def blend(name: str) -> grammar.Blend:
    return grammar.Blend.model_validate(grammar.read_yaml(CONFIG / f"blends/{name}.yaml"))


def called(source: grammar.BlendSource) -> str:
    """A subset as the README calls it."""
    dataset, config = source.files.rpartition("/")[2], source.config
    if dataset.startswith("Nemotron-Pretraining-Specialized-v1"):
        return config.removeprefix("Nemotron-Pretraining-")
    return f"{dataset.removeprefix('Nemotron-').removesuffix('-v1')} {config}"


def test_the_published_subsets_and_sources():
    phase1, phase2, sft, rl = (blend(f"nano3-{name}") for name in ("phase1", "phase2", "sft", "rl"))
    assert [len(b.sources) for b in (phase1, phase2, sft, rl)] == [23, 21, 12, 1]
    assert len({(s.files, s.config) for s in phase1.sources.values()}) == 23
    assert len({(s.files, s.split) for s in sft.sources.values()}) == 12
    assert {p.source for p in rl.placeholders.values()} == set(rl.placeholder_sources)
    assert {called(s) for s in phase1.sources.values()} == set(BILLIONS) - OF_SUPER
    assert phase1.sources.keys() - phase2.sources.keys() == {"cc-v2-medium-quality", "cc-v2.1-medium-quality"}


@pytest.mark.parametrize(("name", "billions"), [("nano3-phase1", 23_500), ("nano3-phase2", 1_500)])
def test_the_weights_follow_the_rule(name, billions):
    sources = blend(name).sources.values()
    total = sum(Fraction(source.weight) for source in sources)
    read = {called(s): float(Fraction(s.weight) / total) * billions / BILLIONS[called(s)] for s in sources}
    assert max(read.values()) < 3.6, "no source more than 3.5 times, but for rounding"
    limited = {called(s) for s in sources if s.reason.endswith("; at the limit")}
    assert all(read[subset] > 3.4 for subset in limited)
    below: dict[str, set[float]] = {}
    for source in sources:
        if called(source) not in limited:
            below.setdefault(source.reason.split("; ")[1], set()).add(read[called(source)])
    for times in below.values():
        assert max(times) < 1.02 * min(times), "subsets of a category are read equally often"
    shares = re.findall(r"^\| ([a-z-]+) \| ([\d.]*)%? \| ?([\d.]*)%? \|", README, re.M)
    published = {category: float(share) for category, *both in shares if (share := both[name == "nano3-phase2"])}
    for source in sources:
        category, share = re.search(r"; ([a-z-]+), ([\d.]+)% in the report", source.reason).groups()
        assert float(share) == published[category]


def test_the_recipe_loads_with_them():
    _, recipe = grammar.load("nano3", [CONFIG / "recipes"])
    read = {key for name in ("phase1", "phase2", "lc", "sft", "rl") for key in blend(f"nano3-{name}").sources}
    assert len(read) == 23 + 1 + 12 + 1
    assert read | blend("nano3-rl").placeholder_sources.keys() <= recipe.sources.keys()
    assert sum(map(Fraction, recipe.stages[0].data.blend.values())) == 1
    assert set(recipe.datasets["rl"].placeholders) == set(blend("nano3-rl").placeholders)


@pytest.mark.parametrize(("name", "billions"), [("super3-phase1", 20_000), ("super3-phase2", 5_000), ("super3-lc", 34)])
def test_super_s_weights_are_the_published_ones_up_to_the_limit(name, billions):
    sources = blend(name).sources
    total = sum(Fraction(source.weight) for source in sources.values())
    assert abs(total - 100) < 0.1
    raised = set()
    for key, source in sources.items():
        published = float(re.search(r"weight ([\d.]+) published", source.reason)[1])
        if key in UNCOUNTED:
            assert float(Fraction(source.weight)) == (20 if key == "long-context-qa" else published)
            continue
        read = float(Fraction(source.weight) / total) * billions / BILLIONS[called(source)]
        if source.reason.endswith("; at the limit"):
            assert 3.4 < read < 3.6
        else:
            assert read < 3.6
            raised.add(float(Fraction(source.weight)) / published)
    assert max(raised) < 1.02 * min(raised), "the others share what is left by their published weights"


@pytest.mark.parametrize(("name", "stages"), [("nano3", 3), ("super3", 3), ("qwen3-8b", 1)])
def test_no_recipe_reads_a_source_more_often_than_it_may(name, stages):
    _, recipe = grammar.load(name, [CONFIG / "recipes"])
    pretraining = [stage for stage in recipe.stages if stage.kind == "pretrain"]
    assert len(pretraining) == stages
    for stage in pretraining:
        for key in stage.data.blend.keys() - UNCOUNTED:
            read = Fraction(stage.data.blend[key]) * stage.until.tokens
            there = Fraction(BILLIONS[called(recipe.sources[key])]) * 10**9
            assert read <= there * Fraction(stage.data.max_epochs)
