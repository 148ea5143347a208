"""Recipes: what may stand in them, `extends`, and errors that name file, key, value and the fix."""

import copy
import json

import jsonschema
import pytest
import yaml
from graph import BASE, DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoflow import recipe as grammar
from nemoflow.cli import SCHEMAS, schema
from nemoflow.errors import NemoflowError

SHIPPED = BASE / "config/recipes"


@pytest.fixture
def load(tmp_path):
    """A function that writes recipes by name and loads the first; a text, or data."""

    def write_and_load(*recipes, **more):
        files = {**{f"r{i}": r for i, r in enumerate(recipes)}, **more}
        for name, content in files.items():
            text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
            (tmp_path / f"{name}.yaml").write_text(text)
        return grammar.load(next(iter(files)), [tmp_path])[1]

    return write_and_load


@pytest.fixture
def refused(load):
    """The message with which a recipe is refused; every message starts with the file."""

    def message(*recipes, **more):
        with pytest.raises(NemoflowError) as caught:
            load(*recipes, **more)
        assert "\n" not in str(caught.value).rstrip()
        return str(caught.value)

    return message


def changed(*pairs: tuple[str, str]) -> str:
    text = DEMO
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    return text


# -- what is fine ------------------------------------------------------------------------------------------------------


def test_the_demo_is_read_as_written(load):
    recipe = load(DEMO)
    assert [stage.name for stage in recipe.stages] == ["phase1", "phase2", "sft", "rl"]
    assert recipe.stages[1].init.stage == "phase1"
    assert recipe.stages[1].data.blend == {"words": "1/2", "lines": "1/2"}
    assert recipe.sources["sums"].shards == 2
    assert recipe.sources["words"].shard_size == 512 * 2**20
    assert recipe.export.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("written", "tokens"),
    [("2_000_000", 2_000_000), ("8.4B", 8_400_000_000), ("15T", 15 * 10**12), ("1.5 K", 1500), ("7", 7), ("1M", 10**6)],
)
def test_token_counts(load, written, tokens):
    recipe = load(changed(("until: 12", f"until: {{tokens: {written}}}")))
    assert recipe.stages[2].until.tokens == tokens


@pytest.mark.parametrize("written", ["0", "-5", "1.5", "0.0001K", "8.4G", "many", "true", "[]", "1e9"])
def test_what_is_no_token_count(refused, written):
    assert "stages[sft].until.tokens: " in refused(changed(("until: 12", f"until: {{tokens: {written}}}")))


@pytest.mark.parametrize(
    ("written", "share"), [("1", "1"), ("0.3", "3/10"), ("3/10", "3/10"), ("'6/20'", "3/10"), ("0.1", "1/10")]
)
def test_shares_are_exact(load, written, share):
    assert load(changed(("{words: 1}", f"{{words: {written}}}"))).stages[0].data.blend == {"words": share}


@pytest.mark.parametrize("written", ["0", "-1/2", "2", "1/0", "half", "true", "null", ".nan", ".inf", "[1]"])
def test_what_is_no_share(refused, written):
    message = refused(changed(("{words: 1}", f"{{words: {written}}}")))
    assert "stages[phase1].data.blend.words: " in message
    assert "fraction" in message


# -- extends -----------------------------------------------------------------------------------------------------------


def test_extends_merges_mappings_and_stages_by_name_and_replaces_the_rest(load):
    child = {
        "extends": "base",
        "overrides": {"sleep_engine": {"optimizer.wd": 0.1}},
        "stages": [
            {"name": "phase1", "milestones": [7], "data": {"max_epochs": "9/2"}},
            {"name": "more", "kind": "sft", "function": "f", "until": 3, "horizon": 3,
             "init": {"from": "sft", "carry": "weights"}, "data": {"chats": {"sums": 1}, "pack_size": 64}},
        ],
    }  # fmt: skip
    recipe = load(child=child, base=DEMO)
    assert recipe.overrides["sleep_engine"] == {
        "optimizer.lr": 0.001,
        "train.global_batch_size": 2,
        "optimizer.wd": 0.1,
    }
    assert [s.name for s in recipe.stages] == ["phase1", "phase2", "sft", "rl", "more"]
    assert recipe.stages[0].milestones == [7]
    assert recipe.stages[0].data.max_epochs == "9/2"
    assert recipe.stages[0].data.blend == {"words": "1"}
    assert recipe.held_out.cap == "1/5"
    assert recipe.stages[0].until == 20


