"""The engine trl: rewards, what is refused, complete checkpoints, and digits that go on after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hf_models import random_model, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from poisoned import odd_length

from nemoflow.engines.trl import USUAL, checkpoints, rollouts, train
from nemoflow.errors import NemoflowError
from nemoflow.export import make
from nemoflow.training import metrics

AGENT = {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}
OVERRIDES = {
    "grpo.learning_rate": 5.0e-3,
    "grpo.lr_scheduler_type": "linear",
    "grpo.warmup_steps": 2,
    "grpo.per_device_train_batch_size": 32,
    "grpo.num_generations": 8,
    "grpo.max_completion_length": 1,
}


def row(answer: str, question: str = "What is 3 + 4?") -> dict:
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "agent_ref": AGENT,
        "expected_answer": answer,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An export of a model that answers with a digit, each about as often, so that some answers are right."""
    home = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(home / "tokenizer")
    made = random_model("ME*")
    ids = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    digits = [ids[str(d)] for d in range(10)]
    prompt = torch.tensor([[4, 301, 302, 5, 303, 4, 304, 305]])
    with torch.no_grad():
        hidden = made(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        made.lm_head.weight.mul_(0.1)
        made.lm_head.weight[digits] += 8 * hidden / hidden.square().sum()
    made.save_pretrained(home / "state" / "checkpoint")
    out = home / "export"
    out.mkdir()
    make({"engine": "trl", "dtype": "float32"}, {"state": home / "state", "tokenizer": tokenizer}, out, print, [])
    return out


def prompts(directory: Path, rows: list[dict]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


SUMS = [row(str(a + b), f"What is {a} + {b}?") for a in range(5) for b in range(5)]


def request(home: Path, start_from: Path, rows: list[dict] | None = None, **changes) -> Path:
    """A request file in `home`, as the driver writes it: 12 steps of a schedule of 12, a checkpoint every 4; and
    `changes` to it."""
    home.mkdir(exist_ok=True)
    content = {
        "kind": "rl",
        "algorithm": "grpo",
        "overrides": OVERRIDES,
        "model": str(start_from),
        "prompts": str(prompts(home / "prompts", SUMS if rows is None else rows)),
        "init": None,
        "start": 0,
        "horizon": 12,
        "stop": 12,
        "wanted": [12],
        "wanted_directory": str(home / "wanted"),
        "save_interval": 4,
        "checkpoints": str(home / "checkpoints"),
        "metrics": str(home / "metrics.jsonl"),
        "config": str(home / "config"),
    }
    file = home / "request.json"
    file.write_text(json.dumps(content | changes))
    return file


def start(file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemoflow.engines.trl.train", str(file)]
    tests = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    with (file.parent / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def run(file: Path) -> int:
    """The exit code of the trainer."""
    return start(file).wait(300)


def kill(child: subprocess.Popen) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def digits(home: Path) -> dict[int, dict]:
    """Step -> what was measured, seconds aside."""
    found = metrics(home / "metrics.jsonl")
    return {n: {k: v for k, v in entry.items() if k != "seconds"} for n, entry in found.items()}


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> Path:
    """A run of 12 steps in one go."""
    home = tmp_path_factory.mktemp("uninterrupted")
    assert run(request(home, model)) == 0, (home / "log").read_text()[-3000:]
    return home


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ":2: no row in NeMo-Gym's layout"),
        ("[]", ":2: no row in NeMo-Gym's layout"),
        ('{"responses_create_params": {}}', ":2: no row in NeMo-Gym's layout: KeyError('input')"),
        (json.dumps(row("8") | {"agent_ref": {"name": "swe_agent"}}), ":2: agent_ref.name: 'swe_agent' is of no envir"),
        (json.dumps(row("")), ":2: expected_answer is missing"),
        (
            json.dumps(row("8") | {"responses_create_params": {"input": [{"type": "function_call", "name": "f"}]}}),
            ":2: only messages of plain text",
        ),
        (
            json.dumps(row("8") | {"responses_create_params": {"input": [], "tools": [{"type": "function"}]}}),
            ":2: only messages of plain text",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(json.dumps(row("8")) + "\n" + text + "\n")
    with pytest.raises(NemoflowError) as caught:
        rollouts.rows(tmp_path, USUAL)
    assert str(caught.value).startswith(f"{tmp_path}/train.jsonl{message}")


def test_no_rows(tmp_path):
    with pytest.raises(NemoflowError, match=r"train\.jsonl: is missing"):
        rollouts.rows(tmp_path, USUAL)
    prompts(tmp_path, [])
    with pytest.raises(NemoflowError, match="has no rows"):
        rollouts.rows(tmp_path, USUAL)


@given(st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 300), st.integers(0, 300))
def test_the_order_of_prompts(count, seed, fewer, more):
    """Passes over all prompts; a longer order begins with the shorter one; another seed gives another."""
    fewer, more = sorted((fewer, more))
    found = train.order(count, seed, more)
    assert found[:fewer] == train.order(count, seed, fewer)
    for begin in range(0, more - count + 1, count):
        assert sorted(found[begin : begin + count]) == list(range(count))


def test_another_seed_is_another_order():
    assert train.order(50, 1, 50) != train.order(50, 2, 50)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint(directory: Path, step: int) -> Path:
    made = directory / f"checkpoint-{step}"
    made.mkdir()
    (made / "model.safetensors").write_bytes(random.Random(step).randbytes(1000))
    return made


def test_a_checkpoint_is_complete_when_it_is_marked_and_whole(tmp_path):
    for step in (4, 12, 8):
        checkpoints.mark(checkpoint(tmp_path, step))
    checkpoint(tmp_path, 16)  # a save that was killed before its end
    cut = checkpoint(tmp_path, 20)
    checkpoints.mark(cut)
    (cut / "model.safetensors").write_bytes(b"short")
    lost = checkpoint(tmp_path, 24)
    checkpoints.mark(lost)
    (lost / "model.safetensors").unlink()
    bad = checkpoint(tmp_path, 28)
    (bad / checkpoints.MARKER).write_text("[")
    (tmp_path / "checkpoint-old").mkdir()
    assert list(checkpoints.states(tmp_path)) == [4, 8, 12]
    checkpoints.remove_incomplete(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"checkpoint-{n}" for n in (12, 4, 8)), "checkpoint-old"]
    assert checkpoints.states(tmp_path / "nowhere") == {}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"grpo.learning_rat": 1.0e-3}, "did you mean grpo.learning_rate?"),
        ({"train.iters": 1}, "there is no such setting"),
        ({"dpo.beta": 0.1}, "dpo.beta: there is no such setting"),
        ({"dapo.overlong_cache": 0.5}, "dapo.overlong_cache: 0.5 is float; int is wanted"),
        ({"grpo.max_steps": 7}, "a recipe cannot set this: write the stage's horizon"),
        ({"grpo.output_dir": "x"}, "a recipe cannot set this"),
        ({"grpo.report_to": ["wandb"]}, "a recipe cannot set this"),
        ({"grpo.learning_rate": "fast"}, "grpo.learning_rate: 'fast' is str; float is wanted"),
        ({"grpo.learning_rate": True}, "grpo.learning_rate: True is bool; float is wanted"),
        ({"grpo.num_generations": 2.5}, "grpo.num_generations: 2.5 is float; int or null is wanted"),
        ({"grpo.per_device_train_batch_size": 30}, "must be divisible by num_generations (8)"),
        ({"grpo.lr_scheduler_type": "zigzag"}, "zigzag"),
    ],
)
def test_overrides_that_are_refused(tmp_path, model, overrides, message):
    asked = train.Request.read(request(tmp_path, model, overrides=OVERRIDES | overrides))
    with pytest.raises(NemoflowError) as caught:
        train.settings(asked)
    assert message in str(caught.value)


