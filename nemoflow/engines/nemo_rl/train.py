"""The program that trains with NeMo-RL: it runs beside Ray's head, in the image, and starts NeMo-RL's own script.

    python -m nemoflow.engines.nemo_rl.train REQUEST

It writes the script's configuration, follows what it measures, deletes the checkpoints that nothing asks for, and says
whether the state that is wanted was reached: the script itself ends with exit code 0 also when its time was up.

NEMO_RL: NeMo-RL's directory, /opt/nemo-rl in its images.
"""

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nemoflow.engines.nemo_rl import checkpoints, keys, outside, overlay, release_of, releases
from nemoflow.engines.nemo_rl.loader import flat, load, plain
from nemoflow.engines.nemo_rl.metrics import Follower, best, write, written
from nemoflow.engines.nemo_rl.signs import signs
from nemoflow.errors import UNFINISHED_PREFIX, NemoflowError

HOME = "/opt/nemo-rl"
POLL_SECONDS = float(os.environ.get("NEMOFLOW_POLL", "5"))
_PLACES = (
    *("checkpointing.", "cluster.", "logger.", "policy.model_name", "policy.tokenizer.name", "teacher.model_name"),
    *("teacher.tokenizer.name", "data.train.data_path", "data.validation.data_path", "data.train_data_path"),
    *("data.val_data_path", "data.train_jsonl_fpath", "data.validation_jsonl_fpath"),
)
"""Settings that say where things lie, or how far this run goes; the artifacts they name are identity by themselves."""


