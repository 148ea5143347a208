"""Ray over the nodes of a job: 2 nodes x 4 GPUs, a driver on the first, and nothing left behind."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from box import Box, wait
from graph import BASE

DRIVER = """\
import os, sys
import ray

# What NeMo-RL's drivers do first: attach, count the GPUs, place a group with a bundle on every node
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
gpus = int(ray.cluster_resources()["GPU"])
group = ray.util.placement_group([{"CPU": 1, "GPU": 4}] * 2, strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=60)

@ray.remote(num_gpus=4)
def where():
    return ray.get_runtime_context().get_node_id()

strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
nodes = [ray.get(where.options(scheduling_strategy=strategy(group, i)).remote()) for i in range(2)]
print("driver:", gpus, len(set(nodes)), flush=True)
sys.exit(int(sys.argv[1]))
"""

JOB = """\
import json, os, subprocess, sys
from pathlib import Path
from nemoflow import launch, slurm
here, code = Path(sys.argv[1]), sys.argv[2]
cluster = json.loads((here / "cluster.json").read_text())
resources = {"nodes": 2, "gpus_per_node": 4}
started = launch.launch([sys.executable, str(here / "driver.py"), code], resources, cluster, "ray", here / "ray")
environment = {**os.environ, **started.environment, **cluster["more"]}
command = list(started.command)
if "ABSENT" in environment:  # a node on which nothing starts
    at = command.index(sys.executable)
    command[at:at] = ["sh", "-c", '[ $SLURM_NODEID = 0 ] && exec "$@"; sleep 60', "sh"]
sys.exit(subprocess.run(command, env=environment).returncode)
"""


@pytest.fixture
def submit(slurm: Box, tmp_path: Path):  # noqa: ARG001 - it runs
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "job.py").write_text(JOB)
    cluster = {"launcher": "slurm", "runtime": None, "image": None, "mounts": [], "env": {}, "cpus_per_gpu": 1}

    def run(code: int = 0, **more: str) -> tuple[int, str]:
        """Exit code and output of a job with this driver; afterwards nothing of Ray runs."""
        (tmp_path / "cluster.json").write_text(json.dumps(cluster | {"processes": "torchrun", "more": more}))
        command = f"PYTHONPATH={BASE} exec {sys.executable} {tmp_path}/job.py {tmp_path} {code}"
        log = tmp_path / "job.log"
        done = subprocess.run(
            ["sbatch", "--wait", "-N2", "--ntasks-per-node=4", "--gres=gpu:h100:4", f"-o{log}", f"--wrap={command}"],
            capture_output=True,
            timeout=240,
            check=False,
        )
        wait(lambda: not ray_processes(), "end of Ray", seconds=30)
        return done.returncode, log.read_text()

    return run


def ray_processes() -> list[str]:
    found = (p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    return [" ".join(words) for words in found if any("raylet" in w or "gcs_server" in w for w in words)]


def test_the_driver_sees_all_gpus_and_its_exit_code_comes_back(submit):
    code, said = submit(0)
    assert code == 0, said
    assert "driver: 8 2" in said


def test_a_driver_that_fails(submit):
    code, said = submit(3)
    assert code == 3, said
    assert "driver: 8 2" in said


def test_a_worker_that_never_comes(submit):
    code, said = submit(0, NEMOFLOW_RAY_WAIT="15", ABSENT="1")
    assert code != 0
    assert "1 of 2 nodes joined Ray within 15 s" in said
    assert "driver:" not in said


def test_a_port_that_is_taken(submit):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = submit(0, NEMOFLOW_PORT=str(taken.getsockname()[1]))
    assert code == 0, said
    assert "driver: 8 2" in said