def test_a_started_stage_refuses_other_settings(tmp_path, model):
    def settings(**overrides):
        return train.settings(train.Request.read(request(tmp_path, model, overrides=OVERRIDES | overrides)))

    file = tmp_path / "config"
    train.check_resolved(file, settings())
    stored = file.read_bytes()
    train.check_resolved(file, settings(**{"grpo.dataloader_num_workers": 1}))
    with pytest.raises(NemoflowError, match=r"learning_rate was 0\.005, is 0\.001; raise the stage's version"):
        train.check_resolved(file, settings(**{"grpo.learning_rate": 1.0e-3}))
    assert file.read_bytes() == stored
    assert str(tmp_path) not in stored.decode()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(uninterrupted):
    found = metrics(uninterrupted / "metrics.jsonl")
    assert list(found) == list(range(1, 13))
    assert set(found[1]) == {
        *("iteration", "loss", "kl", "entropy", "grad_norm", "lr", "seconds", "reward", "reward_std"),
        "completion_tokens",
    }
    assert all(entry["completion_tokens"] == 32 and entry["kl"] is None for entry in found.values())
    assert len({entry["loss"] for entry in found.values()}) > 4  # or equal digits would say little
    assert len({entry["reward"] for entry in found.values()}) > 3
    assert found[2]["lr"] < found[3]["lr"] == OVERRIDES["grpo.learning_rate"] > found[12]["lr"] > 0
    assert list(checkpoints.states(uninterrupted / "checkpoints")) == [4, 8, 12]
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == [
        *("checkpoint-12", "checkpoint-4", "checkpoint-8"),
    ]


