"""The engine nemo_rl: its table of settings, configurations, checks before submission, what it does around a script.

NEMO_RL_CHECKOUTS: a directory with a checkout of each release, by the release's name; then what is rendered is compared
with NeMo-RL's own code and examples. Nothing of NeMo-RL runs otherwise; a stand-in takes its place.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nemo_rl_standin
import pytest

from nemoflow import launch
from nemoflow.engines import nemo_rl
from nemoflow.engines.nemo_rl import checkpoints, keys, loader, metrics, overlay, releases, signs, survey
from nemoflow.engines.nemo_rl import train as program
from nemoflow.environments import Environment
from nemoflow.errors import NemoflowError
from nemoflow.stages import Recipe
from nemoflow.store import Store

CHECKOUTS = os.environ.get("NEMO_RL_CHECKOUTS")
RELEASES = list(releases.RELEASES)
ALL = [(release, algorithm) for release in RELEASES for algorithm in releases.RELEASES[release]]
GYM = {"mcqa_simple_agent": {"gym": "resources_servers/mcqa/configs/mcqa.yaml"}}
RECIPES = launch.CHECKOUT / "config/recipes"
MEGATRON = {"policy.megatron_cfg.enabled": True, "policy.dtensor_cfg.enabled": False}


def rows(directory: Path, *contents: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "validation.jsonl"):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in contents))
    return directory


def request_of(tmp_path: Path, algorithm: str = "grpo", **changes) -> dict:
    data = rows(tmp_path / "data", {"agent_ref": {"name": "mcqa_simple_agent"}})
    kind = "preferences" if algorithm in ("dpo", "rm") else "prompts"
    made = {
        "algorithm": algorithm,
        "overrides": {},
        "environments": GYM if kind == "prompts" else {},
        kind: str(data),
        "model": str(tmp_path / "model"),
        "teacher": str(tmp_path / "teacher"),
        "horizon": 40,
        "stop": 6,
        "wanted": [6],
        "wanted_directory": None,
        "save_interval": 3,
        "keep": {"last": 2, "every": None},
        "deadline": None,
        "checkpoints": str(tmp_path / "checkpoints"),
        "scratch": str(tmp_path / "scratch"),
        "metrics": str(tmp_path / "metrics.jsonl"),
        "config": str(tmp_path / "config"),
        "stop_file": str(tmp_path / "stop"),
        "resources": {"nodes": 2, "gpus_per_node": 8},
    }
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return made | changes


# -- the table of settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grpo.num_prompt_per_step", 8, "did you mean grpo.num_prompts_per_step?"),
        ("grpo.num_prompts_per_step", "8", "'8': a whole number is wanted"),
        ("grpo.num_prompts_per_step", 8.5, "8.5: a whole number is wanted"),
        ("grpo.num_prompts_per_step", True, "True: a whole number is wanted"),
        ("policy.megatron_cfg.optimizer.lr", "3e-6", "a number is wanted"),
        ("loss_fn.ratio_clip_max", None, "None: a number is wanted"),
        ("data.train_jsonl_fpath", "/x", "v0.4.0.nemotron_3_nano has it"),
    ],
)
def test_a_wrong_override_is_refused_with_what_is_right(key, value, said):
    with pytest.raises(NemoflowError, match=f"stages.*overrides.{key}: ") as error:
        nemo_rl.check({key: value}, "stages[rl].overrides")
    assert said in str(error.value)


def test_right_overrides_pass_and_those_of_servers_are_theirs():
    nemo_rl.check(
        {
            "grpo.num_prompts_per_step": 8,
            "loss_fn.ratio_clip_max": 1,
            "loss_fn.ratio_clip_c": None,
            "env.nemo_gym.code_gen.anything": 3,
            "policy.generation.vllm_kwargs.mamba_ssm_cache_dtype": "float32",
            "policy.hf_config_overrides.max_position_embeddings": 8,
            "nemo_rl.release": "v0.7.0",
        },
        "overrides",
    )


def test_overrides_of_another_algorithm_are_refused():
    with pytest.raises(NemoflowError, match=r"stages\[d\].overrides.grpo.seed: dpo has no section grpo; it has"):
        nemo_rl.check_algorithm("dpo", {"grpo.seed": 1}, "stages[d]")
    nemo_rl.check_algorithm("dpo", {"dpo.seed": 1}, "stages[d]")


def test_an_unknown_release_is_refused():
    with pytest.raises(NemoflowError, match=r"overrides.nemo_rl.release: '0.7': this engine knows v0.7.0 and v0.4"):
        nemo_rl.check({"nemo_rl.release": "0.7"}, "overrides")


def test_refused_overrides_exist():
    known = {key for release in RELEASES for key in keys.table(release)["keys"]}
    parents = {key.rpartition(".")[0] for key in known}
    assert {key for key in nemo_rl.REFUSED if key not in known and key not in parents} == set()


def test_settings_of_dapo_exist_in_every_release():
    for release in RELEASES:
        for key, value in releases.RELEASES[release]["dapo"].settings.items():
            assert keys.problem(release, "dapo", key, value) is None


def test_where_a_thing_lies_is_no_identity():
    outside = ("policy.megatron_cfg.tensor_model_parallel_size", "logger.wandb_enabled", "nemo_rl.release")
    assert all(map(nemo_rl.outside, (*outside, "policy.generation.vllm_cfg.gpu_memory_utilization")))
    inside = (
        "grpo.seed",
        "policy.megatron_cfg.optimizer.lr",
        "policy.train_global_batch_size",
        "loss_fn.ratio_clip_max",
    )
    assert not any(map(nemo_rl.outside, (*inside, "policy.generation.temperature", "env.nemo_gym.code_gen.x")))


# -- environments ----------------------------------------------------------------------------------------------------


def test_environments_of_one_kind():
    gym = Environment(agent="a", gym="resources_servers/mcqa/configs/mcqa.yaml")
    own, strange = Environment(agent="math", nemo_rl="math"), Environment(agent="s", nemo_rl="vlm")
    assert nemo_rl.environments({"mcqa": gym}, "w") == {"a": {"gym": gym.gym}}
    assert nemo_rl.environments({"math": own}, "w") == {"math": {"nemo_rl": "math"}}
    with pytest.raises(NemoflowError, match="w: NeMo-Gym's environments and NeMo-RL's own cannot judge in one stage"):
        nemo_rl.environments({"mcqa": gym, "math": own}, "w")
    with pytest.raises(NemoflowError, match="w: s has no `gym` in its file"):
        nemo_rl.environments({"s": strange}, "w")


# -- checks before submission ----------------------------------------------------------------------------------------


def laid_out(algorithm: str = "grpo", nodes: int = 32, gym: bool = True, **own) -> tuple[str, list[str]]:
    given = {key.replace("__", "."): value for key, value in own.items()}
    payload = {"algorithm": algorithm, "environments": GYM if gym else {}}
    return nemo_rl.geometry(None, given, {"nodes": nodes, "gpus_per_node": 8}, None, "rl", None, [], payload)


def test_the_published_layout_is_possible():
    assert laid_out() == ("TP2 PP2 CP4 EP8 DP16, vLLM TP4", [])


@pytest.mark.parametrize(
    ("nodes", "own", "said"),
    [
        (1, {}, "8 GPUs train, and a replica of TP2 x PP2 x CP4 takes 16"),
        (32, {"policy__train_global_batch_size": 1000}, "train_global_batch_size: 1000: is no multiple of 16"),
        (32, {"policy__train_global_batch_size": 4096}, "128 x num_generations_per_prompt 16 = 2048"),
        (
            32,
            {"policy__train_global_batch_size": 1024, "loss_fn__force_on_policy_ratio": True},
            "must be 2048, prompts x generations",
        ),
        (
            32,
            {"policy__megatron_cfg__expert_model_parallel_size": 7},
            "7 x expert_tensor_parallel_size 1 does not divide",
        ),
        (32, {"policy__generation__vllm_cfg__tensor_parallel_size": 3}, "does not divide the 256 GPUs that generate"),
        (32, {"policy__generation__vllm_cfg__expert_parallel_size": 6}, "must be a multiple of tensor_parallel_size 4"),
        (32, {"policy__generation__max_new_tokens": 60000}, "max_total_sequence_length 49152 is not trained on"),
        (32, {"policy__generation__vllm_cfg__async_engine": False}, "vllm_cfg.async_engine: must be true: NeMo-Gym"),
        (32, {"policy__dtensor_cfg__enabled": True}, "are both true; one of them trains"),
        (32, {"grpo__async_grpo__enabled": True}, "colocated.enabled: must be false with grpo.async_grpo"),
        (32, {"policy__generation__colocated__enabled": False}, "give how many of the 32 nodes generate"),
        (
            32,
            {"policy__megatron_cfg__tensor_model_parallel_size": 4, "policy__logprob_batch_size": 2},
            "policy.logprob_batch_size: 2: must equal policy.train_micro_batch_size 1",
        ),
        (32, {"grpo__batch_multiplier": 3}, "grpo.batch_multiplier: must be 1 without grpo.use_dynamic_sampling"),
    ],
)
def test_the_impossible_is_said_before_submission(nodes, own, said):
    _, problems = laid_out(nodes=nodes, **own)
    assert any(said in problem for problem in problems), problems


def test_generation_apart_from_training():
    own = {
        "policy__generation__colocated__enabled": False,
        "policy__generation__colocated__resources__num_nodes": 16,
        "grpo__async_grpo__enabled": True,
    }
    assert laid_out(**own) == ("TP2 PP2 CP4 EP8 DP8, vLLM TP4", [])


def test_pairs_need_no_generation():
    assert laid_out("dpo", nodes=1, gym=False) == ("DP8", [])


def test_an_algorithm_without_a_script_for_the_release():
    _, problems = laid_out("distillation", **{"nemo_rl__release": "v0.4.0.nemotron_3_nano"})
    assert problems == ["algorithm: distillation: NeMo-RL v0.4.0.nemotron_3_nano has no script for it with NeMo-Gym"]


# -- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "algorithm"), ALL)
def test_every_algorithm_over_a_stand_in(release, algorithm, tmp_path):
    home = nemo_rl_standin.install(tmp_path / "home", release)
    request = request_of(tmp_path, algorithm)
    if algorithm == "distillation" and release != "v0.7.0":
        request["environments"] = {"math": {"nemo_rl": "math"}}
    made = overlay.render(request, release, home, 6, 0.0)
    file = tmp_path / "overlay.yaml"
    file.write_text(json.dumps(made))
    content = program.resolved(file, release, algorithm)
    section = content[releases.RELEASES[release][algorithm].section]
    assert (section["max_num_steps"], content["checkpointing"]["save_period"]) == (6, 3)
    assert content["policy"]["model_name"] == request["model"]
    assert content["cluster"]["num_nodes"] == 2


def test_typos_and_holes_in_a_whole_configuration(tmp_path):
    home = nemo_rl_standin.install(tmp_path / "home", "v0.7.0")
    example = home / "examples/configs/dpo.yaml"
    content = json.loads(example.read_text())
    content["dpo"]["val_preiod"] = content["dpo"].pop("val_period")
    del content["policy"]["max_total_sequence_length"]
    example.write_text(json.dumps(content))
    file = tmp_path / "overlay.yaml"
    file.write_text(json.dumps(overlay.render(request_of(tmp_path, "dpo"), "v0.7.0", home, 6, 0.0)))
    with pytest.raises(NemoflowError) as error:
        program.resolved(file, "v0.7.0", "dpo")
    assert "dpo.val_preiod: NeMo-RL v0.7.0 has no such setting" in str(error.value)
    assert "policy.max_total_sequence_length: is missing" in str(error.value)


def test_only_a_megatron_backend_of_a_release_that_can_starts_from_megatron(tmp_path):
    home, state = Path("/home"), tmp_path / "state"
    state.mkdir()
    (state / "run_config.yaml").touch()

    def start(release: str, **own) -> dict | None:
        request = request_of(tmp_path, overrides=own, model_checkpoint=str(state))
        return overlay.render(request, release, home, 6, 0.0)["checkpointing"].get("pretrained_checkpoint")

    assert start("v0.7.0", **MEGATRON) == {"path": str(state), "format": "megatron_bridge"}
    assert start("v0.7.0") is None
    assert start("v0.4.0.nemotron_3_nano", **MEGATRON) is None
    (state / checkpoints.MEGATRON).mkdir(parents=True)
    (state / "run_config.yaml").rename(state / checkpoints.MEGATRON / "run_config.yaml")  # of NeMo-RL itself
    assert start("v0.7.0", **MEGATRON)["path"] == str(state / checkpoints.MEGATRON)


def test_the_schedule_ends_at_the_horizon_not_where_a_run_stops(tmp_path):
    def decay(algorithm: str, **own) -> int:
        made = overlay.render(request_of(tmp_path, algorithm, overrides=MEGATRON | own), "v0.7.0", Path("/h"), 6, 0.0)
        return made["policy"]["megatron_cfg"]["scheduler"]["lr_decay_iters"]

    assert decay("grpo") == 40
    assert decay("dpo") == 80
    assert decay("grpo", **{"policy.megatron_cfg.scheduler.lr_decay_iters": 7}) == 7


@pytest.mark.parametrize(
    ("left", "text"), [(14400, "00:03:30:00"), (3600, "00:00:30:00"), (10, "00:00:01:00"), (200000, "02:07:03:20")]
)
def test_it_saves_before_the_job_ends(left, text):
    assert overlay.saved_by(1000.0 + left, 1000.0) == text
    assert overlay.saved_by(None, 1000.0) is None


def test_data_without_validation_rows_is_refused(tmp_path):
    request = request_of(tmp_path)
    (tmp_path / "data/validation.jsonl").write_text("")
    with pytest.raises(NemoflowError, match=r"validation.jsonl: has no rows; NeMo-RL validates on some"):
        overlay.render(request, "v0.7.0", Path("/h"), 6, 0.0)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def step(place: Path, number: int, info: dict | None = None, name: str | None = None) -> Path:
    made = place / (name or f"step_{number}")
    (made / "policy/weights").mkdir(parents=True)
    (made / "policy/weights/model").write_text("x")
    (made / "training_info.json").write_text(json.dumps(info or {"total_steps": number}))
    return made


def test_a_step_is_complete_when_its_own_words_say_so(tmp_path):
    step(tmp_path, 3)
    step(tmp_path, 5, {"total_steps": 0, "current_step": 5})  # asynchronous
    step(tmp_path, 10)
    step(tmp_path, 7, {"total_steps": 6})
    step(tmp_path, 8, name="tmp_step_8")
    (step(tmp_path, 9) / "training_info.json").write_text('{"total_')
    shutil.rmtree(step(tmp_path, 4) / "policy/weights")
    assert list(checkpoints.states(tmp_path)) == [3, 5, 10]


def test_only_what_nothing_asks_for_is_deleted(tmp_path):
    for number in range(1, 11):
        step(tmp_path, number)
    assert checkpoints.prune(tmp_path, {"last": 2, "every": 4}, [3, 99]) == [1, 2, 5, 6, 7]
    assert list(checkpoints.states(tmp_path)) == [3, 4, 8, 9, 10]
    assert not list(tmp_path.glob("old_*"))


# -- measurements ----------------------------------------------------------------------------------------------------


def test_signs():
    healthy = [
        {"iteration": n, "reward": 0.3 + n / 100, "mismatch": 1.005, "kl": 0.01, "entropy": 1.0, "rewards": {"a": 0.5}}
        for n in range(60)
    ]
    assert signs.signs(healthy) == {}

    def changed(count: int, **values) -> dict[str, str]:
        return signs.signs([*healthy[:-count], *({**each, **values} for each in healthy[-count:])])

    assert "differ by 3.0%" in changed(3, mismatch=1.03)["mismatch"]
    assert changed(2, mismatch=1.03) == {}
    assert "leaps to 0.2000" in changed(1, kl=0.2)["kl"]
    assert "entropy collapses: 0.100" in changed(20, entropy=0.1)["entropy"]
    assert "a gets worse while the mean gets better" in changed(20, rewards={"a": 0.3})["rewards.a"]


def test_entries_by_what_nemo_rl_calls_its_measurements():
    read = metrics.entry_of(4, {"train/reward": 0.5, "train/x/reward/mean": 0.25, "validation/total_reward/mean": 0.75})
    assert read == {
        "iteration": 4,
        "reward": 0.5,
        "rewards": {"x": 0.25},
        "validation": {"val:total_reward/mean": 0.75},
    }
    assert metrics.entry_of(4, {"validation-default/loss": 2.0})["validation"] == {"val:validation-default_loss": 2.0}
    assert metrics.entry_of(0, {"timing/setup/x": 1.0}) is None


def test_the_best_state_by_validation():
    answers = [
        {"iteration": n, "validation": {"val:accuracy": v}} for n, v in ((2, 0.5), (4, 0.8), (6, 0.8), (8, None))
    ]
    assert metrics.best([*answers, {"iteration": 5, "loss": 1.0}], [2, 4, 5, 6, 8]) == 4
    assert metrics.best(answers, [5, 8]) is None
    pairs = [{"iteration": n, "validation": {"val:validation-default_loss": v}} for n, v in ((2, 0.5), (4, 0.3))]
    assert metrics.best(pairs, [2, 4]) == 4


# -- around the script -----------------------------------------------------------------------------------------------


class Stage:
    """A stage over a stand-in of NeMo-RL, trained by the real program."""

    def __init__(self, tmp_path: Path):
        self.home = nemo_rl_standin.install(tmp_path / "home", "v0.7.0")
        self.request = request_of(tmp_path)
        self.directory = tmp_path

    def command(self, **changes) -> list[str]:
        file = self.directory / "request.json"
        file.write_text(json.dumps(self.request | changes))
        return nemo_rl.command(file)

    def environment(self, **steer) -> dict[str, str]:
        more = {"NEMO_RL": str(self.home), "NEMOFLOW_POLL": "0.1", "STANDIN": json.dumps(steer)}
        return os.environ | more | {"PYTHONPATH": str(launch.CHECKOUT)}

    def run(self, steer: dict | None = None, **changes) -> tuple[int, str]:
        done = subprocess.run(
            self.command(**changes),
            env=self.environment(**(steer or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout

    @property
    def states(self) -> list[int]:
        return list(checkpoints.states(self.directory / "checkpoints"))

    @property
    def metrics(self) -> dict[int, dict]:
        found: dict[int, dict] = {}
        for line in (self.directory / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["iteration"], {}).update(entry)
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_stage_reaches_its_states_and_measures(stage: Stage):
    code, said = stage.run(wanted=[4, 6], keep={"last": 1, "every": None})
    assert code == 0, said
    assert stage.states == [4, 6]  # 3 is an interval's, and nothing asks for it; 4 is none's, and was run up to
    assert "stand-in: from 0 to 4" in said
    assert "stand-in: from 4 to 6" in said
    assert sorted(stage.metrics) == [1, 2, 3, 4, 5, 6]
    last = stage.metrics[6]
    assert last["reward"] == pytest.approx(0.6)
    assert last["rewards"] == pytest.approx({"mcqa_simple_agent": 0.3})
    assert last["validation"] == {"val:accuracy": 0.75}


def test_the_best_state_stays_beside_the_last(stage: Stage):
    code, said = stage.run(stop=10, wanted=[10], save_interval=2, keep={"last": 1, "every": None})
    assert code == 0, said
    assert stage.states == [2, 10]  # by val:accuracy 0.75, 0.25, 0.75, ...


def test_exit_code_0_when_time_was_up_is_not_done(stage: Stage):
    code, said = stage.run({"time_up_after": 2})
    assert (code, stage.states) == (0, [2])
    assert "nemoflow: unfinished: step 2 of 6" in said
    code, said = stage.run()
    assert (code, stage.states[-1]) == (0, 6)
    assert "from 2 to 6" in said
    assert "unfinished" not in said


def test_time_up_before_anything_was_saved_is_an_error(stage: Stage):
    code, said = stage.run({"time_up_after": 1, "saves_nothing": True})
    assert code == 1
    assert "nemoflow: error: " in said
    assert "saved nothing after step 0 of 6" in said


def test_a_script_that_fails(stage: Stage):
    code, said = stage.run({"fail_at": 4})
    assert code == 1
    assert "the stand-in fails" in said
    assert stage.states == [3]


def test_killed_and_gone_on_with(stage: Stage):
    child = subprocess.Popen(
        stage.command(), env=stage.environment(seconds=0.3), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 60
        while not stage.states and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert stage.states == [3]
    step(stage.directory / "checkpoints", 5, name="tmp_step_5")  # a save that the kill met
    code, said = stage.run()
    assert code == 0, said
    assert "from 3 to 6" in said
    assert stage.states == [3, 6]
    assert sorted(stage.metrics) == [1, 2, 3, 4, 5, 6]


def test_other_settings_than_at_the_first_start_are_refused(stage: Stage):
    assert stage.run()[0] == 0
    code, said = stage.run(stop=9, wanted=[9], overrides={"grpo.seed": 7})
    assert code == 1
    assert "this stage was started with other settings: grpo.seed was 1, is 7" in said
    assert stage.run(stop=9, wanted=[9], resources={"nodes": 1, "gpus_per_node": 8})[0] == 0


def test_another_release_than_the_image_has_is_refused(stage: Stage):
    code, said = stage.run(overrides={"nemo_rl.release": "v0.4.0.nemotron_3_nano"})
    assert code == 1
    assert f"v0.4.0.nemotron_3_nano is NeMo-RL 0.5.0rc0, and {stage.home} has 0.7.0" in said


def test_no_nemo_rl_there(stage: Stage):
    shutil.rmtree(stage.home)
    code, said = stage.run()
    assert (code, "no NeMo-RL is there" in said) == (1, True)


def test_a_row_of_another_environment(stage: Stage):
    rows(stage.directory / "data", {"agent_ref": {"name": "mcqa_simple_agent"}}, {"agent_ref": {"name": "other"}})
    code, said = stage.run()
    assert code == 1
    assert "train.jsonl:2: agent_ref.name: 'other' is none of the stage's environments: mcqa_simple_agent" in said


def test_a_sick_sign_is_said_once(stage: Stage):
    code, said = stage.run({"mismatch": 1.5})
    assert code == 0
    assert said.count("nemoflow: warning: ") == 1
    assert "step 3: generation and training disagree" in said
    assert stage.metrics[3]["signs"] == ["mismatch"]


def test_a_conversion_that_was_killed_is_made_anew(stage: Stage):
    run = program.Run(stage.request, stage.home, "v0.7.0", 6)
    half = Path(run.environment()["NRL_MEGATRON_CHECKPOINT_DIR"]) / "model" / "iter_0000000"
    half.mkdir(parents=True)
    run.environment()
    assert not half.exists()
    half.mkdir(parents=True)
    (run.cache / "complete").touch()
    run.environment()
    assert half.exists()


def test_asked_to_stop(stage: Stage):
    child = subprocess.Popen(
        stage.command(), env=stage.environment(seconds=0.5), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while not stage.states and time.monotonic() < end:
        time.sleep(0.05)
    (stage.directory / "stop").touch()
    said, _ = child.communicate(timeout=60)
    assert (child.returncode, stage.states) == (0, [3])
    assert "nemoflow: unfinished: step 3 of 6" in said


# -- real checkouts --------------------------------------------------------------------------------------------------


def checkout(release: str) -> Path:
    if not CHECKOUTS:
        pytest.skip("needs NEMO_RL_CHECKOUTS, a directory with a checkout of each release")
    return Path(CHECKOUTS) / release


def test_the_table_is_what_the_checkouts_say():
    places = {release: checkout(release) for release in RELEASES}
    assert survey.text(places) == survey.TABLE.read_text(encoding="utf-8")


def theirs(home: Path):
    """NeMo-RL's own module that reads configurations; it needs omegaconf and hydra alone."""
    spec = importlib.util.spec_from_file_location("their_config", home / "nemo_rl/utils/config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("release", "algorithm"), ALL)
def test_what_is_rendered_resolves_as_nemo_rl_resolves_it(release, algorithm, tmp_path):
    home = checkout(release)
    for environments in ({}, GYM, {"math": {"nemo_rl": "math"}}):
        if bool(environments) == (algorithm in ("dpo", "rm")):
            continue
        if releases.is_gym(environments) and releases.RELEASES[release][algorithm].gym is None:
            continue
        own = MEGATRON if algorithm in ("grpo", "dapo", "dpo") else {}
        request = request_of(tmp_path, algorithm, environments=environments, overrides=own)
        file = tmp_path / "overlay.yaml"
        file.write_text(json.dumps(overlay.render(request, release, home, 6, 0.0)))
        script, _ = releases.example(release, algorithm, environments)
        assert (home / script).is_file()
        ours = program.resolved(file, release, algorithm)  # and nothing is wrong with it
        from omegaconf import OmegaConf

        assert ours == OmegaConf.to_container(theirs(home).load_config(file), resolve=True)


def test_what_an_example_lacks_for_another_backend_is_named(tmp_path):
    home = checkout("v0.7.0")
    file = tmp_path / "overlay.yaml"
    request = request_of(tmp_path, "rm", overrides=MEGATRON)
    file.write_text(json.dumps(overlay.render(request, "v0.7.0", home, 6, 0.0)))
    with pytest.raises(NemoflowError, match=r"policy.megatron_cfg.expert_model_parallel_size: is missing"):
        program.resolved(file, "v0.7.0", "rm")


def test_every_example_resolves_as_nemo_rl_resolves_it():
    home = checkout("v0.7.0")
    from omegaconf import OmegaConf

    module, count = theirs(home), 0
    for file in sorted([*(home / "examples/configs").glob("*.yaml"), *(home / "examples/nemo_gym").glob("*.yaml")]):
        content = OmegaConf.load(file)
        if "policy" in content or "defaults" in content:
            assert loader.load(file) == module.load_config(file), file
            count += 1
    assert count > 25


def test_the_table_of_the_documentation():
    text = (launch.CHECKOUT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert "\n".join(survey.rows()) in text


def test_nothing_of_it_needs_torch():
    code = "import sys, nemoflow.engines.nemo_rl.train; print({'torch', 'pydantic', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano3(tmp_path_factory) -> Recipe:
    return Recipe("nano3-rl", [RECIPES], Store(tmp_path_factory.mktemp("store")), unlocked=True)


def test_the_stages_of_nano3_are_laid_out(nano3: Recipe):
    found = {name: nano3.geometry(nano3.stages[name]) for name in ("rlvr", "rlhf", "dpo")}
    assert found == {
        "rlvr": ("TP2 PP2 CP4 EP8 DP16, vLLM TP4", []),
        "rlhf": ("TP2 PP2 CP4 EP8 DP16, vLLM TP4", []),
        "dpo": ("TP2 CP4 EP8 DP8", []),
    }


def test_nano3_goes_from_stage_to_stage_by_exports(nano3: Recipe):
    before = "sft"
    for name in ("rlvr", "rlhf", "dpo"):
        export = nano3.store.load(nano3.stages[name].stage.payload["init"]["export"])
        assert export.payload["of"]["trajectory"] == nano3.stages[before].stage.identity
        before = name
    assert nano3.view("hf_export")[""].stage.payload["of"]["at"] == 150


def test_an_image_or_a_layout_changes_no_identity(nano3: Recipe):
    payload = nano3.stages["rlvr"].stage.payload
    assert not [key for key in payload["overrides"] if "parallel" in key or key.startswith(("cluster", "nemo_rl"))]
    assert payload["overrides"]["policy.megatron_cfg.optimizer.lr"] == 3e-6
    assert len(payload["environments"]) == 6


@pytest.mark.parametrize("name", ["rlvr", "rlhf", "dpo"])
def test_what_nano3_gives_nemo_rl_is_what_it_takes(nano3: Recipe, name, tmp_path):
    home, stage = checkout("v0.7.0"), nano3.stages[name]
    payload = stage.stage.payload
    request = request_of(tmp_path, payload["algorithm"], overrides=stage.overrides)
    request["environments"] = payload.get("environments", {})
    file = tmp_path / "overlay.yaml"
    file.write_text(json.dumps(overlay.render(request, "v0.7.0", home, 6, 0.0)))
    content = loader.flat(program.resolved(file, "v0.7.0", payload["algorithm"]))
    assert {key: content[key] for key in stage.overrides} == stage.overrides
