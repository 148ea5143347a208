"""GRPO, DAPO, DPO and reward models with TRL, without a GPU: python -m nemoflow.engines.trl.train REQUEST.json

Trains from the newest complete checkpoint, or from the model, up to the step asked for. What stands in the request:
see `Request`. The last line on standard error says what went wrong, when it is something a person can mend.
"""

import ctypes
import dataclasses
import difflib
import errno
import json
import os
import random
import shutil
import sys
import time
import typing
from pathlib import Path
from typing import Any

from nemoflow.engines.trl import REFUSED, SECTIONS, SET, checkpoints, pairs, rollouts
from nemoflow.errors import NemoflowError

# Before torch is imported. PASSIVE: threads that wait sleep, or a busy machine is several times slower.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE")

_OUTSIDE = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_dir",
    "logging_steps",
    "output_dir",
    "run_name",
    "save_steps",
}
"""Settings that may differ when a stage is resumed: none of them defines the result."""

_CHUNK = 16
"""Length of the chunks of Mamba's scan. The result does not depend on it but for rounding. transformers' torch path
pads every sequence to a multiple of it and does work proportional to it: measured for prompts of 25 tokens, a step
with chunks of 16 takes half the time of one with 32, and with 8 no less than with 16."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the driver asks for.

    model: directory of an HF export. prompts, preferences: directory with train.jsonl, rows in NeMo-Gym's layout or
    pairs of answers. environments: agent -> what judges its rows (nemoflow/environments/judge.py). overrides:
    SECTION.NAME -> value, see SECTIONS. horizon: steps of the learning-rate schedule. stop: step to leave
    after. wanted, wanted_directory: steps whose states are kept, and where files named after steps ask for more.
    save_interval: steps between checkpoints. checkpoints: directory. metrics: file of one JSON line per step. config:
    file with the resolved settings.
    """

    model: Path
    horizon: int
    stop: int
    checkpoints: Path
    metrics: Path
    config: Path
    prompts: Path | None = None
    preferences: Path | None = None
    environments: dict = dataclasses.field(default_factory=dict)
    overrides: dict = dataclasses.field(default_factory=dict)
    wanted: list[int] = dataclasses.field(default_factory=list)
    wanted_directory: Path | None = None
    save_interval: int | None = None
    algorithm: str = "grpo"

    @classmethod
    def read(cls, file: Path) -> "Request":
        """The request in a JSON file; keys of other engines are ignored."""
        data = json.loads(file.read_text(encoding="utf-8"))
        paths = {"model", "prompts", "preferences", "checkpoints", "metrics", "config", "wanted_directory"}
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: Path(v) if k in paths and v else v for k, v in data.items() if k in known})

    def saves_at(self, step: int) -> bool:
        """Whether the state after `step` is kept."""
        asked = self.wanted_directory is not None and (self.wanted_directory / str(step)).exists()
        return (
            asked
            or step in self.wanted
            or step == self.stop
            or (self.save_interval is not None and step % self.save_interval == 0)
        )


def order(count: int, seed: int, needed: int) -> list[int]:
    """Indices of `needed` prompts: passes over all `count` of them, each pass shuffled anew.

    The whole order is fixed by the seed and so known at any step, which TRL's own sampler is not after a resume.
    """
    shuffler = random.Random(seed)
    found: list[int] = []
    while len(found) < needed:
        found += shuffler.sample(range(count), count)
    return found[:needed]


