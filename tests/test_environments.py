"""Environments: their files, and what a stage freezes of them."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from graph import DEMO, write_demo

from nemoflow import environments, locks
from nemoflow import recipe as grammar
from nemoflow.cli import schema
from nemoflow.data import verifiers as rows
from nemoflow.errors import NemoflowError
from nemoflow.stages import Recipe
from nemoflow.store import Store

BASE = Path(__file__).resolve().parents[1]
SHIPPED = sorted((BASE / "config/environments").glob("*.yaml"))
RECIPES = [Path("config/recipes")]
SUMS = {"agent": "math_with_judge_simple_agent", "fields": {"expected_answer": "text"}, "verifier": "math"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current directory holds the locked demo recipe, and an environment `sums` for its prompts."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)
    locks.write("demo", RECIPES, Store("artifacts"), lambda _: None)
    Path("config/environments").mkdir()
    environment("sums")


def environment(name: str, **changes) -> None:
    settings = {k: v for k, v in (SUMS | changes).items() if v is not None}
    Path(f"config/environments/{name}.yaml").write_text(yaml.safe_dump(settings))


def resolve(**settings) -> Recipe:
    """The demo with settings of its rl stage; None removes one."""
    data = yaml.safe_load(DEMO)
    stage = data["stages"][-1]
    stage |= {"engine": "trl"} | settings
    data["stages"][-1] = {k: v for k, v in stage.items() if v is not None}
    Path("config/recipes/demo.yaml").write_text(yaml.safe_dump(data))
    return Recipe("demo", RECIPES, Store("artifacts"), "3.12.1")


def refused(**settings) -> str:
    with pytest.raises(NemoflowError) as caught:
        resolve(**settings)
    return str(caught.value)


WITH = {"prompts": ["problems"], "environments": ["sums"]}
PAIRS = {"preferences": ["problems"]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_environments_are_fine_for_the_types_and_for_editors(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=../environment.schema.json\n")
    jsonschema.validate(grammar.read_yaml(path), yaml.safe_load(schema(environments.Environment)))
    [found] = environments.load([path.stem], [BASE / "config/recipes"], "here").values()
    assert found.description
    assert found.gym or found.nemo_rl or found.verifier


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem in rows.VERIFIERS], ids=lambda path: path.stem)
def test_shipped_environments_are_those_of_the_agents_that_rows_name(path):
    [found] = environments.load([path.stem], [BASE / "config/recipes"], "here").values()
    assert found.agent == f"{path.stem}_simple_agent"
    assert found.gym.split("/")[1] == path.stem
    assert found.fields


def test_a_stage_freezes_what_judges_it_and_what_its_rows_need():
    before = resolve().stages["rl"]
    assert "environments" not in before.stage.payload
    environment("sums", settings={}, on_error="skip", timeout="3s")
    recipe = resolve(data=WITH)
    trained = recipe.stages["rl"]
    assert trained.stage.payload["environments"] == {
        SUMS["agent"]: {"verifier": "math", "timeout": "3s", "on_error": "skip"}
    }
    assert recipe.store.load(trained.data).payload["agents"] == {SUMS["agent"]: SUMS["fields"]}
    environment("sums", description="what is not identity", runs_on="gpu")
    again = resolve(data=WITH).stages["rl"]
    assert again.data == trained.data
    assert again.stage.payload["environments"] == {SUMS["agent"]: {"verifier": "math"}}


def test_a_teacher_is_an_export():
    recipe = resolve(engine="sleep_engine", algorithm="distillation", data=WITH, teacher={"from": "phase1", "at": 10})
    teacher = recipe.stages["rl"].stage.payload["teacher"]
    assert teacher == recipe.view("hf_export", "phase1", 10)[""].stage.identity
    last = resolve(engine="sleep_engine", algorithm="distillation", data=WITH, teacher={"from": "sft"})
    assert last.stages["rl"].stage.payload["teacher"] == last.view("hf_export", "sft")[""].stage.identity


def test_preferences_are_data_of_a_stage():
    recipe = resolve(engine="sleep_engine", algorithm="dpo", data=PAIRS)
    assert recipe.store.load(recipe.stages["rl"].data).payload["kind"] == "preferences"
    assert recipe.stages["rl"].stage.label == "dpo"


def test_algorithms_have_settings_of_their_own():
    recipe = resolve(algorithm="dapo", data=WITH, overrides={"grpo.num_generations": 8, "dapo.overlong_cache": 2})
    assert recipe.stages["rl"].stage.payload["overrides"] == {"grpo.num_generations": 8, "dapo.overlong_cache": 2}
    assert resolve(algorithm="rm", data=PAIRS, overrides={"rm.learning_rate": 1.0e-4}).stages["rl"]


def test_a_reward_model_is_not_exported():
    recipe = resolve(algorithm="rm", data=PAIRS)
    with pytest.raises(NemoflowError, match=r"engine trl does not export what rm trains; its state is rl/demo@rl"):
        recipe.view("hf_export", "rl")
    assert recipe.view("rl", "rl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "distillation", "teacher": {"from": "sft"}}, "engine trl trains grpo, dapo, dpo, rm"),
        ({"overrides": {"dpo.beta": 1}}, "overrides.dpo.beta: settings of grpo are written grpo.NAME"),
        (
            {"overrides": {"dapo.overlong_cache": 1}},
            "overrides.dapo.overlong_cache: settings of grpo are written grpo.",
        ),
        ({"overrides": {"dapo.clip": 1}}, "overrides.dapo.clip: dapo has overlong_cache"),
        ({"overrides": {"train.iters": 1}}, "overrides.train.iters: no section of this engine; write SECTION.NAME"),
        ({"algorithm": "dpo"}, "stages[rl].data: dpo learns from other data; write data: {preferences: [...]}"),
        ({"algorithm": "rm"}, "stages[rl].data: rm learns from other data; write data: {preferences: [...]}"),
        ({"data": PAIRS}, "stages[rl].data: grpo learns from other data; write data: {prompts: [...], environments:"),
        ({"algorithm": "ppo"}, "stages[rl].algorithm: 'ppo': input should be 'grpo', 'dapo'"),
        ({"algorithm": "distillation"}, "stages[rl].teacher: is missing; write teacher: {from: STAGE}"),
        ({"teacher": {"from": "sft"}}, "stages[rl].teacher: grpo has none"),
        (
            {"engine": "sleep_engine", "algorithm": "distillation", "teacher": {"from": "sftt"}},
            "stages[rl].teacher.from: no stage 'sftt'; did you mean 'sft'?",
        ),
        (
            {"engine": "sleep_engine", "algorithm": "distillation", "teacher": {"from": "sft", "at": 99}},
            "stages[rl].teacher.at: 99: sft has states from 1 to 30",
        ),
        (
            {"data": WITH | {"environments": ["sum"]}},
            "stages[rl].data.environments: no environment 'sum' in config/envi",
        ),
        ({"data": WITH | {"environments": ["sums", "sums"]}}, "data.environments: sums stands there twice"),
        ({"data": WITH | {"environment": []}}, "data.environment: unknown key; did you mean 'environments'?"),
    ],
)
def test_what_an_rl_stage_may_not_say(settings, message):
    assert message in refused(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": "maths"}, "sums.yaml: verifier: 'maths': No module named"),
        (
            {"settings": {"tolerance": 1}},
            "sums.yaml: settings.tolerance: is unknown to this verifier; it takes no settings",
        ),
        (
            {"verifier": "code", "settings": {"second": 1}},
            "settings.second: is unknown to this verifier; it takes seconds",
        ),
        ({"timeout": 3}, "sums.yaml: timeout: 3: give a time such as"),
        ({"on_error": "zero"}, "sums.yaml: on_error: 'zero': input should be 'stop' or 'skip'"),
        ({"fields": {"id": "number"}}, "sums.yaml: fields.id: 'number': input should be 'text'"),
        ({"agent": None}, "sums.yaml: agent: is missing"),
        ({"verifer": "math"}, "sums.yaml: verifer: unknown key; did you mean 'verifier'?"),
        ({"verifier": None}, "sums has no `verifier` in its file, and engine trl starts no server"),
    ],
)
def test_what_an_environment_may_not_say(changes, message):
    environment("sums", **changes)
    assert message in refused(data=WITH)


def test_two_environments_of_one_agent():
    environment("others")
    assert "sums and others are both for rows of math_with_judge_simple_agent; keep one" in refused(
        data=WITH | {"environments": ["sums", "others"]}
    )
