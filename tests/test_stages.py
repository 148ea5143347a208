"""From a recipe to identities, trajectories, states and names."""

import json
from pathlib import Path

import pytest
import yaml
from graph import DEMO, write_demo

from nemoflow import kinds, locks
from nemoflow.canonical import identity
from nemoflow.engines import megatron_bridge
from nemoflow.errors import NemoflowError
from nemoflow.stages import Recipe
from nemoflow.store import Store

RECIPES = [Path("config/recipes")]
PYTHON = "3.12.1"

GOLDEN = {
    "tokenizer": "6f8d85322acb",
    "phase1": "757b7de45a2c",
    "data of phase1": "ca5353c8ae96",
    "export of phase1": "9f58a5662bbc",
    "phase2": "91a851633fcb",
    "data of phase2": "66d6faa7cd98",
    "export of phase2": "9f7a8bc9b3e8",
    "sft": "b1a5192f531e",
    "data of sft": "84590a0f7b6c",
    "export of sft": "713e9f84baa3",
    "rl": "4cb59612f818",
    "data of rl": "4a89714f41d6",
    "export of rl": "f5a82374097d",
}
"""Identities of the demo recipe. They change with a meaning only, and then on purpose (`algorithm`, a new key)."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current directory holds the locked demo recipe."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)


def resolve(text: str = DEMO, python: str = PYTHON) -> Recipe:
    Path("config/recipes/demo.yaml").write_text(text)
    return Recipe("demo", RECIPES, Store("artifacts"), python)


def changed(*pairs: tuple[str, str]) -> str:
    text = DEMO
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def with_stage(name: str, **settings) -> str:
    """The demo with settings of one stage replaced; None removes one."""
    data = yaml.safe_load(DEMO)
    stage = next(s for s in data["stages"] if s["name"] == name)
    stage.update(settings)
    for key in [k for k, v in stage.items() if v is None]:
        del stage[key]
    return yaml.safe_dump(data)


def identities(recipe: Recipe) -> dict[str, str]:
    found = {"tokenizer": recipe.tokenizer}
    for name, trained in recipe.stages.items():
        found[name] = trained.stage.identity
        found[f"data of {name}"] = trained.data
        found[f"export of {name}"] = recipe.view("hf_export", name)[""].stage.identity
    return found


def refused(text: str) -> str:
    with pytest.raises(NemoflowError) as caught:
        resolve(text)
    return str(caught.value)


def test_padding_must_suit_context_parallelism():
    message = refused(with_stage("sft", overrides={"sleep.padding": 4}))
    assert "stages[sft].data.pad_multiple: 1: context parallelism needs a multiple of 4" in message
    data = {"chats": {"sums": 1}, "pack_size": 128, "pad_multiple": 8}
    assert resolve(with_stage("sft", overrides={"sleep.padding": 4}, data=data)).stages["sft"]
    degrees = {"model.context_parallel_size": 2, "model.tensor_model_parallel_size": 3}
    assert megatron_bridge.padding(degrees) == 4
    assert megatron_bridge.padding({**degrees, "model.sequence_parallel": True}) == 12
    assert megatron_bridge.padding({"model.tensor_model_parallel_size": 3, "model.sequence_parallel": True}) == 1


# -- identities --------------------------------------------------------------------------------------------------------


def test_identities_of_the_demo_never_change():
    recipe = resolve()
    assert identities(recipe) == GOLDEN
    for key in recipe.store._loaded:
        assert identity(recipe.store.load(key).payload) == key


@pytest.mark.parametrize(
    "pairs",
    [
        [("0.001", "1.0e-3")],
        [("1/2", "0.5")],
        [("cap: 1/5", "cap: 2/10")],
        [("blend: {words: 1}", "blend: {words: 1}, max_epochs: 9")],
        [("vocab_size: 280", "vocab_size: 280, engine: tokenizers")],
        [("words: 1/2, lines: 1/2", "lines: 1/2, words: 1/2")],
        [("save_interval: 5", "save_interval: 7")],
        [("milestones: [10]", "milestones: [3, 4]")],
        [("name: phase1", "name: first"), ("from: phase1", "from: first")],
        [("name: phase1", "name: phase1\n    version: 1")],
        [("words", "texts")],
        [("vocab_size: 280", "vocab_size: 280, chat_template: chatml")],
        [("pack_size: 128", "pack_size: 128, valid: 1/20, too_long: drop, seed: 0")],
        [("format: jsonl}", "format: jsonl, field: text, max_broken: 1/1000, control_strings: plain}")],
        [("count: 20}", "count: 20}, seed: 0")],
        [("description: a chain of sleeps", "export: {dtype: bfloat16}")],
        [("optimizer.lr: 0.001", "sleep.seconds: 3, optimizer.lr: 0.001")],
    ],
    ids=lambda pairs: pairs[0][1].replace("\n", " "),
)
def test_what_defines_no_result_changes_no_identity(pairs):
    before = list(identities(resolve()).values())
    if pairs[0][0] == "words":  # a source has its name in the lock too
        lock = Path("config/recipes/demo.lock.json")
        lock.write_text(lock.read_text().replace("sources.words", "sources.texts"))
    assert list(identities(resolve(changed(*pairs))).values()) == before


PHASE1, PHASE2, SFT, RL = ({name, f"export of {name}"} for name in ("phase1", "phase2", "sft", "rl"))
AFTER_PHASE1 = PHASE1 | PHASE2 | SFT | RL


@pytest.mark.parametrize(
    ("pairs", "new"),
    [
        ([("optimizer.lr: 0.001", "optimizer.lr: 0.002")], AFTER_PHASE1),
        ([("vocab_size: 280", "vocab_size: 281")], "all but rl's data"),
        ([("horizon: 16", "horizon: 17")], RL),
        ([("algorithm: grpo", "algorithm: grpo\n    version: 2")], RL),
        ([("prompts: [problems]", "prompts: [problems], valid: 1/10")], RL | {"data of rl"}),
        ([("until: 12", "until: 13")], RL | {"export of sft"}),
        ([("until: 20", "until: 21")], PHASE2 | SFT | RL | {"data of phase2", "export of phase1"}),
        ([("from: phase2, carry: weights", "from: phase2, carry: weights+optimizer")], SFT | RL),
        ([("from: phase2,", "from: phase2, at: 35,")], SFT | RL),
        ([("toy_sft_config", "toy_peft_config")], SFT | RL),
        ([("words: 1/2, lines: 1/2", "words: 1/3, lines: 2/3")], PHASE2 | SFT | RL | {"data of phase2"}),
        ([("sums: 1}, pack", "sums: 2}, pack")], SFT | RL | {"data of sft"}),
        ([("count: 20", "count: 21")], RL | {"data of rl"}),
        (
            [("description: a chain of sleeps", "export: {dtype: float32}")],
            {f"export of {name}" for name in ("phase1", "phase2", "sft", "rl")},
        ),
    ],
    ids=lambda value: value[0][1].replace("\n", " ") if isinstance(value, list) else "",
)
def test_what_defines_a_result_changes_it_and_what_follows_only(pairs, new):
    before, after = identities(resolve()), identities(resolve(changed(*pairs)))
    expected = before.keys() - {"data of rl"} if isinstance(new, str) else new
    assert {name for name in before if before[name] != after[name]} == expected


def test_another_interpreter_makes_other_generated_sources_and_the_same_files():
    one, other = resolve(), resolve(python="3.12.2")
    assert one.raw["sums"].identity != other.raw["sums"].identity
    assert one.raw["words"].identity == other.raw["words"].identity


def test_bytes_of_raw_files_are_identity_and_their_names_are_not():
    before = identities(resolve())
    Path("raw/0.jsonl").rename("raw/00.jsonl")
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)
    assert identities(resolve()) == before
    with Path("raw/1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)
    assert identities(resolve())["phase1"] != before["phase1"]


MEGATRON = """\
tokenizer: {train_on: [topics], vocab_size: 512}
sources:
  topics: {generator: stdlib_topics, shards: 2}
  problems: {generator: arithmetic_rl, shards: 1}
