"""A stand-in for an installation of NeMo-RL: examples with all that a release requires, scripts that train nothing.

The scripts do what NeMo-RL's do as far as a workflow sees it: resume from the newest step, save at multiples of an
interval and at the end by renaming, measure into TensorBoard's files, leave with exit code 0 when their time is up.
"""

import json
from pathlib import Path

from nemoflow.engines.nemo_rl import keys, releases

SCRIPT = """\
import json, os, shutil, sys, time
from pathlib import Path
from omegaconf import OmegaConf
from nemoflow.engines.nemo_rl.loader import load, plain
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

config = plain(load(Path(sys.argv[sys.argv.index("--config") + 1])))
section = config[next(s for s in ("grpo", "dpo", "rm", "distillation") if s in config)]
saving, steer = config["checkpointing"], json.loads(os.environ.get("STANDIN", "{}"))
place = Path(saving["checkpoint_dir"])
if nodes := steer.get("nodes"):
    # What NeMo-RL's scripts do first: attach, count the GPUs, place a group with a bundle on every node
    import ray

    each = config["cluster"]["gpus_per_node"]
    ray.init(address="auto", log_to_driver=False)
    group = ray.util.placement_group([{"CPU": 1, "GPU": each}] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    print("stand-in:", int(ray.cluster_resources()["GPU"]), "GPUs on", nodes, "nodes", flush=True)
number = lambda p: int(p.name.removeprefix("step_"))
step = max(map(number, place.glob("step_*")), default=0)
print("stand-in: from", step, "to", section["max_num_steps"], flush=True)
writer = EventFileWriter(str(Path(config["logger"]["log_dir"]) / "exp_001" / "tensorboard"))

def scalar(tag, value, at):
    value = Summary.Value(tag=tag, simple_value=value)
    writer.add_event(Event(step=at, summary=Summary(value=[value]), wall_time=time.time()))

begun = step
while step < section["max_num_steps"]:
    if step == steer.get("fail_at"):
        sys.exit("the stand-in fails")
    step += 1
    time.sleep(steer.get("seconds", 0))
    mismatch = steer.get("mismatch", 1.0)
    for tag, value in (("loss", 0.5 / step), ("reward", step / 10), ("token_mult_prob_error", mismatch),
                       ("mcqa_simple_agent/reward/mean", step / 20)):
        scalar(f"train/{tag}", value, step)
    if step % 2 == 0:
        scalar("validation/accuracy", (step % 4) / 4 + 0.25, step)
    writer.flush()
    last = step == section["max_num_steps"]
    late = steer.get("time_up_after") is not None and step - begun >= steer["time_up_after"]
    if last or late and not steer.get("saves_nothing") or step % saving["save_period"] == 0:
        made = place / f"tmp_step_{step}"
        weights = made / "policy" / "weights"
        weights.mkdir(parents=True)
        (weights / "model").write_text(str(step))
        (made / "training_info.json").write_text(json.dumps({"total_steps": step, "current_step": step}))
        made.rename(place / f"step_{step}")
    if late:
        print("Timeout has been reached, stopping training early", flush=True)
        break
writer.close()
"""


def _value(types: str):
    kinds = set(types.split("|"))
    given = {"section": {}, "open": {}, "null": None, "bool": False, "int": 1, "float": 1.0, "str": "x", "list": []}
    return next((given[kind] for kind in given if kind in kinds), "x")


def example(release: str, algorithm: str) -> dict:
    """A configuration with every key that the release requires for an algorithm, and its steps."""
    made: dict = {}
    table = keys.table(release)
    section = releases.RELEASES[release][algorithm].section
    steps = [section, f"{section}.seed", f"{section}.val_period"]
    for key in sorted({*table["required"][algorithm], *table["sections"][algorithm], *steps}):
        *above, name = key.split(".")
        place = made
        for part in above:
            place = place.setdefault(part, {})
        if isinstance(place, dict):
            place.setdefault(name, _value(table["keys"].get(key, "section")))
    return made


def install(home: Path, release: str) -> Path:
    """A stand-in for the release in the directory `home`."""
    (home / "nemo_rl").mkdir(parents=True)
    number, _, more = releases.VERSIONS[release].partition("rc")
    major, minor, patch = number.split(".")
    words = {"MAJOR": int(major), "MINOR": int(minor), "PATCH": int(patch), "PRE_RELEASE": f"rc{more}" if more else ""}
    (home / "nemo_rl" / "package_info.py").write_text("".join(f"{k} = {v!r}\n" for k, v in words.items()))
    for algorithm, entry in releases.RELEASES[release].items():
        for script, file in filter(None, (entry.own, entry.gym)):
            for path in (home / script, home / file):
                path.parent.mkdir(parents=True, exist_ok=True)
            (home / script).write_text(SCRIPT)
            (home / file).write_text(json.dumps(example(release, algorithm)))
    return home