def test_a_chain_of_extends(load):
    recipe = load(c="extends: b\ndescription: c", b="extends: a\nexport: {dtype: float32}", a=DEMO)
    assert (recipe.description, recipe.export.dtype) == ("c", "float32")


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": "extends: a"}, "a.yaml: extends: a circle: a -> a"),
        ({"a": "extends: b", "b": "extends: c", "c": "extends: a"}, "extends: a circle: a -> b -> c -> a"),
        ({"a": "extends: bb", "b": DEMO}, "unknown recipe 'bb'"),
        ({"a": "extends: ../a"}, "'../a' cannot be a recipe's name"),
        ({"a": "extends: /etc/passwd"}, "'/etc/passwd' cannot be a recipe's name"),
        ({"a": "extends: [a, b]"}, "a.yaml: extends: ['a', 'b'] is not a recipe's name"),
        ({"a": "extends: b", "b": "stages: ["}, "b.yaml:1: "),
        ({"a": "extends: b\nstages: [{name: sft, untill: 3}]", "b": DEMO}, "a.yaml: stages[sft].untill: unknown key"),
    ],
)
def test_bad_extends(refused, recipes, message):
    assert message in refused(**recipes)


# -- what is not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("vocab_size", "vocab_sise")], "tokenizer.vocab_sise: unknown key; did you mean 'vocab_size'?"),
        ([("overrides:\n  sleep", "override:\n  sleep")], "override: unknown key; did you mean 'overrides'?"),
        ([("until: 12", "untill: 12")], "stages[sft].untill: unknown key; did you mean 'until'?"),
        ([("from: phase2", "form: phase2")], "stages[sft].init.form: unknown key; did you mean 'from'?"),
        ([("pack_size", "packsize")], "stages[sft].data.packsize: unknown key; did you mean 'pack_size'?"),
        ([("shards: 2, args", "shard: 2, args")], "sources.sums.shard: unknown key; did you mean 'shards'?"),
        ([("format: jsonl,", "formats: jsonl,")], "sources.lines.formats: unknown key; did you mean 'format'?"),
        ([("algorithm: grpo", "algorithm: grpo\n    function: f")], "stages[rl].function: unknown key"),
        ([("kind: sft", "kind: stf")], "stages[sft].kind: 'stf' is no kind of stage; known: import,"),
        ([("    kind: sft\n", "")], "stages[sft].kind: None is no kind of stage"),
        ([("until: 12", "until: 12.0")], "stages[sft].until: 12.0: input should be a valid integer"),
        ([("until: 12", "until: '12'")], "stages[sft].until: '12': input should be a valid integer"),
        ([("until: 12", "until: 0")], "stages[sft].until: 0: input should be greater than 0"),
        ([("    until: 12\n", "")], "stages[sft].until: is missing"),
        ([("milestones: [10]", "milestones: [10, x]")], "stages[phase1].milestones[1]: 'x': input should be"),
        ([("carry: all", "carry: everything")], "stages[phase2].init.carry: 'everything': input should be 'weights'"),
        ([("generator: arithmetic_rl", "generator: arithmetic")], "sources.problems.generator: 'arithmetic': input"),
        ([("0.001", "1e-3")], "optimizer.lr: 1e-3 is a string in YAML, not a number; write 1.0e-3"),
        ([("optimizer.lr: ", "optimizer..lr: ")], "an override is written section.key"),
        ([("name: sft", "name: a/b")], "a name is letters, digits"),
        ([("name: sft", "name: ..")], "a name is letters, digits"),
        ([("sums: {", "../sums: {")], "a name is letters, digits"),
        ([("train_on: [words, sums]", "train_on: []")], "tokenizer.train_on: []: list should have at least 1 item"),
        ([("vocab_size: 280", "vocab_size: 256")], "tokenizer.vocab_size: 256: input should be greater than 256"),
        ([("description: a", "description: [a]\nx: a")], "x: unknown key"),
        ([("stages:\n", "stages: []\nmore:\n")], "more: unknown key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors_name_file_key_and_fix(refused, pairs, message):
    said = refused(changed(*pairs))
    assert "/r0.yaml: " in said
    assert message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n", "r0.yaml:3: "),
        ("a: 1\na: 2\n", "r0.yaml:2: the key 'a' stands twice"),
        ("a: {b: 1, c: {d: 1, d: 2}}\n", "r0.yaml:1: the key 'd' stands twice"),
        ("", "r0.yaml: a mapping is wanted, found NoneType"),
        ("- a\n", "r0.yaml: a mapping is wanted, found list"),
        ("a: !!python/object:os.system x\n", "r0.yaml:1: could not determine a constructor"),
        ("{[1]: 2}\n", "r0.yaml:1: "),
        ("{{a: 1}: 2}\n", "r0.yaml:1: "),
        ("a: \x00\n", "r0.yaml: "),
        ("a: 1\n1: a\n", "r0.yaml:2: the key 1 is int; put it in quotes"),
        ("on: a\n", "r0.yaml:1: the key True is bool; put it in quotes"),
        (DEMO.partition("stages:")[0] + "stages: 3\n", "r0.yaml: stages: 3: input should be a valid list"),
        (DEMO + "  - 3\n", "r0.yaml: stages[4].kind: 3 is no kind of stage"),
    ],
)
def test_what_is_no_recipe_at_all(refused, text, message):
    assert message in refused(text)


