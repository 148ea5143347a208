"""What test_snapshots.py runs beside Megatron, in a fork of its server: configurations as the jobs build them."""

import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

from nemoflow import cpu
from nemoflow.stages import Recipe, Trained
from nemoflow.store import Store
from nemoflow.training import Trajectory


def configurations(job: dict) -> dict[str, dict]:
    """Stage -> section.key -> value, of each training stage of `recipe`: what its job would give to Megatron-Bridge.

    Each stage is at its first start. `tokenizer` stands for the recipe's, one prefix for its blend, empty files for
    packs. The device shim is off, and a library that a recipe function looks for before it asks for a fused kernel is
    there.
    """
    from nemoflow.engines.megatron_bridge import config

    sys.modules["fused_weight_gradient_mlp_cuda"] = ModuleType("fused_weight_gradient_mlp_cuda")
    scratch, found = Path(job["scratch"]), {}
    recipe = Recipe(job["recipe"], [Path(job["directory"])], Store(scratch / "artifacts"), unlocked=True)
    with mock.patch.object(cpu, "needed", return_value=False):
        for name, trained in recipe.stages.items():
            request = requested(trained, scratch, Path(job["tokenizer"]))
            os.environ["WORLD_SIZE"] = str(trained.spec.resources.nodes * trained.spec.resources.gpus_per_node)
            load = Path(request["init"]["checkpoint"]) if request["init"] else None
            built = config.build(request, load)
            save(built, scratch / name / "checkpoint")
            flat, own = config.flatten(config.resolved(built)), trained.stage.directory.name
            found[name] = {key: "trajectory" if value == own else value for key, value in flat.items()}
    return found


def save(config, checkpoint: Path) -> None:
    """Of the checkpoint that a stage ends with, what the next one's configuration follows from."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    from nemoflow.engines.megatron_bridge import reshard

    checkpoint.mkdir()
    config.to_yaml(str(checkpoint / "run_config.yaml"))
    shape = reshard._processes(reshard._sizes(vars(config.model)))
    names = {f"rng_state/shard_0_{shape}": BytesStorageMetadata()}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Metadata(names)))


def requested(trained: Trained, scratch: Path, tokenizer: Path) -> dict:
    """The request of a stage's job, by the job's own code."""
    spec, data = trained.spec, scratch / trained.spec.name / "data"
    (data / "blend").mkdir(parents=True)
    for split in ("training", "validation"):
        (data / f"{split}.idx.parquet").touch()
    weights = {split: [[f"../../merge/source/{split}-00000", "1"]] for split in ("train", "valid")}
    (data / "blend/weights.json").write_text(json.dumps(weights))
    inputs = {"data": data, "tokenizer": tokenizer}
    if spec.init:
        inputs["init"] = scratch / spec.init.stage
    launch = spec.model_dump(include={"save_interval", "resources", "keep", "guard"})
    launch["overrides"] = {k: v for k, v in trained.overrides.items() if trained.engine.outside(k)}
    log = Path("attempts/1.log")
    job = SimpleNamespace(stage=trained.stage, at=trained.until, launch=launch, input=inputs.get, log=log)
    return Trajectory(job).request()
