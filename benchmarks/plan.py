"""How long the plan of nano3 takes, raw data to export, with every source locked: python -m benchmarks.plan

The lock is made up, at the size of the real thing: 60,000 Parquet files of 200 MB, 12 TB in all, dealt out to the
recipe's sources. Snakemake runs as a user would run it, in a directory of its own: once with nothing made yet (-n), and
once with every record there, so that there is nothing to do. Prints seconds and peak memory of each.
"""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemoflow import locks, store
from nemoflow import recipe as grammar
from nemoflow.data import plan
from nemoflow.session import Session

BASE = Path(__file__).resolve().parents[1]
RECIPES = [BASE / "config/recipes"]
FILES, FILE_BYTES, ROW_GROUPS = 60_000, 200_000_000, 8


def lock(recipe: str, path: Path) -> tuple[int, int]:
    """Write a made-up lock of `recipe` to `path`; returns how many sources and files it pins."""
    _, spec = grammar.load(recipe, RECIPES)
    wanted = locks._wanted(spec)
    sources = [key for key in wanted if key != "tokenizer"]
    entries = {}
    for key, said in wanted.items():
        asked = locks._asked(said)
        count = FILES // len(sources) if key != "tokenizer" else 3
        digests = (hashlib.sha256(f"{key} {n}".encode()).hexdigest() for n in range(count))
        rows = [(f"data/part-{n:05d}.parquet", FILE_BYTES, f"sha256:{digest}") for n, digest in enumerate(digests)]
        entry = locks.Entry(asked=asked, commit=hashlib.sha1(key.encode()).hexdigest(), files=rows)
        if key != "tokenizer":
            entry.config, entry.format = said.config or "default", "parquet"
            entry.plan = plan.shards([row[1] for row in rows], {}, said.shard_size)
        entries[key] = entry
    path.write_text(locks.dump(entries), encoding="utf-8")
    return len(sources), sum(len(entry.files) for entry in entries.values())


def timed(where: Path, *arguments: str) -> tuple[dict[str, float], str]:
    """Seconds that Snakemake took, by the clock and of the processor, and what it printed."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(BASE / "Snakefile"), *arguments]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = {"wall": round(wall, 1), "cpu": round(cpu, 1)}
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return seconds, done.stdout + done.stderr


def finish(where: Path, name: str) -> int:
    """Write the record of everything behind a name, as if it had been made; returns how many artifacts that are."""
    session = Session(where / "artifacts", [where / "config/recipes"])
    session.request([name])
    measures = {"prefixes": {"train": [{"prefix": "train-00000", "documents": 10**8, "tokens": 10**12}]}}
    done = {}
    for target in session.names[name].values():
        for stage, at in session.store.ancestors(target.stage.identity, target.at):
            done[stage.identity] = stage, at
    for stage, at in done.values():
        stage.state(at).mkdir(parents=True, exist_ok=True)
        store.seal(stage, at, measures, [])
    return len(done)


def measured(name: str) -> dict:
    """Seconds of the plan of a recipe's name, with nothing there and with everything, and what that is of."""
    recipe = name.partition("/")[2]
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        (where / "config").mkdir()
        (where / "config/recipes").mkdir()
        (where / "config/blends").symlink_to(BASE / "config/blends")
        (where / f"config/recipes/{recipe}.yaml").symlink_to(RECIPES[0] / f"{recipe}.yaml")
        sources, files = lock(recipe, where / f"config/recipes/{recipe}.lock.json")
        results: dict = {"sources": sources, "files": files}
        results["plan"], text = timed(where, "-n", name)
        results["jobs"] = text.count(": new")
        finish(where, name)
        results["nothing_to_do"], text = timed(where, name)  # makes the name itself, once
        results["nothing_to_do"], text = timed(where, name)
        if "Nothing to be done" not in text:
            sys.exit(text)
        results["peak_megabytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return results


if __name__ == "__main__":
    print(json.dumps(measured("hf_export/nano3"), indent=2))