def test_a_file_that_is_not_utf_8(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"description: \xff\xfe")
    with pytest.raises(NemoflowError, match=r"a.yaml: not YAML in UTF-8"):
        grammar.load("a", [tmp_path])


def test_yaml_anchors_and_merge_keys_are_fine(load):
    text = DEMO.replace("  - name: phase1\n", "  - &one\n    name: phase1\n").replace(
        "  - name: phase2\n    kind: pretrain\n", "  - <<: *one\n    name: phase2\n    milestones: []\n"
    )
    assert load(text).stages[1].function == "toys.toy_pretrain_config"


@pytest.mark.parametrize(
    ("disguised", "right"),
    [("1e-3", "1.0e-3"), ("1E5", "1.0e+5"), ("-2e4", "-2.0e+4"), ("1.5e3", "1.5e+3"), ("+1e3", "+1.0e+3")],
)
def test_the_right_spelling_is_a_number_of_the_same_value(refused, disguised, right):
    assert refused(changed(("0.001", disguised))).endswith(f"write {right}")
    assert yaml.safe_load(f"x: {right}")["x"] == float(disguised)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nano3-tinny", "did you mean 'nano3-tiny'?"),
        ("zzz", "known: .*nano3-tiny"),
        ("a/b", "'a/b' cannot be a recipe's name"),
        ("..", r"'\.\.' cannot be a recipe's name"),
        ("", "'' cannot be a recipe's name"),
        (".hidden", "cannot be a recipe's name"),
        ("a\nb", "cannot be a recipe's name"),
        ("nano3-tiny\n", "cannot be a recipe's name"),
    ],
)
def test_unknown_and_impossible_names(name, message):
    with pytest.raises(NemoflowError, match=message):
        grammar.load(name, [SHIPPED])


def test_the_first_directory_wins(tmp_path):
    (tmp_path / "nano3-tiny.yaml").write_text(DEMO)
    assert grammar.find("nano3-tiny", [tmp_path, SHIPPED]).parent == tmp_path


# -- whatever is written, the answer is a recipe or one error ----------------------------------------------------------

junk = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, "", "x", "1e-3", "../x", [], [None], [[]], [{}], {}, {"a": 1}, {"": {}}, {1: 2}]
)


def paths(value, path=()):
    """Every place in a recipe's data."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*path, key))


PLACES = [p for p in paths(yaml.safe_load(DEMO)) if p]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(PLACES), junk, st.sampled_from(["replace", "add", "delete"]))
def test_any_damage_is_one_clear_error(tmp_path_factory, place, value, how):
    data = copy.deepcopy(yaml.safe_load(DEMO))
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    if how == "delete":
        del parent[place[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent[f"{place[-1]}x"] = value
    else:
        parent[place[-1]] = value
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "r.yaml").write_text(yaml.safe_dump(data))
    try:
        _, recipe = grammar.load("r", [directory])
    except NemoflowError as error:
        message = str(error)
        assert "r.yaml" in message or "recipe's name" in message or "unknown recipe" in message
        assert "\n" not in message
    else:
        assert isinstance(recipe, grammar.Recipe)


# -- blend files -------------------------------------------------------------------------------------------------------

BLEND = {
    "sources": {
        "web": {"files": "hf://org/web", "config": "High-Quality", "weight": 3, "reason": "r"},
        "math": {"files": "hf://org/math", "weight": "0.5", "repeat": "5/2", "field": "body"},
    },
    "placeholder_sources": {"dapo": {"files": "hf://org/dapo"}},
    "placeholders": {"some_rows": {"source": "dapo", "template": "dapo"}},
}


@pytest.fixture
def with_blend(tmp_path):
    """A function that loads the demo with a stage's data named after the blend file mix.yaml."""

    def load(change: tuple[str, str], blend=BLEND):
        (tmp_path / "blends").mkdir(exist_ok=True)
        (tmp_path / "blends/mix.yaml").write_text(yaml.safe_dump(blend, sort_keys=False))
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes/r.yaml").write_text(changed(change))
        return grammar.load("r", [tmp_path / "recipes"])[1]

    return load


def test_a_blend_file_gives_sources_and_exact_shares(with_blend):
    recipe = with_blend(("blend: {words: 1}", "blend: mix"))
    assert recipe.stages[0].data.blend == {"web": "6/7", "math": "1/7"}
    assert recipe.sources["web"] == grammar.Files(files="hf://org/web", config="High-Quality")
    assert recipe.sources["math"].field == "body"


