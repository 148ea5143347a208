"""`nemoflow show` of artifacts, and its commands that make one once more."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from graph import BASE, CHECKOUT, Work

from nemoflow.training import metrics

GENERATED = """\
tokenizer: {train_on: [topics], vocab_size: 300}
sources:
  topics: {generator: stdlib_topics, shards: 2}
  sums: {generator: arithmetic_chats, shards: 2, args: {count: 60}}
overrides:
  sleep_engine: {train.global_batch_size: 2}
stages:
  - name: sft
    kind: sft
    engine: sleep_engine
    function: toys.toy_sft_config
    data: {chats: {sums: 1}, pack_size: 128}
    init: {from: base, carry: weights}
    until: 12
    horizon: 30
  - name: base
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    data: {blend: {topics: 1}}
    until: 8
    horizon: 8
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Work:
    """A checkout under git, and a chain made by it elsewhere, of generated data."""
    root = tmp_path_factory.mktemp("made")
    checkout = root / "checkout"
    checkout.mkdir()
    for name in CHECKOUT:
        source = BASE / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, checkout / name, ignore=ignored) if source.is_dir() else shutil.copy(source, checkout)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    (checkout / ".gitignore").write_text("__pycache__/\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    path = root / "work"
    (path / "config/recipes").mkdir(parents=True)
    (path / "config/recipes/own.yaml").write_text(GENERATED)
    work = Work(path, checkout)
    work.run("data/own", "sft/own")
    return work


def show(work: Work, *arguments: str) -> str:
    return work.nemoflow("show", *arguments, check=True).stdout


def follow(commands: str, path: Path) -> subprocess.CompletedProcess:
    """Run what `--reproduce` printed, in this environment rather than a new one."""
    own = commands.replace("make install", f"ln -s {BASE / '.venv'} .venv").replace(
        ".venv/bin/snakemake", f"{sys.executable} -m snakemake"
    )
    own = own.replace(".venv/bin/nemoflow", f"{sys.executable} -c 'from nemoflow.cli import main; main()'")
    environment = os.environ | {"PYTHONPATH": f"{BASE / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-ec", own], cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_what_an_artifact_is(made: Work):
    said = show(made, "sft/own")
    own, _, chain = said.partition("\n\nartifact ")
    assert own.startswith("sft of own to 12\n  artifacts/sft/toy-")
    assert re.search(r"\n  from\n    init +pretrain/toy-[0-9a-f]+/at-8\n    data +chats/packed-128-", own)
    assert "    init.carry                         weights\n" in own
    assert re.search(r"\n  measured\n    iterations  12\n    loss +0.8", own)
    assert re.search(r"\n  made with\n    code +[0-9a-f]{40}\n", own)
    assert re.search(r"\n  1 +20..-..-.. ..:.. +done +0 -> 12 ", own)
    assert "pretrain base of own to 8" in chain
    (found,) = json.loads(show(made, "sft/own", "--json"))
    assert found["record"]["kind"] == "sft"
    assert [a["outcome"] for a in found["attempts"]] == ["done"]
    assert found["gpu_hours"] is None


@pytest.mark.slow
def test_of_what_is_not_finished_the_chain_is_shown(made: Work, tmp_path):
    work = made.copy(tmp_path / "copy")
    text = work.recipe("own").read_text()
    work.recipe("own").write_text(text.replace("until: 12", "until: 13"))
    said = show(work, "sft/own")
    assert "sft/own: is not finished: artifacts/sft/toy-" in said
    assert "pretrain base of own to 8" in said


@pytest.mark.slow
def test_its_commands_make_the_same_bytes(made: Work, tmp_path):
    commands = show(made, "sft/own", "--reproduce")
    assert "\nmake install\n" in commands
    assert commands.startswith("# sft/own is sft/toy-")
    assert "changes" not in commands
    done = follow(commands, tmp_path)
    again = tmp_path / "reproduced"
    before = {p.relative_to(made.path): p.read_bytes() for p in made.path.glob("artifacts/**/artifact.json")}
    after = {p.relative_to(again): p.read_bytes() for p in again.glob("artifacts/**/artifact.json")}
    assert len(after) > 8
    assert after == {path: before[path] for path in after}
    (one,), (two,) = (list(p.glob("artifacts/sft/*/metrics.jsonl")) for p in (made.path, again))
    assert one.read_text() == two.read_text()
    assert "artifact" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nano3_tiny_once_more(made: Work, tmp_path):
    """Its data has the same digests, and the first iterations of its pretraining the same losses, digit by digit."""
    work = Work(tmp_path / "work", made.checkout)
    shutil.copytree(BASE / "config", work.path / "config")
    few = "extends: nano3-tiny\nstages:\n  - {name: phase1, until: 3}\n"
    work.recipe("few").write_text(few)
    name = "pretrain/few@phase1"
    work.run(name)
    follow(show(work, name, "--reproduce"), tmp_path)
    again = tmp_path / "reproduced"
    before, after = (
        {p.relative_to(path): json.loads(p.read_text()) for p in path.glob("artifacts/**/artifact.json")}
        for path in (work.path, again)
    )
    data = {path for path, record in before.items() if record["kind"] != "pretrain"}
    assert {before[path]["kind"] for path in data} == {"source", "tokenizer", "shards", "merge", "blend", "index"}
    assert all(entry.keys() & {"sha256", "blake3"} for path in data for entry in before[path]["contents"])
    assert {path: after[path] for path in data} == {path: before[path] for path in data}
    losses = []
    for path in (work.path, again):
        (file,) = path.glob("artifacts/pretrain/*/metrics.jsonl")
        found = metrics(file)
        losses.append({n: {k: found[n].get(k) for k in ("loss", "valid_loss", "grad_norm")} for n in found})
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [0, 1, 2, 3]
    assert all(losses[0][n]["loss"] for n in (1, 2, 3))
    (state,) = (path for path, record in before.items() if record["kind"] == "pretrain")
    assert after[state]["measures"] == before[state]["measures"]


@pytest.mark.slow
def test_what_cannot_be_reproduced_is_one_error(made: Work, tmp_path):
    work = made.copy(tmp_path / "copy")
    for run in work.path.glob("artifacts/*/*/run.json"):
        run.unlink()
    done = work.nemoflow("show", "sft/own", "--reproduce")
    assert done.returncode == 1
    assert "names no commit" in done.stderr
    done = work.nemoflow("show", str(Path("artifacts")), "--reproduce")
    assert done.returncode == 1
    assert "a directory does not say which recipe made it" in done.stderr
