"""Tests that need a GPU with Transformer Engine and mamba_ssm; without, each of them is skipped."""

import importlib.util
from pathlib import Path

import pytest
import torch


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    libraries = [name for name in ("transformer_engine", "mamba_ssm") if importlib.util.find_spec(name) is None]
    return f"no {' and no '.join(libraries)}" if libraries else None


def pytest_collection_modifyitems(items):
    missing = _missing()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        wanted = next((mark.args[0] for mark in item.iter_markers("gpus")), 1)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
        elif torch.cuda.device_count() < wanted:
            item.add_marker(pytest.mark.skip(reason=f"{torch.cuda.device_count()} GPU, {wanted} wanted"))
