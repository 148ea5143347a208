"""Going on from a checkpoint that other numbers of processes have saved, or the same dealt out in another way.

Weights can be loaded by any geometry; an optimizer by most, and what no geometry can is found here before any data or
GPU is touched. States of random number generators belong to the processes that had them: they stay behind where these
are others. Without dropout nothing in training draws from them, as the order of the data is an artifact.
"""

import os
from pathlib import Path

import yaml
from megatron.bridge.training.config import ConfigContainer
from torch.distributed.checkpoint import FileSystemReader

from nemoflow.errors import NemoflowError

SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}


def fit(config: ConfigContainer, load: Path) -> None:
    """Make `config`, final otherwise, load the optimizer and counters of the checkpoint `load`. In place.

    Raises NemoflowError where its optimizer cannot be loaded by the geometry that `config` says.
    """
    saved = yaml.safe_load((load / "run_config.yaml").read_text(encoding="utf-8"))
    before, now = _sizes(saved["model"]), _sizes(vars(config.model))
    distributed = saved["ddp"]["use_distributed_optimizer"]
    if distributed != config.ddp.use_distributed_optimizer:
        raise NemoflowError(
            f"{load}: saved with ddp.use_distributed_optimizer: {str(distributed).lower()}, which another setting "
            "cannot load; bring it back, or carry weights only"
        )
    if before != now:
        reshardable = saved["checkpoint"].get("dist_ckpt_optim_fully_reshardable")
        _check(load, before, now, reshardable or not distributed)
    if _random_states(load) != _processes(now):
        config.checkpoint.load_rng = False
        # "raise_all" would call the random states missing. A checkpoint of another model is refused by comparing
        # configurations.
        config.checkpoint.dist_ckpt_strictness = "raise_unexpected"


def _sizes(model: dict) -> dict[str, int]:
    found = {short: model.get(name) or 1 for short, name in SIZES.items()}
    if not model.get("num_moe_experts"):
        return found | {"EP": 1, "ETP": found["TP"]}
    if model.get(SIZES["ETP"]) is None:
        found["ETP"] = found["TP"]  # what Megatron takes where nothing is said
    return found


def _check(load: Path, before: dict[str, int], now: dict[str, int], reshardable: bool) -> None:
    def text(sizes):
        return " ".join(f"{name} {size}" for name, size in sizes.items())

    def apart(sizes):
        return sizes["EP"] > 1 or sizes["ETP"] != sizes["TP"]

    where = f"{load}: saved with {text(before)}, to be gone on from with {text(now)}: "
    if apart(before) != apart(now):
        # Megatron-Core then makes two optimizers, saved as a chain of two, which is not read as one
        raise NemoflowError(
            f"{where}the experts have an optimizer of their own exactly where EP is over 1 or ETP differs from TP, and "
            f"it cannot be {'joined with the other' if apart(before) else 'split off'}; choose sizes "
            f"{'with' if apart(before) else 'without'} one, or carry weights only"
        )
    if not reshardable:
        raise NemoflowError(
            f"{where}its distributed optimizer was saved without checkpoint.dist_ckpt_optim_fully_reshardable and "
            "needs the sizes it was saved with; bring them back, or carry weights only"
        )


def _random_states(checkpoint: Path) -> str | None:
    """How many processes have saved random states, as Megatron-Core spells it: 1.2 for PP 1 and TP 2."""
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name.rpartition("_")[2] for name in names if name.startswith("rng_state/shard_")}
    return found.pop() if len(found) == 1 else None


def _processes(sizes: dict[str, int]) -> str:
    """How many will look for theirs: with expert parallelism each of the data parallel ones has its own."""
    shape = [sizes["PP"], sizes["TP"]]
    if sizes["EP"] > 1:
        shape.append(int(os.environ.get("WORLD_SIZE", "1")) // (sizes["PP"] * sizes["TP"]))
    return ".".join(map(str, shape))
