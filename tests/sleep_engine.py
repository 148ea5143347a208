"""A trainer for tests of the graph: a file per checkpoint and a line of metrics per iteration, and no model.

The loss is a recurrence whose state is in the checkpoint, so that a run which goes on from another state shows it.
The recipe's overrides steer it, without being identity: sleep.seconds per iteration, sleep.fail_at an iteration to
fail at, sleep.end_at one to end at without a word, sleep.bytes the size of a checkpoint, sleep.save_seconds how long a
save takes, sleep.watch whether it minds the end of its job as Megatron's trainer does. Asked to stop, it saves, says so
and ends. As several processes it is in step after each iteration.
"""

import json
import os
import sys
import time
from pathlib import Path

from nemoflow.engines.megatron_bridge.limits import Clock

STEERED = ("seconds", "fail_at", "end_at", "bytes", "save_seconds", "watch", "padding")

STARTS_FROM = "checkpoint"
CARRIES = ("all", "weights", "weights+optimizer")
REFUSED = {"sleep.until": "write the stage's until"}


def check(overrides, where):
    pass


def check_algorithm(algorithm, overrides, where):
    pass


def environments(found, where):  # noqa: ARG001
    return {each.agent: {"settings": each.settings} for each in found.values()}


def outside(key):
    return key in {f"sleep.{name}" for name in STEERED}


def tokens_per_iteration(overrides):
    return overrides.get("sleep.tokens")


def schedule_horizon(overrides):
    return overrides.get("sleep.horizon")


def index_overrides(overrides):
    return {k: v for k, v in overrides.items() if k in ("train.global_batch_size", "sleep.length")}


def sequence_length(overrides):
    return overrides.get("sleep.length", 1)


def index_command(request: Path):
    return [sys.executable, "-m", "sleep_engine", "index", str(request)]


def padding(overrides):
    return overrides.get("sleep.padding", 1)


def states(checkpoints: Path):
    return {int(p.name): p for p in checkpoints.glob("[0-9]*") if (p / "weights").exists()}


def command(request: Path):
    return [sys.executable, "-m", "sleep_engine", str(request)]


def loss_after(loss: float, n: int) -> float:
    """The loss of iteration n, from that of the iteration before."""
    return 10.0 if n == 1 else loss * (n - 1) / n


def main(request: dict):
    started = time.time()
    settings = {k.removeprefix("sleep."): v for k, v in request["overrides"].items()}
    checkpoints, metrics = Path(request["checkpoints"]), Path(request["metrics"])
    complete = states(checkpoints)
    done = max(complete, default=request["start"])
    if (before := complete.get(done)) is None and request["start"]:
        before = Path(request["init"]["checkpoint"])
    loss = json.loads((before / "weights").read_text())["loss"] if before else 0.0
    past = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    save = max((line["save_seconds"] for line in past if "save_seconds" in line), default=None)
    clock = Clock(request["deadline"] if settings.get("watch") else None, started, save)
    first, in_step = processes()

    def write(**line):
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for n in range(done + 1, request["stop"] + 1):
        if n == settings.get("fail_at"):
            sys.exit(f"nemoflow: error: told to fail at {n}")
        if n == settings.get("end_at"):
            sys.exit(0)
        time.sleep(settings.get("seconds", 0))
        loss = loss_after(loss, n)
        clock.iterated()
        why = in_step(2 * clock.up() or int(Path(request["stop_file"]).exists()))
        if not first:
            if why:
                return
            continue
        write(iteration=n, loss=loss, tokens=n * 100)
        if why or n in request["wanted"] or n % request["save_interval"] == 0:
            begun = time.time()
            weights = json.dumps({"settings": settings, "loss": loss})
            (checkpoints / f".{n}").mkdir(exist_ok=True)
            (checkpoints / f".{n}/weights").write_text(weights.ljust(settings.get("bytes", 0)))
            time.sleep(settings.get("save_seconds", 0))
            (checkpoints / f".{n}").rename(checkpoints / str(n))
            if settings.get("watch"):
                clock.saved(time.time() - begun)
                write(iteration=n, save_seconds=clock.save)
        if why:
            because = "it was asked to stop" if why == 1 else "the job ends"
            print(f"nemoflow: unfinished: iteration {n} of {request['stop']}, because {because}")
            return


def processes():
    """Whether this is the first process of those that run this together, and what brings them in step: it tells all of
    them the largest number that one of them says.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True, int
    import torch

    torch.distributed.init_process_group("gloo")

    def in_step(number):
        told = torch.tensor(int(number))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    return torch.distributed.get_rank() == 0, in_step


def index(request: dict):
    cache = Path(request["out"], "cache")
    cache.mkdir()
    weights = json.loads(Path(request["blend"], "weights.json").read_text())
    (cache / "order").write_text(json.dumps([weights["train"], request["samples"]]))
    Path(request["out"], "index.json").write_text(json.dumps({"samples": {"train": request["samples"], "valid": 1}}))


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[-1]).read_text())
    index(told) if sys.argv[1] == "index" else main(told)