def settings(request: Request) -> Any:
    """TRL's configuration for a request. Raises NemoflowError for an override that is unknown, refused or ill-typed."""
    import trl

    main = SECTIONS[request.algorithm][0]
    kind = {"grpo": trl.GRPOConfig, "dpo": trl.DPOConfig, "rm": trl.RewardConfig}[main]
    types = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    given = {}
    for key, value in request.overrides.items():
        section, _, name = key.partition(".")
        if key == "dapo.overlong_cache":
            _typed(key, value, int)
            continue
        if section != main or name not in known:
            close = difflib.get_close_matches(name or section, sorted(known), 1, cutoff=0.5)
            hint = f"; did you mean {main}.{close[0]}?" if close else f"; write {main}.NAME, a field of {kind.__name__}"
            raise NemoflowError(f"overrides: {key}: there is no such setting{hint}")
        if key in REFUSED:
            raise NemoflowError(f"overrides: {key}: a recipe cannot set this: {REFUSED[key]}")
        given[name] = _typed(key, value, types[name])
    import torch

    fixed = {
        "output_dir": str(request.checkpoints),
        "max_steps": request.horizon,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",  # the callback below says when
        "disable_tqdm": True,
    }
    defaults: dict[str, Any] = {"gradient_checkpointing": False}
    if main == "grpo":
        defaults["max_completion_length"] = 64
        fixed["shuffle_dataset"] = False  # the rows come in their order
    else:
        fixed["train_sampling_strategy"] = "sequential"  # likewise
    try:
        return kind(**defaults | SET[request.algorithm] | given | fixed)
    except (ValueError, TypeError) as error:
        raise NemoflowError(f"overrides: {error}") from None


def _typed(key: str, value: Any, wanted: Any) -> Any:
    """`value`, if it is of the type that a setting has; integers pass as floats. Raises NemoflowError otherwise."""
    kinds = [t for t in (typing.get_args(wanted) or (wanted,)) if isinstance(t, type)]
    simple = {bool, int, float, str, type(None), dict, list}
    if not kinds or not simple.issuperset(kinds):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in kinds)
        raise NemoflowError(f"overrides: {key}: {value!r} is {type(value).__name__}; {names} is wanted")
    return value


