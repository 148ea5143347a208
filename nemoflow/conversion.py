"""Conversions in a process of their own: they import torch and Megatron, which their callers need not."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from nemoflow.errors import NemoflowError
from nemoflow.launch import HERE, once

_ERROR = "nemoflow: error: "


def converting(module: str, about: Path, *arguments: Any, cluster: dict = HERE) -> None:
    """Run `python -m module arguments...`, which converts `about`; in the cluster's container, if it has one.

    Its error for people becomes a NemoflowError; what else it says goes to this process's stderr.
    """
    package = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    started = once([sys.executable, "-m", module, *map(str, arguments)], cluster)
    print("$", started, flush=True)
    child = subprocess.run(
        started.command, env=environment | started.environment, stderr=subprocess.PIPE, text=True, check=False
    )
    sys.stderr.write(child.stderr)
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        last = lines[-1] if lines else child.returncode
        raise NemoflowError(told[-1] if told else f"{about}: {module} failed: {last}")


def said(out: Path, main: Callable, *arguments: Any) -> None:
    """Run a conversion's main function, which writes to `out`; foreseeable errors are one line, exit code 1."""
    try:
        main(*arguments)
    except NemoflowError as error:
        sys.exit(f"{_ERROR}{error}")
    except Exception as error:
        # safetensors reports a full disk by an error of its own, in these words
        if os.strerror(errno.ENOSPC) not in str(error) and getattr(error, "errno", None) != errno.EDQUOT:
            raise
        sys.exit(f"{_ERROR}no space left where {out} is; free some and run again")


def load(checkpoint: Path) -> list:
    """The Megatron model of an iter_* directory, on this process's CPU; within a temporary_distributed_context.

    What its run_config.yaml says of kernels that this machine lacks is left out of the loaded model alone: a state
    that was trained on GPUs is read without one.
    """
    from megatron.bridge.training import model_load_save

    from nemoflow import cpu

    read = model_load_save.load_model_config

    def adapted(path: str) -> tuple:
        model, arguments = read(path)
        if cpu.needed():
            cpu.adapt_model(model)
        return model, arguments

    # load_megatron_model takes no settings but parallel sizes, and checks kernels as it builds the model
    with mock.patch.object(model_load_save, "load_model_config", adapted):
        return model_load_save.load_megatron_model(str(checkpoint), use_cpu_init=True, skip_temp_dist_context=True)


def save(model: list, out: Path, settings: Any = None) -> None:
    """Write a Megatron model as `out`, an iter_* directory without an optimizer.

    `settings`: what its run_config.yaml describes instead of the model as it was built here: the model provider of who
    trains it.
    """
    from megatron.bridge.training import model_load_save

    whole = out.with_name("saving")
    # save_megatron_model writes the settings that it finds in the model, with those of this machine's kernels
    found = model_load_save.get_model_config
    with mock.patch.object(model_load_save, "get_model_config", lambda part: settings or found(part)):
        model_load_save.save_megatron_model(model, whole)
    (saved,) = whole.glob("iter_*")
    saved.rename(out)
    shutil.rmtree(whole)
