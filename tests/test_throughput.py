"""The benchmark of tokens per second runs: both sides, each through its own entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_fixtures import MODEL

BASE = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path):
    overrides = MODEL | {"train.global_batch_size": 4, "train.micro_batch_size": 4}
    (tmp_path / "overrides.json").write_text(json.dumps(overrides))
    command = [sys.executable, "-m", "benchmarks.throughput", "--iterations", "30", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--overrides", str(tmp_path / "overrides.json")],
        cwd=BASE,
        env=os.environ | {"NEMOFLOW_CPU": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for side in ("ours", "theirs"):
        assert re.search(rf"^{side}: \d+, \d+ ms per iteration$", done.stdout, re.M)
        assert re.search(rf"^{side}: [\d,]+ tokens/s$", done.stdout, re.M)
    ratio = float(re.search(r"^ratio: ([\d.]+)$", done.stdout, re.M)[1])
    assert 0.2 < ratio < 5