def installed(release: str) -> Path:
    """NeMo-RL's directory. Raises NemoflowError where there is none, or one of another release."""
    home = Path(os.environ.get("NEMO_RL") or HOME)
    info = home / "nemo_rl" / "package_info.py"
    if not info.is_file():
        raise NemoflowError(
            f"{home}: no NeMo-RL is there; give cluster.yaml's container.images.nemo_rl an image that has it, or "
            "NEMO_RL a checkout"
        )
    named = {}
    for node in ast.parse(info.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            named[node.targets[0].id] = node.value.value
    version = ".".join(str(named.get(part, "?")) for part in ("MAJOR", "MINOR", "PATCH")) + named.get("PRE_RELEASE", "")
    if version != releases.VERSIONS[release]:
        raise NemoflowError(
            f"nemo_rl.release: {release} is NeMo-RL {releases.VERSIONS[release]}, and {home} has {version}; change the "
            "recipe's nemo_rl.release, or the image"
        )
    return home


def resolved(file: Path, release: str, algorithm: str) -> dict:
    """The whole configuration that the script will see. Raises NemoflowError for all that is wrong with it."""
    content = plain(load(file))
    if problems := keys.problems(release, algorithm, content):
        raise NemoflowError(f"{file}: {'; '.join(problems)}")
    return content


def check_resolved(file: Path, content: dict) -> None:
    """Write what defines the result at the first start; later refuse to go on with something else.

    Raises NemoflowError naming every setting that differs.
    """
    settings = {
        key: value
        for key, value in flat(content).items()
        if not outside(key) and not key.startswith(_PLACES) and not key.endswith((".max_num_steps", ".max_num_epochs"))
    }
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(file)
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    differ = sorted(k for k in stored.keys() | settings.keys() if stored.get(k) != settings.get(k))
    if differ:
        shown = ", ".join(f"{k} was {stored.get(k)!r}, is {settings.get(k)!r}" for k in differ)
        raise NemoflowError(
            f"{file}: this stage was started with other settings: {shown}; go on with the release it was started with, "
            "or raise the stage's version"
        )


def check_rows(request: dict) -> None:
    """Raise NemoflowError for a row of an agent that no environment of the stage has; by file and line."""
    agents = request.get("environments", {})
    if not releases.is_gym(agents):
        return
    for name in ("train.jsonl", "validation.jsonl"):
        file = Path(request["prompts"]) / name
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                agent = json.loads(line).get("agent_ref", {}).get("name")
                if agent not in agents:
                    raise NemoflowError(
                        f"{file}:{number}: agent_ref.name: {agent!r} is none of the stage's environments: "
                        f"{', '.join(sorted(agents))}"
                    )


class Run:
    """One start of NeMo-RL's script, and what is done beside it."""

    def __init__(self, request: dict, home: Path, release: str, stop: int):
        self.request, self.home, self.release, self.stop = request, home, release, stop
        self.scratch = Path(request["scratch"])
        self.checkpoints = Path(request["checkpoints"])
        self.cache = self.scratch / "from_hf"
        self.steps = written(Path(request["metrics"]))[-200:]
        self.told: set[str] = set()

    def configuration(self) -> Path:
        """Write the overlay, and check the whole configuration. Raises NemoflowError for what is wrong with it."""
        algorithm = self.request["algorithm"]
        made = overlay.render(self.request, self.release, self.home, self.stop, time.time())
        file = self.scratch / "overlay.yaml"
        file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")  # JSON is YAML, and quotes what needs it
        content = resolved(file, self.release, algorithm)
        check_resolved(Path(self.request["config"]), content)
        if self.request.get("resolved"):
            Path(self.request["resolved"]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return file

    def environment(self) -> dict[str, str]:
        """With a place for what NeMo-RL converts from an HF checkpoint, which it would keep by the checkpoint's path.
        Here it is the stage's own, and a conversion that was killed is made anew."""
        if not (self.cache / "complete").exists():
            shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir(parents=True, exist_ok=True)
        return os.environ | {
            "NRL_MEGATRON_CHECKPOINT_DIR": str(self.cache),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        }

    def train(self) -> int:
        """The exit code of the script."""
        file = self.configuration()
        script, _ = releases.example(self.release, self.request["algorithm"], self.request.get("environments", {}))
        logs = self.scratch / "logs"
        reached = max(checkpoints.states(self.checkpoints), default=0)
        # What a run that was killed did not come to write down, of steps that are not trained again
        left = [entry for entry in Follower(logs).read(last=True) if entry["iteration"] <= reached]
        write(Path(self.request["metrics"]), left)
        shutil.rmtree(logs, ignore_errors=True)
        command = [sys.executable, str(self.home / script), "--config", str(file)]
        print("$", *command, flush=True)
        child = subprocess.Popen(command, cwd=self.home, env=self.environment())
        follower = Follower(logs)
        try:
            while (code := child.poll()) is None:
                time.sleep(POLL_SECONDS)
                self.follow(follower)
                if Path(self.request["stop_file"]).exists():
                    return 0  # it cannot be asked to save; what is not saved is trained again
            return code if code >= 0 else 128 - code
        finally:
            _end(child)
            self.follow(follower, last=True)

    def follow(self, follower: Follower, last: bool = False) -> None:
        """Write down what was measured, say what looks sick, and delete the checkpoints that nothing asks for."""
        entries = follower.read(last)
        if entries:
            (self.cache / "complete").touch()  # a step was trained, so the model had been converted
        for entry in entries:
            write(Path(self.request["metrics"]), [entry])
            self.steps = [*self.steps[-200:], entry]
            found = signs(self.steps)
            for name in found.keys() - self.told:
                print(f"nemoflow: warning: step {entry['iteration']}: {found[name]}", flush=True)
            if new := sorted(found.keys() - self.told):
                write(Path(self.request["metrics"]), [{"iteration": entry["iteration"], "signs": new}])
            self.told = set(found)  # said again when it comes back
            if isinstance(entry.get("loss"), float) and not math.isfinite(entry["loss"]):
                raise NemoflowError(
                    f"step {entry['iteration']}: the loss is {entry['loss']}; what follows is of no use"
                )
        if entries:
            kept = wanted(self.request)
            liked = best(written(Path(self.request["metrics"])), checkpoints.states(self.checkpoints))
            checkpoints.prune(self.checkpoints, self.request["keep"], kept if liked is None else kept | {liked})


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wanted(request: dict) -> set[int]:
    """The steps whose states are kept, also those that were asked for meanwhile."""
    directory = request.get("wanted_directory")
    later = {int(p.name) for p in Path(directory).glob("*") if p.name.isdigit()} if directory else set()
    return {*request["wanted"], *later, request["stop"]}


def train(request: dict) -> int:
    """Train up to request["stop"]; the exit code. The state is there when it is 0 and nothing is said to be unfinished.

    Raises NemoflowError for settings, data or an image that cannot be used.
    """
    overrides, stop = request["overrides"], request["stop"]
    release = release_of(overrides, "overrides")
    home = installed(release)
    directory = Path(request["checkpoints"])
    for path in (directory, Path(request["scratch"])):
        path.mkdir(parents=True, exist_ok=True)
    check_rows(request)
    for left in (*directory.glob("tmp_step_*"), *directory.glob("old_step_*")):
        shutil.rmtree(left)  # of a save, or a deletion, that was killed
    while (reached := max(checkpoints.states(directory), default=0)) < stop:
        # NeMo-RL saves at multiples of an interval, and at its end: for another step it is run up to there
        odd = [n for n in wanted(request) if n > reached and n % request["save_interval"]]
        target = min([*odd, stop])
        code = Run(request, home, release, target).train()
        now = max(checkpoints.states(directory), default=0)
        if code:
            return code
        if Path(request["stop_file"]).exists() or (reached < now < target):
            print(f"{UNFINISHED_PREFIX}step {now} of {stop}", flush=True)
            return 0
        if now <= reached:
            raise NemoflowError(
                f"{directory}: NeMo-RL ended with exit code 0 and saved nothing after step {reached} of {target}, as "
                "it does when its time is up before a step is done; give resources a longer time"
            )
    return 0


def main(file: Path) -> int:
    try:
        return train(json.loads(file.read_text(encoding="utf-8")))
    except NemoflowError as error:
        print(f"nemoflow: error: {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