def check_resolved(file: Path, config: Any) -> None:
    """Write the resolved settings at the first start; later refuse to go on with others.

    Raises NemoflowError naming every setting that differs.
    """
    resolved = json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k not in _OUTSIDE}, default=str))
    if not file.exists():
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(resolved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(file)
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    differ = sorted(k for k in stored.keys() | resolved.keys() if stored.get(k) != resolved.get(k))
    if differ:
        shown = ", ".join(f"{k} was {stored.get(k)!r}, is {resolved.get(k)!r}" for k in differ)
        raise NemoflowError(f"{file}: this stage was started with other settings: {shown}; raise the stage's version")


def keep_memory() -> None:
    """Have the C library keep freed memory instead of returning it to the system.

    The scan of Mamba allocates and frees tens of megabytes at a time, and getting each anew cost 30% of a step, for the
    0.6 GB it saved. Only glibc has this, and elsewhere nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks above this size are mapped, and unmapped when freed
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory above this size is given back


def trainer(request: Request, start: Path | None) -> Any:
    """TRL's trainer of a request, on the model of checkpoint `start` or else on the one the stage starts from."""
    import torch
    import trl
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    config = settings(request)
    check_resolved(request.config, config)

    main = SECTIONS[request.algorithm][0]
    base = {"grpo": trl.GRPOTrainer, "dpo": trl.DPOTrainer, "rm": trl.RewardTrainer}[main]

    class Trainer(base):
        def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
            """Nothing: the model was made from the checkpoint. The inherited method would match tensors by their
            published names, of which the model in memory has few, and go on with what it had."""

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None: an export writes the card."""

    class Follow(TrainerCallback):
        """Measures each step, keeps the wanted states, and ends the run at `stop`: once it is kept, so that what a
        checkpoint holds does not depend on where the run ended."""

        def on_step_begin(self, args, state, control, **_):  # noqa: ARG002
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **_):  # noqa: ARG002
            self.seconds = time.perf_counter() - self.begun
            control.should_log = True
            control.should_save = request.saves_at(state.global_step)
            return control

        def on_log(self, args, state, control, logs, **_):  # noqa: ARG002
            if "loss" in logs:
                write_metrics(metrics, state.global_step, logs, self.seconds, made.measured(logs))
            state.log_history.clear()  # it goes into every checkpoint, seconds and all

        def on_save(self, args, state, control, **_):  # noqa: ARG002
            saved = request.checkpoints / f"{checkpoints.PREFIX}{state.global_step}"
            (saved / "training_args.bin").unlink()  # holds paths; the settings are in `config`
            checkpoints.mark(saved)
            control.should_training_stop = state.global_step >= request.stop
            return control

    try:
        tokenizer = AutoTokenizer.from_pretrained(request.model, padding_side="left", local_files_only=True)
        loaded = {"dtype": torch.float32, "use_mamba_kernels": False, "local_files_only": True}
        extra: dict[str, Any] = {}
        if main == "rm":
            known = AutoConfig.from_pretrained(request.model, local_files_only=True)
            torch.manual_seed(config.seed)  # for the score, which no checkpoint before has
            model = pairs.sequence_classifier(known).from_pretrained(start or request.model, num_labels=1, **loaded)
        else:
            model = AutoModelForCausalLM.from_pretrained(start or request.model, **loaded)
        if main == "dpo":
            extra["ref_model"] = AutoModelForCausalLM.from_pretrained(request.model, **loaded)
    except (OSError, ValueError) as error:
        raise NemoflowError(f"{start or request.model}: no model that can be loaded: {error}") from None
    model.config._name_or_path = str(request.model)  # where TRL takes the reference model of the KL term from
    metrics = request.metrics.open("a", encoding="utf-8")
    make = rollouts.make if main == "grpo" else pairs.make
    made = make(Trainer, request, config, order, model=model, processing_class=tokenizer, callbacks=[Follow()], **extra)
    for policy in (made.model, getattr(made, "ref_model", None)):
        for module in policy.modules() if policy is not None else ():
            if hasattr(module, "chunk_size"):
                module.chunk_size = min(module.chunk_size, _CHUNK)
    return made


def write_metrics(file: typing.TextIO, step: int, logs: dict, seconds: float, measured: dict) -> None:
    """Append one line for a step. `kl` is null without a KL term; `measured` is what the algorithm adds."""
    entry = {
        "iteration": step,
        "loss": logs["loss"],
        "kl": logs.get("kl"),
        "entropy": logs.get("entropy"),
        "grad_norm": logs.get("grad_norm"),
        "lr": logs["learning_rate"],
        "seconds": round(seconds, 4),
    }
    file.write(json.dumps(entry | measured) + "\n")
    file.flush()


def train(request: Request) -> None:
    """Train up to `request.stop` and leave its checkpoint, complete.

    Raises NemoflowError for settings, prompts or a model that cannot be used.
    """
    if request.algorithm not in SECTIONS:
        raise NemoflowError(f"algorithm: {request.algorithm!r} is not one of this engine: {', '.join(SECTIONS)}")
    if request.stop > request.horizon:
        raise NemoflowError(f"until: {request.stop} is past the horizon of the schedule, {request.horizon}")
    request.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoints.remove_incomplete(request.checkpoints)
    complete = checkpoints.states(request.checkpoints)
    reached = max((step for step in complete if step <= request.stop), default=0)
    if reached == request.stop:
        return
    start = complete.get(reached)
    made = trainer(request, start)
    try:
        made.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        made.close()


def main(file: Path) -> None:
    request = Request.read(file)
    keep_memory()
    try:
        train(request)
    except NemoflowError as error:
        sys.exit(f"nemoflow: error: {error}")
    except Exception as error:
        # safetensors reports a full disk in these words, torch in none that say so: there the disk is asked
        full = os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) == errno.EDQUOT
        if not full and shutil.disk_usage(request.checkpoints).free >= 2**20:
            raise
        sys.exit(f"nemoflow: error: no space left where {request.checkpoints} is; free some and run again")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
