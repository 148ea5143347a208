"""The configuration that NeMo-RL's script is given: a small file over the image's own example.

The example brings what each release requires; the file holds what the algorithm is, what the recipe says, and what
follows from the stage: model, data, environments, steps, directories, nodes.
"""

from pathlib import Path

from nemoflow.engines.nemo_rl import keys, releases
from nemoflow.engines.nemo_rl.checkpoints import MEGATRON
from nemoflow.engines.nemo_rl.geometry import EXPORTABLE
from nemoflow.errors import NemoflowError

FOREVER = 1_000_000
"""Epochs, or checkpoints: the workflow counts steps, and decides which checkpoints stay."""

SETUP_SECONDS = 1200
SAVE_SECONDS = 600
"""What NeMo-RL's clock, which starts with the first step, does not count, loading the model and starting vLLM; and how
long a save may take. Both are our own guesses: nothing of it was run."""


def render(request: dict, release: str, home: Path, stop: int, now: float) -> dict:
    """The overlay of a stage that trains up to step `stop`, for NeMo-RL in the directory `home`.

    request: see nemoflow/training.py. now: seconds since the epoch.

    Raises NemoflowError for an algorithm without a script, and data without a validation set.
    """
    algorithm, given = request["algorithm"], request["overrides"]
    environments = request.get("environments", {})
    entry = releases.RELEASES[release][algorithm]
    _, example = releases.example(release, algorithm, environments)
    gym = releases.is_gym(environments)
    made: dict = {}
    for key, value in entry.settings.items():
        _set(made, key, value)
    _set(made, "policy.tokenizer.chat_template", "default")  # that of the model, which examples replace
    if algorithm == "distillation":
        _set(made, "teacher.model_name", request["teacher"])
        _set(made, "teacher.tokenizer.name", request["teacher"])
    if entry.section in ("dpo", "rm"):
        _preferences(made, release, Path(request["preferences"]))
    elif gym:
        _gym(made, release, environments, Path(request["prompts"]))
        if algorithm in ("grpo", "dapo"):
            _set(made, "grpo.max_val_samples", None)
    else:
        _own(made, release, environments, Path(request["prompts"]))
    for key, value in given.items():
        if not key.startswith("nemo_rl."):
            _set(made, key, value)
    _set(made, "policy.model_name", request["model"])
    _set(made, "policy.tokenizer.name", request["model"])
    if start := from_megatron(request, release, made):
        _set(made, "checkpointing.pretrained_checkpoint", {"path": str(start), "format": "megatron_bridge"})
    scheduler = "policy.megatron_cfg.scheduler.lr_decay_iters"
    if scheduler not in given and _get(made, "policy.megatron_cfg.enabled"):
        # By default it ends with max_num_steps, which is where this run stops. Preference pairs count twice
        _set(made, scheduler, request["horizon"] * (2 if entry.section in ("dpo", "rm") else 1))
    _set(made, f"{entry.section}.max_num_steps", stop)
    _set(made, f"{entry.section}.max_num_epochs", FOREVER)
    _set(made, "checkpointing", _get(made, "checkpointing") or {})
    made["checkpointing"] |= {
        "enabled": True,
        "checkpoint_dir": request["checkpoints"],
        "metric_name": None,
        "keep_top_k": FOREVER,
        "save_period": min(request["save_interval"], stop),
        "checkpoint_must_save_by": saved_by(request["deadline"], now),
    }
    if algorithm != "rm" and _dtensor(made, keys.table(release)["defaults"][example]):
        # Its second worker can write whole models, which it does not by default; the first one cannot
        for key, value in EXPORTABLE.items():
            if _get(made, key) is None:
                _set(made, key, value)
    _set(made, "logger.log_dir", str(Path(request["scratch"]) / "logs"))
    _set(made, "logger.tensorboard_enabled", True)
    # Fewer where some nodes are for a model that judges
    _set(made, "cluster.num_nodes", given.get("cluster.num_nodes", request["resources"]["nodes"]))
    _set(made, "cluster.gpus_per_node", request["resources"]["gpus_per_node"])
    return {"defaults": str(home / example), **made}


