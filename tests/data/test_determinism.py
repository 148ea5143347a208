"""Everything the data programs write is the same, byte for byte, whatever the process it is written by."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def digests(root: Path) -> dict[str, str]:
    """Of all files but those that hold paths of this place, for Megatron-Bridge, and are not sealed."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "blend.json"
    }


def test_nothing_heavy_is_imported():
    """Importing torch or transformers takes longer than all of this work."""
    modules = "blend, chats, download, generate, local, merge, preferences, prompts, shards, sources, tokenizer"
    code = f"import sys; from nemoflow.data import {modules}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "megatron", "pandas", "snakemake"} & set(done.stdout.split())


def test_two_runs_from_nothing_are_byte_identical(tmp_path):
    surroundings = [
        {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "UTC"},
        {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "3", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"},
    ]
    runs = []
    for number, environment in enumerate(surroundings):
        root = tmp_path / f"run {number}" / ("deeper" * number)
        subprocess.run(
            [sys.executable, Path(__file__).with_name("data_set.py"), root],
            env=os.environ | environment,
            check=True,
            cwd=tmp_path,
        )
        runs.append(digests(root))
    assert runs[0] == runs[1]
    kinds = {name.split("/")[0] for name in runs[0]}
    assert kinds == {"source", "tokenizer", "shards", "merge", "blend", "chats", "prompts"}
    assert sum(name.endswith(".bin") for name in runs[0]) >= 8