def test_a_blend_file_gives_repeats_of_chats_and_placeholders_of_prompts(with_blend):
    assert with_blend(("chats: {sums: 1}", "chats: mix")).stages[2].data.chats == {"web": "1", "math": "5/2"}
    rl = with_blend(("prompts: [problems]", "prompts: mix")).stages[3].data
    assert rl.prompts == ["web", "math"]
    assert rl.placeholders["some_rows"].source == "dapo"


def test_an_unknown_blend_file_is_refused_with_the_known_ones(with_blend):
    with pytest.raises(
        NemoflowError, match=r"stages\[phase1\].data.blend: there is no miks.yaml in .*did you mean 'mix'"
    ):
        with_blend(("blend: {words: 1}", "blend: miks"))


def test_a_mistake_in_a_blend_file_names_that_file(with_blend):
    wrong = {"sources": {"web": {"files": "hf://org/web", "wieght": 3}}}
    with pytest.raises(NemoflowError, match=r"mix.yaml: sources.web.wieght: unknown key; did you mean 'weight'"):
        with_blend(("blend: {words: 1}", "blend: mix"), wrong)
    negative = {"sources": {"web": {"files": "hf://org/web", "weight": -3}}}
    with pytest.raises(NemoflowError, match=r"mix.yaml: sources.web.weight: -3: give a number above 0"):
        with_blend(("blend: {words: 1}", "blend: mix"), negative)


def test_a_blend_file_may_not_mean_another_source_by_a_name(with_blend):
    other = {"sources": {"words": {"files": "elsewhere/*.jsonl"}}}
    with pytest.raises(NemoflowError, match="both have a source 'words', and they differ"):
        with_blend(("blend: {words: 1}", "blend: mix"), other)


@pytest.mark.parametrize(("written", "size"), [("64MiB", 2**26), ("1 GB", 10**9), ("4096", 4096), ("3kB", 3000)])
def test_sizes(load, written, size):
    recipe = load(changed(("format: jsonl, field: line}", f"format: jsonl, field: line, shard_size: {written}}}")))
    assert recipe.sources["lines"].shard_size == size


@pytest.mark.parametrize("written", ["0", "-1", "1.5MiB", "big", "64M", "[]"])
def test_what_is_no_size(refused, written):
    message = refused(changed(("format: jsonl, field: line}", f"format: jsonl, field: line, shard_size: {written}}}")))
    assert "sources.lines.shard_size: " in message
    assert "give a size such as 512MiB" in message


def test_datasets_are_told_apart_by_what_they_hold(load):
    recipe = load(
        DEMO
        + """datasets:
  mix: {blend: {words: 1}}
  talk: {chats: {sums: 1/2}, pack_size: 64}
  pairs: {preferences: [sums], fields: {prompt: question}}
"""
    )
    assert [type(d).__name__ for d in recipe.datasets.values()] == ["PretrainData", "SftData", "PreferenceData"]


def test_a_mistake_in_a_dataset_names_its_key(refused):
    message = refused(DEMO + "datasets:\n  pairs: {preferences: [sums], feilds: {}}\n")
    assert "datasets.pairs.feilds: unknown key; did you mean 'fields'" in message


# -- the schema --------------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_types():
    for file, model in SCHEMAS.items():
        assert file.read_text() == schema(model), "write it again with `nemoflow schema`"


@pytest.mark.parametrize("path", sorted((BASE / "config/blends").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_blends_are_fine_for_the_types_and_for_editors(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=../blend.schema.json\n")
    data = grammar.read_yaml(path)
    jsonschema.validate(data, json.loads(schema(grammar.Blend)))
    blend = grammar.Blend.model_validate(data)
    assert all(source.reason for source in blend.sources.values()), "every weight has a reason"


@pytest.mark.parametrize("name", grammar.known([SHIPPED]))
def test_shipped_recipes_are_fine_for_the_types_and_for_editors(name):
    path, _ = grammar.load(name, [SHIPPED])
    assert path.read_text().startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema()))


def test_the_schema_refuses_what_the_types_refuse():
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    validator.validate(yaml.safe_load(DEMO))
    for old, new in [
        ("until: 12", "untill: 12"),
        ("until: 12", "until: soon"),
        ("carry: all", "carry: some"),
        ("vocab_size: 280", "vocab_size: 3"),
        ("kind: sft", "kind: stf"),
        ("words: 1}", "words: half}"),
    ]:
        assert not validator.is_valid(yaml.safe_load(changed((old, new)))), new


def test_profiles_share_no_key():
    files = (BASE / "profiles").glob("*/profile.yaml")
    profiles = {file.parent.name: set(yaml.safe_load(file.read_text())) for file in files}
    assert profiles["default"] >= {"nolock", "ignore-incomplete", "keep-incomplete", "rerun-triggers"}
    assert not profiles["default"] & profiles.get("slurm", set())