def test_until_is_raised(uninterrupted, model, tmp_path):
    """Stopped at 6 and then let go on to 12: the digits and the checkpoints of a run that had 12 from the start.

    Asked for 10 meanwhile, by a file as another controller writes it, the run keeps that state too.
    """
    assert run(request(tmp_path, model, stop=6, wanted=[6])) == 0
    assert list(checkpoints.states(tmp_path / "checkpoints")) == [4, 6]
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted" / "10").touch()
    assert run(request(tmp_path, model)) == 0
    assert digits(tmp_path) == digits(uninterrupted)
    states, others = (checkpoints.states(home / "checkpoints") for home in (tmp_path, uninterrupted))
    assert list(states) == [4, 6, 8, 10, 12]
    for step in others:
        files, wanted = ({p.name: p.read_bytes() for p in s[step].iterdir()} for s in (states, others))
        assert files.keys() == wanted.keys()
        assert {n for n in files if files[n] != wanted[n]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between saves", "during a save"])
def test_killed_and_run_again(uninterrupted, model, tmp_path, moment):
    child = start(request(tmp_path, model))
    home = tmp_path / "checkpoints"
    caught = False
    while not caught:
        assert child.poll() is None, "it ended before it could be killed"
        if moment == "during a save":
            made = home / "checkpoint-8"
            caught = made.exists() and not (made / checkpoints.MARKER).exists()
        else:
            caught = 6 in metrics(tmp_path / "metrics.jsonl")
        time.sleep(0.001)
    kill(child)
    assert list(checkpoints.states(home)) == [4]
    assert (home / "checkpoint-8").exists() == (moment == "during a save")
    assert run(request(tmp_path, model)) == 0, (tmp_path / "log").read_text()[-3000:]
    assert digits(tmp_path) == digits(uninterrupted)
    assert list(checkpoints.states(home)) == [4, 8, 12]


def test_nothing_to_do(uninterrupted, model):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert run(request(uninterrupted, model)) == 0
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_it_learns(model, tmp_path):
    """All prompts have one answer: what about a tenth of the samples had right, most have in the end."""
    rows = [row("7", f"What is {a} + {7 - a}?") for a in range(8)]
    assert run(request(tmp_path, model, rows, horizon=20, stop=20, save_interval=None, wanted=[20])) == 0
    found = [entry["reward"] for entry in metrics(tmp_path / "metrics.jsonl").values()]
    assert sum(found[:2]) / 2 < 0.3
    assert sum(found[-2:]) / 2 > 0.5


def test_a_trained_state_is_exported(uninterrupted, model, tmp_path):
    """What comes out is what the checkpoint holds, and not what training began with."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    (tmp_path / "state").mkdir()
    state = checkpoints.states(uninterrupted / "checkpoints")[12]
    (tmp_path / "state" / "checkpoint").symlink_to(state)
    out = tmp_path / "out"
    out.mkdir()
    make({"engine": "trl", "dtype": "float32"}, {"state": tmp_path / "state", "tokenizer": model}, out, print, [])
    tensors, before = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    trained = load_file(state / "model.safetensors")
    assert not torch.equal(
        tensors["backbone.layers.0.mixer.in_proj.weight"], before["backbone.layers.0.mixer.in_proj.weight"]
    )
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tensors.items())
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": 13}, "until: 13 is past the horizon of the schedule, 12"),
        (
            {"environments": {AGENT["name"]: {"verifier": "maths"}}},
            "environment of math_with_judge_simple_agent: verifi",
        ),
        ({"algorithm": "ppo"}, "algorithm: 'ppo' is not one of this engine: grpo, dapo, dpo, rm"),
        ({"model": "/nowhere"}, "/nowhere: no model that can be loaded"),
    ],
)
def test_one_clear_last_line(tmp_path, model, changes, message):
    assert run(request(tmp_path, model, **changes)) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith(f"nemoflow: error: {message}")
    assert checkpoints.states(tmp_path / "checkpoints") == {}


# -- other algorithms --------------------------------------------------------------------------------------------------


def chat(text: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": text}]


PAIRS = [{"prompt": chat(f"What is {a} + 4?", "user"), "chosen": chat("7"), "rejected": chat(str(a))} for a in range(7)]


def pairs_request(home: Path, model: Path, algorithm: str, **changes) -> Path:
    file = request(home, model, algorithm=algorithm, prompts=None, preferences=str(home / "prompts"), **changes)
    prompts(home / "prompts", PAIRS)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "rm"])
def test_preferences_are_learned_and_go_on_after_a_kill(model, tmp_path, algorithm):
    """Killed at 7 and run again: the digits of a run in one go, and in the end nearly all pairs are told apart."""
    settings = {"learning_rate": 2.0e-3, "per_device_train_batch_size": 7, "lr_scheduler_type": "constant"}
    overrides = {f"{algorithm}.{key}": value for key, value in settings.items()}
    once, again = (
        pairs_request(tmp_path / name, model, algorithm, overrides=overrides, save_interval=4) for name in ("a", "b")
    )
    assert run(once) == 0, (once.parent / "log").read_text()[-3000:]
    found = digits(once.parent)
    assert list(found) == list(range(1, 13))
    assert found[12]["accuracy"] > 0.8
    assert found[12]["margin"] > found[2]["margin"]
    child = start(again)
    while 6 not in metrics(again.parent / "metrics.jsonl"):
        assert child.poll() is None, (again.parent / "log").read_text()[-3000:]
        time.sleep(0.001)
    kill(child)
    assert list(checkpoints.states(again.parent / "checkpoints")) == [4]
    assert run(again) == 0
    assert digits(again.parent) == found


def test_dapo_clips_higher_and_punishes_length(model, tmp_path):
    asked = request(tmp_path, model, algorithm="dapo", horizon=3, stop=3, wanted=[3])
    assert run(asked) == 0, (tmp_path / "log").read_text()[-3000:]
    resolved = json.loads((tmp_path / "config").read_text())
    assert (resolved["epsilon"], resolved["epsilon_high"], resolved["loss_type"]) == (0.2, 0.28, "dapo")
    rewards = rollouts.Rewards(Always(), 2, (10, 4))
    answers = [[{"content": "8"}]] * 4
    lengths = [[1] * n for n in (3, 8, 10, 6)]
    assert rewards(answers, [json.dumps(row("8"))] * 4, lengths) == [1, 0.5, 0, 1]
    assert rewards.measured == {"reward": 1}, "what the environment says, length aside"


class Always:
    """A judge to whom each answer is worth `found`, or one."""

    def __init__(self, found: list | None = None):
        self.found, self.environments = found, {AGENT["name"]: {}}

    def rewards(self, answers, rows):  # noqa: ARG002
        return self.found or [1.0] * len(answers)


def test_what_cannot_be_judged_teaches_nothing():
    """It takes the mean of its group, whose other advantages stay; it is counted, and in no mean."""
    rewards = rollouts.Rewards(Always([1.0, None, 0.0, 0.5, None, None, 1.0, 1.0, 0.0]), 3, None)
    found = rewards([[{"content": "x"}]] * 9, [json.dumps(row("8"))] * 9, [[1]] * 9)
    assert found == [1.0, 0.5, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.0]
    assert rewards.measured == {"reward": pytest.approx(3.5 / 6), "skipped": {AGENT["name"]: 3}}


def test_several_environments_in_one_run(model, tmp_path):
    """Rows of three environments, one of which fails now and then: each is measured apart, failures counted."""
    flaky = row("7") | {"agent_ref": {"name": "flaky_agent"}}
    choice = row("B") | {"agent_ref": {"name": "mcqa_simple_agent"}, "options": [{"A": "1"}, {"B": "2"}]}
    environments = {
        AGENT["name"]: {"verifier": "math"},
        "mcqa_simple_agent": {"verifier": "mcqa"},
        "flaky_agent": {"verifier": "poisoned:odd", "on_error": "skip", "max_skipped": "1"},
    }
    asked = request(tmp_path, model, [*SUMS[:4], flaky, flaky, choice], environments=environments, horizon=4, stop=4)
    assert run(asked) == 0, (tmp_path / "log").read_text()[-3000:]
    found = list(metrics(tmp_path / "metrics.jsonl").values())
    assert set().union(*(entry["rewards"] for entry in found)) == set(environments)
    assert {value for entry in found for value in [entry["rewards"].get("mcqa_simple_agent", 0)]} == {0}
    assert any(entry.get("skipped", {}).get("flaky_agent") for entry in found)
    assert {agent for entry in found for agent in entry.get("skipped", {})} == {"flaky_agent"}


def test_a_poisoned_environment_stops_the_run_by_name(model, tmp_path):
    environments = {AGENT["name"]: {"verifier": "poisoned:hang", "timeout": "1s"}}
    assert run(request(tmp_path, model, environments=environments)) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("nemoflow: error: environment of math_with_judge_simple_agent: it took more than 1s")
    assert checkpoints.states(tmp_path / "checkpoints") == {}


@pytest.mark.slow
def test_the_export_scores_what_the_trainer_reported(model, tmp_path):
    """The policy of ten steps, unmoved by a tiny learning rate, against 2,000 answers sampled from its export."""
    overrides = OVERRIDES | {"grpo.learning_rate": 1.0e-9, "grpo.per_device_train_batch_size": 200}
    settings = {"overrides": overrides, "environments": {AGENT["name"]: {"verifier": "poisoned:odd_length"}}}
    rows = [row("7")]
    assert run(request(tmp_path, model, rows, horizon=10, stop=10, wanted=[10], **settings)) == 0
    reported = [entry["reward"] for entry in metrics(tmp_path / "metrics.jsonl").values()]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "checkpoint").symlink_to(checkpoints.states(tmp_path / "checkpoints")[10])
    out = tmp_path / "out"
    out.mkdir()
    make({"engine": "trl", "dtype": "float32"}, {"state": tmp_path / "state", "tokenizer": model}, out, print, [])
    right = sum(odd_length(answer, rows[0]) for answer in sampled(out, rows[0], 2000)) / 2000
    both = 0.5 * (right + sum(reported) / 10)
    assert abs(right - sum(reported) / 10) < 4 * (both * (1 - both) * (1 / 2000 + 1 / 2000)) ** 0.5
    assert 0.05 < right < 0.95, "or equal shares would say little"


def sampled(export: Path, asked: dict, count: int) -> list[str]:
    """`count` answers sampled from an export by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    messages = asked["responses_create_params"]["input"]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    torch.manual_seed(0)
    answers = loaded.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=count)
    return tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
