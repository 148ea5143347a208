"""The demo as a stranger runs it: nano3-tiny from raw text to an export that plain transformers loads, and the README.

Slow by nature: the chain is trained once, and everything here looks at what it left.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from huggingface_hub import ModelCard

BASE = Path(__file__).resolve().parents[1]
PARTS = (
    "Snakefile",
    "README.md",
    "config",
    "envs",
    "nemoflow",
    "profiles",
    "pyproject.toml",
    "rules",
    "scripts",
    "slurm",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def run(where: Path, *command: str, code: int = 0) -> str:
    """Output of a command run in a checkout with the environment's programs on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=where,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


class Peak(threading.Thread):
    """Largest resident memory of this process's descendants, summed, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, False

    def run(self):
        while not self.ended:
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
            time.sleep(0.5)


class Demo:
    """A checkout in which the demo has run."""

    def __init__(self, path: Path):
        self.path = path
        for part in PARTS:
            copy = shutil.copytree if (BASE / part).is_dir() else shutil.copy
            copy(BASE / part, path / part)
        peak = Peak()
        peak.start()
        begun = time.monotonic()
        self.output = run(path, "snakemake", "hf_export/nano3-tiny")
        self.seconds, peak.ended, self.peak = time.monotonic() - begun, True, peak.bytes
        print(f"\nhf_export/nano3-tiny: {self.seconds:.0f} s, peak memory {self.peak / 2**30:.2f} GiB\n{self.output}")

    def sealed(self, name: str) -> dict:
        run(self.path, "snakemake", name)
        return json.loads((self.path / name / "sealed.json").read_text())

    def planned(self, name: str) -> list[str]:
        """Titles of the artifacts that a dry run would make."""
        plan = re.search(r"^Plan:\n((?:  .*\n)*)", run(self.path, "snakemake", "-n", name), re.M)
        return [line.split(":")[0].strip() for line in plan[1].splitlines()] if plan else []


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    return Demo(tmp_path_factory.mktemp("a checkout with spaces"))


def test_memory_stays_on_a_laptop(demo):
    assert demo.peak <= 4 * 2**30


def test_the_screen_is_not_buried(demo):
    artifacts = demo.output.count(": done in ")
    lines_of_progress = demo.seconds / 10  # on a slow machine there are more of them
    assert len(demo.output.splitlines()) < 4 * artifacts + lines_of_progress + 15
    assert "Warning" not in demo.output


def test_pretraining_learns(demo):
    first = demo.sealed("pretrain/nano3-tiny@phase1")["measures"]
    last = demo.sealed("pretrain/nano3-tiny@phase2")["measures"]
    assert last["valid_loss"] <= 0.7 * first["valid_loss_first"]
    assert first["tokens"] == 90 * 16 * 256
    assert last["tokens"] == 60 * 16 * 256


def test_sft_and_rl_learn(demo):
    sft = demo.sealed("sft/nano3-tiny")["measures"]
    assert sft["valid_loss"] < sft["valid_loss_first"]
    rlvr = demo.sealed("rl/nano3-tiny@rlvr")["measures"]
    assert rlvr["reward"] > rlvr["reward_first"] + 0.1
    assert len(rlvr["rewards"]) == 3
    assert "skipped" not in rlvr
    dpo = demo.sealed("rl/nano3-tiny@dpo")["measures"]
    assert dpo["accuracy"] > 0.6 > dpo["accuracy_first"]


def test_two_phases_read_different_blends(demo):
    run(demo.path, "snakemake", "data/nano3-tiny@phase1", "data/nano3-tiny@phase2")
    one, two = (json.loads((demo.path / f"data/nano3-tiny@phase{p}/blend/weights.json").read_text()) for p in (1, 2))
    assert one != two


def test_the_export_loads_and_generates_in_a_process_of_its_own(demo):
    program = re.search(r"```python\n(.*?)```", (demo.path / "README.md").read_text(), re.S)[1]
    printed = run(demo.path, sys.executable, "-W", "error::FutureWarning", "-c", program)
    assert printed.strip()
    assert "newly initialized" not in printed


def test_the_export_is_evaluated_on_its_sums(demo):
    begun = time.monotonic()
    run(demo.path, "snakemake", "eval/nano3-tiny")
    print(f"\neval/nano3-tiny: {time.monotonic() - begun:.0f} s")
    sums = json.loads((demo.path / "eval/nano3-tiny/sums/sealed.json").read_text())["measures"]
    assert sums["samples"] == 36
    assert sums["metrics"]["exact_match"]["value"] > 0.25  # one answer to all would be right in a sixth
    shown = run(demo.path, "nemoflow", "show", "eval/nano3-tiny")
    assert re.search(r"eval sums of nano3-tiny@dpo +exact_match 0\.\d{3} ± 0\.\d{3} of 36", shown)


def test_nothing_to_do_is_quick_and_says_so(demo):
    before = os.times()
    assert "Nothing to be done" in run(demo.path, "snakemake", "hf_export/nano3-tiny")
    after = os.times()  # of processors, as the machine may be busy with other things
    assert after.children_user + after.children_system - before.children_user - before.children_system <= 5


def test_a_changed_sft_plans_sft_and_what_follows(demo):
    recipe = demo.path / "config/recipes/nano3-tiny.yaml"
    before = recipe.read_text()
    try:
        recipe.write_text(before.replace("optimizer.lr: 0.003", "optimizer.lr: 0.002"))
        assert demo.planned("hf_export/nano3-tiny") == [
            "sft of nano3-tiny to 90",
            "hf_export of nano3-tiny@sft",
            "rl rlvr of nano3-tiny to 40",
            "hf_export of nano3-tiny@rlvr",
            "rl dpo of nano3-tiny to 20",
            "hf_export of nano3-tiny@dpo",
        ]
    finally:
        recipe.write_text(before)
    assert demo.planned("hf_export/nano3-tiny") == []
    run(demo.path, "snakemake", "hf_export/nano3-tiny")


def test_a_recipe_that_differs_in_rl_shares_the_rest(demo):
    shutil.copy(demo.path / "config/recipes/nano3-tiny.yaml", demo.path / "config/recipes/copy.yaml")
    assert demo.planned("hf_export/copy") == []
    mine = re.search(r"```yaml\n# config/recipes/mine.yaml\n(.*?)```", (demo.path / "README.md").read_text(), re.S)[1]
    (demo.path / "config/recipes/mine.yaml").write_text(mine)
    assert demo.planned("hf_export/mine") == [
        "rl rlvr of mine to 40",
        "hf_export of mine@rlvr",
        "rl dpo of mine to 20",
        "hf_export of mine@dpo",
    ]


def test_a_copy_elsewhere_plans_nothing(demo, tmp_path):
    for part in PARTS:
        copy = shutil.copytree if (demo.path / part).is_dir() else shutil.copy
        copy(demo.path / part, tmp_path / part)
    run(tmp_path, "cp", "-r", str(demo.path / "artifacts"), "artifacts")
    assert "Plan:" not in run(tmp_path, "snakemake", "hf_export/nano3-tiny")
    assert (tmp_path / "hf_export/nano3-tiny/model.safetensors").exists()


def test_an_export_copied_away_alone_names_every_raw_file(demo, tmp_path):
    shutil.copytree(demo.path / "hf_export/nano3-tiny", tmp_path / "model")
    found = json.loads(run(tmp_path, "nemoflow", "trace", "model", "--json"))
    assert found["missing"] == []
    sources = [a["record"] for a in found["artifacts"] if a["record"]["kind"] == "source"]
    assert len(sources) == 10
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for source in sources for file in source["contents"])
    card = ModelCard.load(tmp_path / "model/README.md")
    assert {"pretrain", "sft", "rl"} <= set(card.data.tags)
    assert "| sft nemotron-3-nano to 90 | 90 | " in card.text


def test_the_readme_s_commands_run(demo):
    blocks = re.findall(r"```sh\n(.*?)```", (demo.path / "README.md").read_text(), re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(commands) >= 8
    for command in filter(None, commands):
        assert run(demo.path, *shlex.split(command)), command


def test_the_readme_s_graph_is_today_s(demo):
    drawn = re.search(r"```mermaid\n(.*?)```", (demo.path / "README.md").read_text(), re.S)[1]
    plain = [re.sub(r"s[0-9a-f]{12}", "s", line) for line in drawn.strip().splitlines()]
    today = run(demo.path, "nemoflow", "graph", "--mermaid", "hf_export/nano3-tiny").strip().splitlines()
    assert [re.sub(r"s[0-9a-f]{12}", "s", line) for line in today] == plain


@pytest.fixture(scope="module")
def seeds(demo) -> list[tuple[dict, dict]]:
    """Measures of the RL stages under three more seeds."""
    found = []
    for seed in (1, 2, 3):
        rlvr = f"  - name: rlvr\n    overrides: {{grpo.seed: {seed}}}\n"
        dpo = f"  - name: dpo\n    overrides: {{dpo.seed: {seed}}}\n"
        (demo.path / f"config/recipes/seed{seed}.yaml").write_text(f"extends: nano3-tiny\nstages:\n{rlvr}{dpo}")
        found.append(tuple(demo.sealed(f"rl/seed{seed}@{stage}")["measures"] for stage in ("rlvr", "dpo")))
        print(seed, found[-1])
    return found


def test_rl_learns_over_three_seeds(seeds):
    """The mean reward in each of the three, every environment's over them all; and preferences in each."""
    assert [m for m, _ in seeds if m["reward"] <= m["reward_first"] + 0.05] == []
    for agent in seeds[0][0]["rewards"]:
        gained = [m["rewards"][agent] - m["rewards_first"][agent] for m, _ in seeds]
        assert sum(gained) > 0, (agent, gained)
    assert [m for _, m in seeds if m["accuracy"] <= 0.6] == []
