"""What a chain of Slurm jobs takes besides its training."""

import json
import subprocess
import time

from box import Box

STAGE = """
  - name: p{n}
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    init: {{from: p{before}, carry: all}}
    data: {{blend: {{words: 1}}}}
    until: {until}
    horizon: {until}
"""
FIRST = """
  - name: p1
    kind: pretrain
    engine: sleep_engine
    function: toys.toy_pretrain_config
    data: {blend: {words: 1}}
    until: 4
    horizon: 4
"""


def test_five_stages_take_less_than_a_minute_besides(slurm: Box, demo):
    """From the command to its end, less the seconds of the five attempts."""
    head, _, _ = demo.recipe().read_text().partition("stages:")
    stages = "".join(STAGE.format(n=n, before=n - 1, until=4 * n) for n in range(2, 6))
    demo.recipe("chain").write_text(f"{head}stages:{FIRST}{stages}")
    demo.nemoflow("lock", "chain", check=True)
    data = super(type(demo), demo)._command("data/chain")  # on this machine
    subprocess.run(**data, check=True, capture_output=True)
    before = slurm.jobs()
    begun = time.monotonic()
    demo.run("pretrain/chain")
    wall = time.monotonic() - begun
    assert len(slurm.jobs().keys() - before.keys()) == 5
    runs = [json.loads(p.read_text()) for p in demo.path.glob("artifacts/pretrain/*/run.json")]
    assert len(runs) == 5
    trained = sum(attempt["seconds"] for run in runs for attempt in run["attempts"])
    print(f"5 stages: {wall:.0f} s, {trained:.0f} s of it in training")
    assert wall - trained < 60
