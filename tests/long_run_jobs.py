"""What test_long_runs.py has done in a process with Megatron, by tests/megatron_server.py."""

import importlib.machinery
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import distributed

from nemoflow.engines.megatron_bridge import checkpoints, train
from nemoflow.engines.megatron_bridge.watch import Watch


def saved_late(directory: str) -> dict:
    """Checkpoint 8 is begun after its iteration, and whole when the loop has done iteration 11."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    place, metrics = Path(directory, "checkpoints"), Path(directory, "metrics.jsonl")
    for n in (4, 8):
        (place / f"iter_{n:07d}").mkdir(parents=True)
        for name in checkpoints.REQUIRED:
            (place / f"iter_{n:07d}" / name).write_bytes(b"12345")
    checkpoints.mark_complete(place / "iter_0000004")
    request = {"checkpoints": str(place), "metrics": str(metrics), "wanted": [], "stop": 20}
    request["keep"] = {"last": 2, "every": None}
    watch = Watch(request, 0, time.time())

    def context(step: int, **more):
        config = SimpleNamespace(train=SimpleNamespace(train_iters=20))
        state = SimpleNamespace(train_state=SimpleNamespace(step=step), cfg=config)
        return SimpleNamespace(state=state, user_state={}, **more)

    for step in range(7, 11):
        watch.on_train_step_end(context(step, loss_dict={"lm loss": 2.0}, grad_norm=1.0, skipped_iter=False))
        assert list(checkpoints.states(place)) == [4], "not before it is whole"
        if step == 7:
            time.sleep(0.2)
    (place / checkpoints.TRACKER).write_text("8")
    watch.on_checkpoint_save(context(11))
    watch.finish()
    distributed.destroy_process_group()
    return {
        "complete": list(checkpoints.states(place)),
        "saves": [json.loads(line) for line in metrics.read_text().splitlines()],
    }


def tracked(argument: dict) -> int:
    """Train {"request": file} with a W&B whose function `fails` does."""
    wandb = ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def called(name: str):
        def call(*args, **options):
            if name == argument["fails"]:
                raise ConnectionError(f"{name}: no route to host")
            print("wandb:", name, args[0] if args else options["name"])

        return call

    for name in ("init", "log", "finish"):
        setattr(wandb, name, called(name))
    sys.modules["wandb"] = wandb
    return train.main([argument["request"]])
