"""Data preparation through the real `snakemake`, from a hub over HTTP to blends, chats, rows and pairs.

No trainer here: the recipe's `datasets` are made for their own sake.
"""

import itertools
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from graph import BASE, Work, kill
from hub_server import Hub

WORDS = ["".join(pair) for pair in itertools.product(("ba", "ku", "lor", "mi", "tes", "wo", "zan"), repeat=3)]

RECIPE = """\
description: data only
tokenizer: {train_on: [web], vocab_size: 400}
sources:
  web: {files: "hf://org/web", config: High-Quality, shard_size: 60kB}
  math: {files: "hf://org/web", config: High-Quality-Synthetic, field: body}
  talk: {files: "hf://org/talk", field: chat}
  rows: {generator: arithmetic_rl, shards: 1, args: {count: 30}}
  pairs: {files: "raw/pairs.jsonl"}
held_out: {valid: 500, test: 500, cap: 1/10}
overrides: {}
stages:
  - name: base
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    data: {blend: {web: 3/4, math: 1/4}}
    until: 4
    horizon: 4
    overrides: {train.global_batch_size: 2}
datasets:
  mix: {blend: {web: 1/3, math: 2/3}}
  chats: {chats: {talk: 3/2}, pack_size: 256}
  problems: {prompts: [rows]}
  preferred: {preferences: [pairs]}
"""


def sentence(rng: random.Random, words: int = 60) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def parquet(path: Path, column: str, texts: list[str], group: int = 50) -> bytes:
    pq.write_table(pa.table({column: texts}), path, row_group_size=group)
    return path.read_bytes()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with one dataset of two subsets, one a prefix of the other's name, and one of chats."""
    rng, scratch = random.Random(0), tmp_path_factory.mktemp("hub") / "x.parquet"
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n"
        for name in ("High-Quality", "High-Quality-Synthetic")
    )
    files = {"README.md": (card + "---\n").encode()}
    for i in range(3):
        texts = [sentence(rng) for _ in range(200 if i else 900)]
        files[f"High-Quality/part-{i}.parquet"] = parquet(scratch, "text", texts)
    texts = [sentence(rng) for _ in range(200)]
    files["High-Quality-Synthetic/part-0.parquet"] = parquet(scratch, "body", texts)
    chats = [
        {"chat": [{"role": "user", "content": sentence(rng, 9)}, {"role": "assistant", "content": sentence(rng, 12)}]}
        for _ in range(120)
    ]
    with Hub() as hub:
        hub.datasets["org/web"].commit(files)
        hub.datasets["org/talk"].commit({"train.jsonl": "".join(json.dumps(c) + "\n" for c in chats).encode()})
        yield hub


