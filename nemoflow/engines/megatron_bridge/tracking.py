"""Where a run can be watched: TensorBoard files in the trajectory, and the trackers a recipe asks for.

W&B, MLflow and Comet are off unless the overrides logger.* name a project or experiment. None of them may stop
training: one that is not installed, cannot be reached or fails later costs a warning and its own curves.
"""

import functools
import importlib.util
import os
from pathlib import Path

WARNING = "nemoflow: warning: "

TRACKERS = {
    "wandb": ("wandb", "wandb_project", "wandb_exp_name"),
    "mlflow": ("mlflow", "mlflow_experiment", "mlflow_run_name"),
    "comet": ("comet_ml", "comet_project", "comet_experiment_name"),
}
"""Tracker -> its module, the setting in `logger` that turns it on, and the one with the run's name."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Environment, unless it is set: with MLflow's defaults all GPUs wait four minutes for a server that is not there."""


def place(config, directory: Path) -> None:
    """Have TensorBoard write to directory/tensorboard, and prepare the trackers that are asked for.

    `config` is a ConfigContainer. A tracker's run is named like `directory` unless the recipe names it. Checkpoints are
    not uploaded.
    """
    logger = config.logger
    logger.tensorboard_dir = None
    if _installed("tensorboard"):
        logger.tensorboard_dir = str(directory / "tensorboard")
    else:
        warn("tensorboard is not installed: no TensorBoard files are written; metrics.jsonl has the numbers")
    logger.log_timers_to_tensorboard = False
    logger.wandb_save_dir = logger.wandb_save_dir or str(directory)
    logger.mlflow_log_artifacts = False
    for tracker, (module, switch, name) in TRACKERS.items():
        if not getattr(logger, switch):
            continue
        if _installed(module):
            setattr(logger, name, getattr(logger, name) or directory.name)
            # All runs of a trajectory are one run of W&B's, whose ids have 64 characters at most
            for key, value in (PATIENCE | {"WANDB_RUN_ID": directory.name[-64:], "WANDB_RESUME": "allow"}).items():
                os.environ.setdefault(key, value)
        else:
            warn(f"{tracker}: logger.{switch} asks for it, and {module} is not installed: training goes on without it")
            turn_off(config, tracker)


def turn_off(config, tracker: str) -> None:
    """Unset all settings of a tracker: Megatron-Bridge takes any of them for a wish to use it."""
    for key in vars(config.logger):
        if key.startswith(f"{tracker}_") and key != "mlflow_log_artifacts":
            setattr(config.logger, key, None)


def guard(reached: int) -> None:
    """From now on a tracker that cannot start, or fails in a call, is warned of once and then left alone.

    Megatron-Bridge starts each on its first use, in a property of GlobalState, and calls what that returns. TensorBoard
    is told to forget what a run before wrote of iterations after `reached`, where this one goes on.
    """
    from megatron.bridge.training.state import GlobalState

    if _installed("tensorboard"):
        from torch.utils.tensorboard import writer

        writer.SummaryWriter = functools.partial(writer.SummaryWriter, purge_step=reached + 1)
    for tracker in TRACKERS:
        name = f"{tracker}_logger"
        start = vars(GlobalState)[name].fget
        setattr(GlobalState, name, property(functools.partial(_started, tracker, start)))


def _started(tracker: str, start, state):
    try:
        found = start(state)
    except Exception as error:
        warn(f"{tracker}: cannot be started ({_short(error)}): training goes on without it")
        turn_off(state.cfg, tracker)
        return None
    if found is None or isinstance(found, Quiet):
        return found
    found = Quiet(tracker, found)
    setattr(state, f"_{tracker}_logger", found)
    return found


class Quiet:
    """A tracker whose calls do not raise: the first that fails is told of, and none is made after it."""

    def __init__(self, tracker: str, inner):
        self._tracker, self._inner, self._failed = tracker, inner, False

    def __getattr__(self, name: str):
        found = getattr(self._inner, name)
        if not callable(found) or isinstance(found, type):
            return found

        @functools.wraps(found)
        def call(*args, **options):
            if self._failed:
                return None
            try:
                return found(*args, **options)
            except Exception as error:
                self._failed = True
                warn(f"{self._tracker}: {name} failed ({_short(error)}): training goes on without it")
                return None

        return call


def warn(text: str) -> None:
    print(f"{WARNING}{text}", flush=True)


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