def _dtensor(made: dict, below: dict) -> bool:
    own = _get(made, "policy.dtensor_cfg.enabled")
    return bool(below.get("policy.dtensor_cfg.enabled") if own is None else own)


def from_megatron(request: dict, release: str, settings: dict) -> Path | None:
    """The Megatron checkpoint to start from: the state that the export was made of, where release and backend can."""
    found = request.get("model_checkpoint")
    if release not in releases.FROM_MEGATRON or not found or not _get(settings, "policy.megatron_cfg.enabled"):
        return None
    for place in (Path(found), Path(found) / MEGATRON):
        if (place / "run_config.yaml").exists():
            return place
    return None


def saved_by(deadline: float | None, now: float) -> str | None:
    """When NeMo-RL saves and leaves, days:hours:minutes:seconds after its first step; None without an end.

    In a job shorter than twice the allowances, half of what is left.
    """
    if deadline is None:
        return None
    left = deadline - now
    seconds = max(60, round(max(left - SETUP_SECONDS - SAVE_SECONDS, left / 2)))
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"{day:02d}:{hour:02d}:{minute:02d}:{second:02d}"


def _set(made: dict, key: str, value) -> None:
    *sections, name = key.split(".")
    for section in sections:
        made = made.setdefault(section, {})
    made[name] = value


def _get(made: dict, key: str):
    found = made
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _files(directory: Path) -> tuple[str, str]:
    """The rows to train and to validate on. Raises NemoflowError when there are none to validate on."""
    train, valid = directory / "train.jsonl", directory / "validation.jsonl"
    for file in (train, valid):
        if not file.is_file() or not file.stat().st_size:
            raise NemoflowError(f"{file}: has no rows; NeMo-RL validates on some: give data a share `valid` above 0")
    return str(train), str(valid)


def _preferences(made: dict, release: str, directory: Path) -> None:
    train, valid = _files(directory)
    if release == "v0.7.0":
        of = {"dataset_name": "PreferenceDataset", "split": "train"}
        made["data"] = {"train": of | {"data_path": train}, "validation": of | {"data_path": valid}}
    else:
        made["data"] = {"dataset_name": "PreferenceDataset", "train_data_path": train, "val_data_path": valid}


def _gym(made: dict, release: str, environments: dict, directory: Path) -> None:
    train, valid = _files(directory)
    if release == "v0.7.0":
        made["data"] = {
            "train": {"data_path": train},
            "validation": {"data_path": valid},
            "default": {
                "dataset_name": "NemoGymDataset",
                "env_name": "nemo_gym",
                "processor": "nemo_gym_data_processor",
                "prompt_file": None,
                "system_prompt_file": None,
            },
        }
    else:
        made["data"] = {"train_jsonl_fpath": train, "validation_jsonl_fpath": valid}
    paths = list(dict.fromkeys(each["gym"] for each in environments.values()))
    made["env"] = {"should_use_nemo_gym": True, "nemo_gym": {"config_paths": [releases.POLICY_SERVER, *paths]}}
    for server in releases.EXAMPLE_SERVERS:
        if not any(f"/{server}/" in path for path in paths):
            made["env"]["nemo_gym"][server] = None  # settings of the example for a server that does not run here
    for key in ("async_engine", "expose_http_server"):
        _set(made, f"policy.generation.vllm_cfg.{key}", True)


def _own(made: dict, release: str, environments: dict, directory: Path) -> None:
    if not environments:
        raise NemoflowError(f"data.environments: is missing; write one of {', '.join(releases.OWN)}, or NeMo-Gym's")
    train, valid = _files(directory)
    how = releases.OWN[next(iter(environments.values()))["nemo_rl"]]
    rows = {"dataset_name": "ResponseDataset", "input_key": how["input_key"], "output_key": "expected_answer"}
    if release == "v0.7.0":
        rows["split"] = "train"
        made["data"] = {
            "train": rows | {"data_path": train},
            "validation": rows | {"data_path": valid},
            "default": {"env_name": how["env_name"], "processor": how["processor"], "prompt_file": None},
        }
    else:
        made["data"] = rows | {"train_data_path": train, "val_data_path": valid, "env_name": how["env_name"]}
        made["data"]["prompt_file"] = None