overrides:
  megatron_bridge:
    {optimizer.lr: 0.001, train.global_batch_size: 4, model.seq_length: 256, scheduler.lr_decay_iters: 50}
stages:
  - name: base
    kind: pretrain
    function: megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_pretrain_config
    data: {blend: {topics: 1}}
    until: {tokens: 10_000}
  - name: rl
    kind: rl
    algorithm: grpo
    init: {from: base, carry: weights}
    data: {prompts: [problems]}
    until: 4
    horizon: 4
"""


def megatron(**overrides) -> Recipe:
    data = yaml.safe_load(MEGATRON)
    data["overrides"]["megatron_bridge"].update(overrides)
    return resolve(yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.tensor_model_parallel_size", 2),
        ("model.pipeline_model_parallel_size", 2),
        ("model.context_parallel_size", 2),
        ("model.expert_model_parallel_size", 2),
        ("model.sequence_parallel", True),
        ("model.recompute_granularity", "full"),
        ("model.attention_backend", "flash"),
        ("model.cuda_graph_impl", "local"),
        ("train.micro_batch_size", 2),
        ("checkpoint.async_save", True),
        ("comm_overlap.tp_comm_overlap", True),
        ("ddp.overlap_grad_reduce", True),
        ("logger.log_interval", 5),
        ("profiling.use_pytorch_profiler", True),
    ],
)
def test_where_and_how_fast_megatron_trains_is_no_identity(key, value):
    before, after = megatron(), megatron(**{key: value})
    assert identities(after) == identities(before)
    assert after.stages["base"].overrides[key] == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", 0.002),
        ("optimizer.weight_decay", 0.01),
        ("scheduler.lr_warmup_iters", 3),
        ("train.global_batch_size", 8),
        ("rng.seed", 7),
        ("model.seq_length", 128),
        ("model.hidden_size", 64),
        ("model.init_method_std", 0.01),
        ("model.moe_router_topk", 4),
        ("model.moe_aux_loss_coeff", 0.1),
        ("model.calculate_per_token_loss", True),
        ("mixed_precision", "bf16_mixed"),
        ("dataset.reset_position_ids", True),
        ("peft.dim", 8),
    ],
)
def test_what_megatron_trains_is_identity(key, value):
    before, after = identities(megatron()), identities(megatron(**{key: value}))
    expected = {"base", "export of base", "rl", "export of rl"}
    if key in ("train.global_batch_size", "model.seq_length"):
        expected.add("data of base")  # the order in which the blend is read
    assert {name for name in before if before[name] != after[name]} == expected


def test_tokens_become_iterations_rounded_up():
    assert megatron().stages["base"].until == 10  # 10,000 / (4 x 256) = 9.8
    assert megatron(**{"train.global_batch_size": 5}).stages["base"].until == 8  # 7.8
    data = yaml.safe_load(MEGATRON)
    del data["overrides"]["megatron_bridge"]["train.global_batch_size"]
    message = refused(yaml.safe_dump(data))
    assert "stages[base].until.tokens: needs train.global_batch_size" in message


def test_an_engine_that_starts_from_an_export_gets_one():
    recipe = megatron()
    rl = recipe.stages["rl"].stage.payload
    export = recipe.view("hf_export", "base")[""].stage
    assert rl["init"] == {"export": export.identity, "carry": "weights"}
    assert export.payload["of"] == {"trajectory": recipe.stages["base"].stage.identity, "at": 10}
    message = refused(MEGATRON.replace("carry: weights", "carry: all"))
    assert "stages[rl].init.carry: 'all'" in message
    assert "weights" in message.partition("'all'")[2]


# -- trajectories ------------------------------------------------------------------------------------------------------


def test_an_engine_of_one_process_has_no_other_resources():
    data = yaml.safe_load(MEGATRON)
    data["stages"][1]["resources"] = {"gpus_per_node": 2}
    recipe = resolve(yaml.safe_dump(data))
    assert recipe.geometry(recipe.stages["rl"])[1] == ["resources: engine trl trains in one process; leave them out"]


def test_counters_go_on_under_carry_all_and_start_anew_otherwise():
    stages = resolve().stages
    assert {n: (t.start, t.until, t.horizon) for n, t in stages.items()} == {
        "phase1": (0, 20, 60),
        "phase2": (20, 40, 60),
        "sft": (0, 12, 30),
        "rl": (0, 8, 16),
    }
    assert stages["phase2"].stage.payload["init"] == {
        "from": stages["phase1"].stage.identity,
        "at": 20,
        "carry": "all",
    }


def test_a_state_that_is_started_from_is_wanted():
    recipe = resolve(with_stage("phase2", init={"from": "phase1", "at": 15, "carry": "all"}))
    assert recipe.stages["phase1"].wanted == {10, 15, 20}
    assert recipe.stages["phase2"].start == 15


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("sft", {"until": 31}, r"stages[sft].until: 31 lies past the schedule's horizon 30"),
        ("sft", {"milestones": [31]}, r"stages[sft].milestones: 31 lies past"),
        ("sft", {"horizon": None}, r"stages[sft].horizon: is missing"),
        ("phase2", {"until": 20}, r"stages[phase2].until: 20: the stage starts at 20"),
        ("phase2", {"milestones": [15]}, r"stages[phase2].milestones: 15: the stage starts at 20"),
        ("sft", {"init": {"from": "phase2", "at": 61, "carry": "weights"}}, "phase2 has states from 21 to 60"),
        ("sft", {"init": {"from": "phase2", "at": 20, "carry": "weights"}}, "phase2 has states from 21 to 60"),
        ("sft", {"init": {"from": "sft", "carry": "weights"}}, "stages[sft].init.from: a circle: sft -> sft"),
        ("phase2", {"overrides": {"scheduler.x": 1}}, "overrides.scheduler.x: 1, but phase1 has None"),
        (
            "sft",
            {"overrides": {"sleep.until": 3}},
            "sleep.until: a recipe cannot set this: write the stage's",
        ),
        ("phase1", {"data": {"blend": {"words": 1, "lines": 1}}}, "the shares add up to 2, not to 1"),
        ("phase1", {"data": {"blend": {"wrods": 1}}}, "no source 'wrods'; did you mean 'words'?"),
    ],
)
def test_impossible_trajectories_are_refused(stage, settings, message):
    text = refused(with_stage(stage, **settings))
    assert text.startswith("config/recipes/demo.yaml: ")
    assert message in text


# -- edits -------------------------------------------------------------------------------------------------------------


def edited(*edits, **settings) -> Recipe:
    """MEGATRON, 40 samples of 256 tokens in 10 iterations of 4 on a schedule of 50, with edits."""
    data = yaml.safe_load(MEGATRON)
    data["stages"][0] |= {"edits": list(edits), **settings}
    return resolve(yaml.safe_dump(data))


def test_an_edit_goes_on_from_a_state_and_leaves_what_was_trained():
    plain, recipe = edited(), edited({"at": 6, "skip": 2, "overrides": {"optimizer.lr": 0.0005}})
    before, after = recipe.chains["base"]
    assert before.stage.identity == plain.stages["base"].stage.identity, "the stage so far is the same trajectory"
    assert (before.until, before.wanted) == (6, {6})
    assert (after.start, after.until, after.horizon) == (6, 10, 50)
    payload = after.stage.payload
    assert payload["init"] == {"from": before.stage.identity, "at": 6, "carry": "all"}
    assert (payload["skip"], payload["stream"]) == (2, 0), "the data goes on where it was"
    assert payload["data"] == before.stage.payload["data"]
    assert payload["overrides"]["optimizer.lr"] == 0.0005
    assert recipe.stages["base"] is after, "who starts from the stage starts from the last of its trajectories"
    assert recipe.stages["rl"].stage.payload["init"] != plain.stages["rl"].stage.payload["init"]


def test_another_batch_size_keeps_tokens_and_the_schedules_length():
    before, after = edited({"at": 4, "overrides": {"train.global_batch_size": 8}}).chains["base"]
    # 16 of 200 samples of the schedule are behind, 24 of the stage's 40 to come
    assert (after.start, after.horizon, after.until) == (4, 4 + 184 // 8, 4 + 3)
    index, changed = (t.stage.store.load(t.data).payload for t in (before, after))
    assert index["samples"] == changed["samples"] == 200, "another number would be another order"


def test_a_new_blend_is_read_from_its_start():
    _, after = edited({"at": 5, "data": {"blend": {"topics": 1}}}).chains["base"]
    assert "stream" not in after.stage.payload
    assert after.stage.store.load(after.data).payload["samples"] == 45 * 4


def test_edits_follow_each_other():
    recipe = edited(
        {"at": 3, "overrides": {"train.global_batch_size": 2}},
        {"at": 7, "skip": 1},
        until={"tokens": 10_240},
        milestones=[2, 5, 9],
    )
    first, second, third = recipe.chains["base"]
    assert [t.wanted for t in (first, second, third)] == [{2, 3}, {5, 7}, {9, 17}]
    assert third.until == 7 + (40 - 12 - 8) // 2
    assert third.stage.payload["stream"] == 0
    assert third.stage.payload["overrides"]["train.global_batch_size"] == 2
    assert recipe.view("pretrain", "base", 5)[""].stage == second.stage


def test_a_later_phase_with_another_batch_size_stays_on_the_schedule():
    data = yaml.safe_load(MEGATRON)
    second = data["stages"][0] | {"name": "second", "init": {"from": "base", "carry": "all"}}
    second["overrides"] = {"train.global_batch_size": 8}
    data["stages"].insert(1, second)
    stages = resolve(yaml.safe_dump(data)).stages
    assert (stages["second"].start, stages["second"].until) == (10, 15)
    assert stages["second"].horizon == 10 + (200 - 40) // 8


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"at": 50}, "edits[0].at: 50: the stage so far has states from 1 to 49 to go on from"),
        ({"at": 5, "skip": 45}, "edits[0].skip: 45: nothing would be left until the horizon, 50"),
        (
            {"at": 5, "overrides": {"scheduler.lr_decay_iters": 9}},
            "edits[0].overrides.scheduler.lr_decay_iters: an edit",
        ),
        ({"at": 5, "overrides": {"model.seq_length": 9}}, "edits[0].overrides.model.seq_length: an edit changes"),
        ({"at": 5, "overrides": {"train.train_iters": 9}}, "overrides.train.train_iters: a recipe cannot set this"),
        ({"at": 12}, "until: 10: the last of the edits trains from 12 on"),
        ({"at": 0}, "edits[0].at: 0: input should be greater than 0"),
    ],
)
def test_impossible_edits_are_refused(edit, message):
    with pytest.raises(NemoflowError) as error:
        edited(edit, until=10)
    assert message in str(error.value)


# -- adapters ----------------------------------------------------------------------------------------------------------


def with_adapters(**settings) -> Recipe:
    data = yaml.safe_load(MEGATRON)
    data["sources"]["sums"] = {"generator": "arithmetic_chats", "shards": 1}
    data["stages"][1] = {
        "name": "adapters",
        "kind": "sft",
        "function": "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_peft_config",
        "peft": "lora",
        "init": {"from": "base", "carry": "weights"},
        "data": {"chats": {"sums": 1}, "pack_size": 256},
        "until": 4,
        "overrides": {"peft.dim": 8},
        **settings,
    }
    return resolve(yaml.safe_dump(data))


def test_the_export_of_adapters_reads_their_base_too():
    recipe = with_adapters()
    base, adapters = recipe.stages["base"], recipe.stages["adapters"]
    assert adapters.stage.payload["peft"] == "lora"
    export = recipe.view("hf_export", "adapters")[""].stage
    found = {ref.role: (ref.identity, ref.at) for ref in kinds.inputs(export.payload)}
    assert found["state"] == (adapters.stage.identity, 4)
    assert found["base"] == (base.stage.identity, 10)
    assert "base" not in recipe.view("hf_export", "base")[""].stage.payload


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edits": [{"at": 2}]}, "stages[adapters].edits: a stage of adapters has none"),
        ({"init": {"from": "base", "carry": "all"}, "until": 14}, "init.carry: all: adapters are new"),
        ({"peft": "qlora"}, "stages[adapters].peft: 'qlora': input should be 'lora' or 'dora'"),
    ],
)
def test_impossible_adapters_are_refused(settings, message):
    with pytest.raises(NemoflowError) as error:
        with_adapters(**settings)
    assert message in str(error.value)


def test_nothing_starts_from_adapters_alone():
    data = yaml.safe_load(MEGATRON)
    adapters = with_adapters().spec.stages[1].model_dump(by_alias=True, exclude_defaults=True, mode="json")
    more = adapters | {"name": "more", "init": {"from": "adapters", "carry": "weights"}}
    data["sources"]["sums"] = {"generator": "arithmetic_chats", "shards": 1}
    data["stages"][1:] = [adapters, more]
    with pytest.raises(
        NemoflowError, match=r"stages\[more\].init.from: the checkpoints of adapters hold adapters alone"
    ):
        resolve(yaml.safe_dump(data))


# -- models that are not trained ---------------------------------------------------------------------------------------


def averaged(**settings) -> Recipe:
    data = yaml.safe_load(MEGATRON)
    data["stages"].insert(1, {"name": "mean", "kind": "average", "of": {"stage": "base", "at": [6, 8]}, **settings})
    data["stages"][2]["init"]["from"] = "mean"
    return resolve(yaml.safe_dump(data))


def test_an_average_wants_the_states_it_is_of():
    recipe = averaged()
    base, mean = recipe.stages["base"], recipe.models["mean"]
    assert base.wanted == {6, 8, 10}
    assert mean.stage.payload["of"] == [{"trajectory": base.stage.identity, "at": n} for n in (6, 8)]
    assert mean.stage.label == "nemotron-3-nano-pretrain-6-and-1-more"
    export = recipe.view("hf_export", "mean")[""].stage
    assert export.payload["of"] == {"trajectory": mean.stage.identity}
    assert export.label == f"{mean.stage.label}-average"
    assert recipe.stages["rl"].stage.payload["init"]["export"] == export.identity
    assert recipe.view("average")[""].stage == mean.stage


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": {"stage": "base", "at": [6, 51]}}, "stages[mean].of.at: 51: base has states from 1 to 50"),
        ({"of": {"stage": "bass", "at": [6, 8]}}, "stages[mean].of.stage: no stage 'bass'; did you mean 'base'?"),
        ({"of": {"stage": "base", "at": [6]}}, "stages[mean].of.at: [6]: list should have at least 2 items"),
    ],
)
def test_impossible_averages_are_refused(settings, message):
    with pytest.raises(NemoflowError) as error:
        averaged(**settings)
    assert message in str(error.value)


def selected(milestones=(4,), **settings) -> Recipe:
    data = yaml.safe_load(MEGATRON)
    data["stages"][0]["milestones"] = list(milestones)
    pick = {"name": "pick", "kind": "select", "of": {"stage": "base"}, "metric": "valid_loss", "best": "lowest"}
    data["stages"].insert(1, pick | settings)
    data["stages"][2]["init"]["from"] = "pick"
    return resolve(yaml.safe_dump(data))


def test_a_selection_is_of_the_milestones_and_the_end_and_its_rule_is_identity():
    recipe = selected()
    base, pick = recipe.stages["base"], recipe.models["pick"].stage
    of = [{"trajectory": base.stage.identity, "at": n} for n in (4, 10)]
    rule = {"metric": "valid_loss", "best": "lowest"}
    assert pick.payload == {"kind": "select", "engine": "megatron_bridge", "of": of} | rule
    assert pick.label == "lowest-valid-loss-nemotron-3-nano-pretrain"
    export = recipe.view("hf_export", "pick")[""].stage
    assert export.payload["of"] == {"trajectory": pick.identity}
    assert recipe.stages["rl"].stage.payload["init"]["export"] == export.identity
    other = selected(best="highest")
    assert other.stages["base"].stage.identity == base.stage.identity, (
        "who chooses otherwise trains nothing before it again"
    )
    assert other.stages["rl"].stage.identity != recipe.stages["rl"].stage.identity
    assert selected(of={"stage": "base", "at": [10, 6]}).stages["base"].wanted == {4, 6, 10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": []}, "stages[pick].of.at: is missing, and base keeps no state but its last"),
        ({"of": {"stage": "base", "at": [6, 51]}}, "stages[pick].of.at: 51: base has states from 1 to 50"),
        ({"of": {"stage": "rl"}}, "stages[pick].init.from: a circle"),
        ({"best": "biggest"}, "stages[pick].best: 'biggest': input should be 'highest' or 'lowest'"),
    ],
)
def test_impossible_selections_are_refused(settings, message):
    with pytest.raises(NemoflowError) as error:
        selected(**settings)
    assert message in str(error.value)


def test_an_engine_that_cannot_read_the_parents_checkpoint_is_refused():
    data = yaml.safe_load(MEGATRON)
    data["stages"].append(data["stages"][0] | {"name": "more", "init": {"from": "rl", "carry": "weights"}})
    assert "whose checkpoints engine megatron_bridge cannot read" in refused(yaml.safe_dump(data))


def test_unknown_engines_and_modules_that_are_none():
    assert "did you mean 'megatron_bridge'?" in refused(with_stage("sft", engine="megatron_brdge"))
    assert "unknown engine" in refused(with_stage("sft", engine="json"))


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_name_a_recipe_offers_can_be_asked_for():
    recipe = resolve()
    names = recipe.names()
    assert names[0] == "tokenizer/demo"
    assert names[-1] == "report/demo"
    assert "pretrain/demo@phase1:10" in names
    for name in names:
        kind, _, rest = name.partition("/")
        rest, _, at = rest.partition(":")
        stage = rest.partition("@")[2] or None
        assert recipe.view(kind, stage, int(at) if at else None)


def test_a_name_without_a_stage_is_the_last_of_its_kind():
    recipe = resolve()
    assert recipe.view("pretrain") == recipe.view("pretrain", "phase2")
    assert recipe.view("hf_export") == recipe.view("hf_export", "rl")
    assert recipe.view("pretrain", "phase1", 10)[""].at == 10
    assert list(recipe.view("data")) == ["phase1", "phase2", "sft", "rl"]
    assert recipe.view("data", "sft")[""].stage.kind == "chats"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenizer", "sft", None), "a recipe has one tokenizer: tokenizer/demo"),
        (("pretrain", "sft", None), "stage sft is sft: sft/demo@sft"),
        (("sft", "stf", None), "has no stage 'stf'; did you mean 'sft'?"),
        (("data", None, 3), "data has no states"),
        (("sft", None, 7), "state 7 is neither `until` nor a milestone of sft; there are 12; add it to milestones"),
        (("hf_export", "phase1", 11), "there are 10, 20"),
    ],
)
def test_names_that_show_nothing_are_refused(arguments, message):
    with pytest.raises(NemoflowError) as caught:
        resolve().view(*arguments)
    assert message in str(caught.value)


def test_a_sealed_state_can_be_named_though_no_recipe_lists_it():
    recipe = resolve()
    sealed = recipe.stages["sft"].stage.state(7) / "sealed.json"
    sealed.parent.mkdir(parents=True)
    sealed.write_text("{}")
    assert recipe.view("sft", None, 7)[""].at == 7


def test_labels_depend_on_payloads_only():
    recipe = resolve(changed(("name: sft", "name: a-very-special-name"), ("from: sft", "from: a-very-special-name")))
    directories = [str(t.stage.directory) for t in recipe.stages.values()]
    assert [d.partition("/")[2].rpartition("-")[0] for d in directories] == [
        "pretrain/toy",
        "pretrain/toy",
        "sft/toy",
        "rl/grpo",
    ]
    export = recipe.view("hf_export", "phase1")[""].stage
    assert export.label == "toy-pretrain-20"


def test_resolving_writes_nothing_but_the_stat_cache():
    resolve()
    assert [p.name for p in Path("artifacts").rglob("*")] == [".digests.json"]


def test_payloads_hold_no_names_and_no_paths():
    recipe = resolve()
    text = json.dumps([recipe.store.load(k).payload for k in recipe.store._loaded])
    for word in ("demo", "phase1", "words", "raw/", "save_interval", "milestones", "until"):
        assert word not in text