@pytest.fixture
def work(hub, tmp_path, monkeypatch) -> Work:
    """A directory with the recipe, locked."""
    for key in [key for key in os.environ if key.startswith("HF_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    work = Work(tmp_path / "work")
    (work.path / "config/recipes").mkdir(parents=True)
    work.recipe().write_text(RECIPE)
    (work.path / "raw").mkdir()
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(40)]
    (work.path / "raw/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    locked = work.nemoflow("lock", "demo")
    assert locked.returncode == 0, locked.stderr
    return work


NAMES = ("data/demo@mix", "data/demo@chats", "data/demo@problems", "data/demo@preferred")


def test_from_the_hub_to_data_of_every_kind(work: Work, hub):
    check = work.nemoflow("check", "demo", check=True).stdout
    assert "source web: about " in check
    printed = work.run(*NAMES)
    assert "Traceback" not in printed
    blend = json.loads((work.path / "data/demo@mix/sealed.json").read_text())
    assert [part["share"] for part in sorted(blend["measures"]["parts"], key=lambda p: p["share"])] == ["1/3", "2/3"]
    assert "<svg" in (work.path / "data/demo@mix/summary.svg").read_text()
    assert len((work.path / "data/demo@mix/summary.csv").read_text().splitlines()) == 3
    merges = [json.loads(p.read_text()) for p in work.path.glob("artifacts/merge/*/sealed.json")]
    web = next(m for m in merges if "synthetic" not in m["label"])
    assert web["measures"]["rows"] == 1300, (
        "the subset's rows, and not those of the one whose name begins with its name"
    )
    assert web["measures"]["shards"] > 3, "the large file was divided"
    for name, file in (
        ("chats", "training.idx.parquet"),
        ("problems", "train.jsonl"),
        ("preferred", "train.jsonl"),
    ):
        assert (work.path / f"data/demo@{name}" / file).stat().st_size
    # Once made, nothing asks the hub again, and what is there is not looked at twice
    asked = len(hub.log)
    assert "Nothing to be done" in work.run(*NAMES)
    assert len(hub.log) == asked


def test_weights_tokenize_nothing_anew(work: Work):
    work.run("data/demo@mix")

    def reweigh(data):
        data["datasets"]["mix"]["blend"] = {"web": "1/5", "math": "4/5"}

    work.edit(reweigh)
    assert work.planned("data/demo@mix") == {"blend": 1, "name": 1}


def test_planning_needs_no_network(work: Work, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert work.planned("data/demo@mix")["source"] == 2


def test_offline_is_one_line_that_says_so(work: Work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hf://org/web: HF_HUB_OFFLINE is set" in work.refused("tokenizer/demo")


@pytest.mark.slow
def test_killed_again_and_again_the_data_is_that_of_an_undisturbed_run(work: Work, tmp_path):
    work.run(*NAMES)
    undisturbed = {path: text for path, text in work.sealed().items() if "/name/" not in path}
    other = Work(tmp_path / "other")
    for part in ("config", "raw"):
        os.system(f"mkdir -p {other.path} && cp -r {work.path / part} {other.path / part}")
    rng = random.Random(1)
    for _ in range(12):
        process = other.start(*NAMES)
        time.sleep(rng.uniform(1.5, 6))
        jobs = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(other.path) in _read(p.parent / "cwd")]
        kill(process)
        for job in jobs:  # jobs are in process groups of their own
            if job.exists() and int(job.parent.name) != process.pid:
                try:
                    os.kill(int(job.parent.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue
    other.run(*NAMES)
    assert {path: text for path, text in other.sealed().items() if "/name/" not in path} == undisturbed


def _read(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_a_broken_document_is_told_with_file_and_row(work: Work):
    (work.path / "raw/bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n' + '{"text": "also"}\n' * 50)

    def add(data):
        data["sources"]["bad"] = {"files": "raw/bad.jsonl"}
        data["datasets"] = {"bad": {"blend": {"bad": 1}}}

    work.edit(add)
    work.nemoflow("lock", "demo", "--only", "bad", check=True)
    message = work.refused("data/demo@bad")
    assert "raw/bad.jsonl:2: 'text' is not a string" in message
    assert "max_broken" in message


def test_the_lock_is_asked_for_by_name(work: Work):
    data = yaml.safe_load(work.recipe().read_text())
    data["sources"]["web"]["config"] = "High-Quality-Synthetic"
    work.recipe().write_text(yaml.safe_dump(data, sort_keys=False))
    message = work.refused("data/demo@mix")
    assert "sources.web.config: 'High-Quality-Synthetic', but" in message
    assert "nemoflow lock demo" in message


def test_the_recipe_in_the_readme_runs_as_it_stands(work: Work, hub, tmp_path):
    rng = random.Random(2)
    card = b"---\nconfigs:\n- config_name: SUBSET\n  data_files: data/*\n---\n"
    data = parquet(tmp_path / "x.parquet", "text", [sentence(rng) for _ in range(300)])
    hub.datasets["ORGANISATION/DATASET"].commit({"README.md": card, "data/0.parquet": data})
    text = (BASE / "README.md").read_text()
    recipe = re.search(r"```yaml\n# config/recipes/mine-data.yaml\n(.*?)```", text, re.S)[1]
    work.recipe("mine-data").write_text(recipe)
    (work.path / "notes").mkdir()
    notes = "".join(json.dumps({"body": sentence(rng)}) + "\n" for _ in range(100))
    (work.path / "notes/a.jsonl.zst").write_bytes(zstandard.compress(notes.encode()))
    work.nemoflow("lock", "mine-data", check=True)
    done = work.snakemake("data/mine-data@mix")
    assert done.returncode == 0, done.stdout
    assert (work.path / "data/mine-data@mix/blend.json").exists()
