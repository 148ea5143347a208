"""A stage of NeMo-RL over 2 nodes x 4 GPUs: the engine's own program and launch, with a stand-in for the script."""

import json
import subprocess
import sys
from pathlib import Path

import nemo_rl_standin
import pytest
from box import Box, wait
from graph import BASE
from test_ray import ray_processes

from nemoflow.engines.nemo_rl.checkpoints import states

JOB = """\
import json, os, subprocess, sys
from pathlib import Path
from nemoflow import launch
from nemoflow.engines import nemo_rl
here = Path(sys.argv[1])
cluster = json.loads((here / "cluster.json").read_text())
resources = {"nodes": 2, "gpus_per_node": 4}
started = launch.launch(nemo_rl.command(here / "request.json"), resources, cluster, nemo_rl.FORM, here / "ray")
sys.exit(subprocess.run(started.command, env={**os.environ, **started.environment}).returncode)
"""


@pytest.fixture
def submit(slurm: Box, tmp_path: Path):  # noqa: ARG001 - it runs
    home = nemo_rl_standin.install(tmp_path / "home", "v0.7.0")
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / "data" / name).write_text('{"agent_ref": {"name": "mcqa_simple_agent"}}\n')
    request = {
        "algorithm": "grpo",
        "overrides": {},
        "environments": {"mcqa_simple_agent": {"gym": "resources_servers/mcqa/configs/mcqa.yaml"}},
        "prompts": str(tmp_path / "data"),
        "model": str(tmp_path / "model"),
        "horizon": 6,
        "stop": 6,
        "wanted": [6],
        "save_interval": 3,
        "keep": {"last": 2, "every": None},
        "deadline": None,
        "checkpoints": str(tmp_path / "checkpoints"),
        "scratch": str(tmp_path / "scratch"),
        "metrics": str(tmp_path / "metrics.jsonl"),
        "config": str(tmp_path / "config"),
        "stop_file": str(tmp_path / "stop"),
        "resources": {"nodes": 2, "gpus_per_node": 4},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    cluster = {"launcher": "slurm", "runtime": None, "image": None, "mounts": [], "cpus_per_gpu": 1}

    def run(**steer) -> tuple[int, str]:
        """Exit code and output of a job that trains the stage; afterwards nothing of Ray runs."""
        own = {"NEMO_RL": str(home), "NEMOFLOW_POLL": "0.5", "STANDIN": json.dumps({"nodes": 2} | steer)}
        (tmp_path / "cluster.json").write_text(json.dumps(cluster | {"processes": "torchrun", "env": own}))
        command = f"PYTHONPATH={BASE} exec {sys.executable} {tmp_path}/job.py {tmp_path}"
        log = tmp_path / "job.log"
        log.unlink(missing_ok=True)  # this Slurm appends
        done = subprocess.run(
            ["sbatch", "--wait", "-N2", "--ntasks-per-node=4", "--gres=gpu:h100:4", f"-o{log}", f"--wrap={command}"],
            capture_output=True,
            timeout=240,
            check=False,
        )
        wait(lambda: not ray_processes(), "end of Ray", seconds=30)
        return done.returncode, log.read_text()

    return run


def test_a_stage_over_two_nodes_whose_time_is_up_and_that_goes_on(submit, tmp_path: Path):
    code, said = submit(time_up_after=4)
    assert code == 0, said
    assert "stand-in: 8 GPUs on 2 nodes" in said
    assert "nemoflow: unfinished: step 4 of 6" in said
    code, said = submit()
    assert code == 0, said
    assert "stand-in: from 4 to 6" in said
    assert "unfinished" not in said
    assert max(states(tmp_path / "checkpoints")) == 6
    entries = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(entries)) == [1, 2, 3, 4, 5, 6]


def test_a_script_that_fails_fails_the_job(submit):
    code, said = submit(fail_at=2)
    assert code != 0
    assert "the stand-in fails" in said
