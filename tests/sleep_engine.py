"""A trainer for tests of the graph: a file per checkpoint and a line of metrics per iteration, and no model.

The recipe's overrides steer it, without being identity: sleep.seconds per iteration, sleep.fail_at an iteration to
fail at, sleep.end_at one to end at without a word, sleep.bytes the size of a checkpoint. Asked to stop, it saves, says
so and ends.
"""

import json
import sys
import time
from pathlib import Path

STARTS_FROM = "checkpoint"
CARRIES = ("all", "weights", "weights+optimizer")
REFUSED = {"sleep.until": "write the stage's until"}


def check(overrides, where):
    pass


def outside(key):
    return key in {"sleep.seconds", "sleep.fail_at", "sleep.end_at", "sleep.bytes", "sleep.padding"}


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


def main(request: dict):
    settings = request["overrides"]
    checkpoints = Path(request["checkpoints"])
    done = max(states(checkpoints), default=request["start"])
    with Path(request["metrics"]).open("a") as metrics:
        for n in range(done + 1, request["stop"] + 1):
            if n == settings.get("sleep.fail_at"):
                sys.exit(f"nemoflow: error: told to fail at {n}")
            if n == settings.get("sleep.end_at"):
                sys.exit(0)
            time.sleep(settings.get("sleep.seconds", 0))
            metrics.write(json.dumps({"iteration": n, "loss": 10 / n, "tokens": n * 100}) + "\n")
            metrics.flush()
            asked = Path(request["stop_file"]).exists()
            if n in request["wanted"] or n % request["save_interval"] == 0 or asked:
                (checkpoints / f".{n}").mkdir(exist_ok=True)
                weights = json.dumps([request["init"], settings, n])
                (checkpoints / f".{n}" / "weights").write_text(weights.ljust(settings.get("sleep.bytes", 0)))
                (checkpoints / f".{n}").rename(checkpoints / str(n))
            if asked:
                print(f"nemoflow: unfinished: iteration {n} of {request['stop']}, because it was asked to stop")
                return


def index(request: dict):
    cache = Path(request["out"], "cache")
    cache.mkdir()
    weights = json.loads(Path(request["blend"], "weights.json").read_text())
    (cache / "order").write_text(json.dumps([weights["train"], request["samples"]]))
    Path(request["out"], "index.json").write_text(json.dumps({"samples": {"train": request["samples"], "valid": 1}}))


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[-1]).read_text())
    index(told) if sys.argv[1] == "index" else main(told)
