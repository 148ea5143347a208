"""One program as several processes: what starts them, whose failure is told, and that none outlives the others."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from graph import Work

from nemoflow import cpu, launch, slurm, training
from nemoflow.errors import NemoflowError

BASE = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "program", "request.json"]

FAILURE = """\
import os, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2"
if rank == 1:
    {what}
time.sleep(60)
"""


def resources(nodes: int = 1, gpus: int = 1) -> dict:
    return {"nodes": nodes, "gpus_per_node": gpus, "gpu": None}


def environment(**more: str) -> dict[str, str]:
    return training.environment() | {"NEMOFLOW_CPU": "1"} | more


def failing(what: str) -> list[str]:
    """What is written when process 1 of two does `what` and process 0 waits."""
    command = launch.launch([sys.executable, "-c", FAILURE.format(what=what)], resources(gpus=2)).command
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode != 0
    return done.stdout.splitlines()


def test_one_process_is_the_program_itself(monkeypatch):
    monkeypatch.setattr(cpu, "needed", lambda: True)
    assert launch.launch(PROGRAM, resources()).command == PROGRAM
    assert launch.launch(PROGRAM, resources(gpus=2)).command[-len(PROGRAM) :] == PROGRAM


def test_another_machine_is_not_to_be_had(monkeypatch):
    monkeypatch.setattr(cpu, "needed", lambda: True)
    with pytest.raises(NemoflowError, match=r"resources\.nodes: 4: this machine is one node"):
        launch.launch(PROGRAM, resources(4, 8))


@pytest.mark.parametrize("there", [0, 1])
def test_more_gpus_than_there_are(monkeypatch, there):
    monkeypatch.setattr(cpu, "needed", lambda: False)
    monkeypatch.setattr(launch, "_gpus", lambda: there)
    with pytest.raises(NemoflowError, match=rf"resources\.gpus_per_node: 2: this machine has {there}"):
        launch.launch(PROGRAM, resources(gpus=2))
    if there:
        assert launch.launch(PROGRAM, resources()).command == PROGRAM


def test_a_stage_that_wants_another_machine_is_refused(demo):
    demo.set("rl", until=12, resources={"nodes": 2})
    assert "resources.nodes: 2: this machine is one node" in demo.refused("rl/demo")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise ValueError('no such thing')", "the trainer: process 1 failed: ValueError: no such thing"),
        pytest.param("sys.exit('nemoflow: error: overrides.a: is b')", "overrides.a: is b", marks=pytest.mark.slow),
        ("os.kill(os.getpid(), 9)", "the trainer: process 1 was killed by SIGKILL, as when memory runs out"),
        pytest.param("sys.exit(3)", "the trainer: process 1 failed with exit code 3", marks=pytest.mark.slow),
    ],
)
def test_the_first_to_fail_is_told(what, said):
    assert training.reason(failing(what), "the trainer") == said


def test_among_tracebacks_that_of_the_first_to_fail_is_told():
    """As torch 2.11 writes them: each process its own once they know each other, and torchrun a summary."""
    lines = [
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "train.py", line 1, in run',
        "[rank1]: RuntimeError: the shape is wrong",
        "[rank0]: Traceback (most recent call last):",
        "[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:2222",
        "E1123 05:51:00 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 1) local_rank: 1",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "Root Cause (first observed failure):",
        "[0]:",
        "  rank      : 1 (local_rank: 1)",
        "  exitcode  : 1 (pid: 77)",
        "============================================================",
    ]
    assert launch.reason(lines) == "process 1 failed: RuntimeError: the shape is wrong"
    assert launch.reason(lines[:5]) is None


def test_processes_end_with_torchrun_however_that_ends(tmp_path):
    program = f"import os, time, pathlib; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)"
    command = launch.launch([sys.executable, "-c", program], resources(gpus=2)).command
    torchrun = subprocess.Popen(command, env=environment())
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    finally:
        torchrun.kill()
        torchrun.wait()
    _, alive = psutil.wait_procs(processes, 10)
    assert not alive


@pytest.mark.slow
def test_a_stage_of_the_demo_as_two_processes(tmp_path):
    """By the workflow, with a stop between, and its experts dealt out."""
    recipe = yaml.safe_load((BASE / "config/recipes/nano3-tiny.yaml").read_text())
    recipe["stages"] = recipe["stages"][:1]
    del recipe["eval"]
    recipe["stages"][0] |= {"resources": {"gpus_per_node": 2}}
    recipe["overrides"]["megatron_bridge"] |= {
        "train.micro_batch_size": 8,
        "model.expert_model_parallel_size": 2,
        "model.moe_token_dispatcher_type": "alltoall",
    }
    work = Work(tmp_path)
    work.recipe("two").parent.mkdir(parents=True)

    def train(until: int) -> list[dict]:
        recipe["stages"][0]["until"] = until
        work.recipe("two").write_text(yaml.safe_dump(recipe, sort_keys=False))
        work.run("pretrain/two")
        lines = (work.trajectory("pretrain/two") / "metrics.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if "loss" in entry]

    first = train(4)
    assert [entry["iteration"] for entry in first] == [1, 2, 3, 4]
    both = train(8)
    assert [entry["iteration"] for entry in both] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert both[:4] == first
    assert both[7]["loss"] < both[0]["loss"] - 0.3
    config = yaml.safe_load((work.path / "pretrain/two/checkpoint/run_config.yaml").read_text())
    assert config["model"]["expert_model_parallel_size"] == 2


# -- in a Slurm job, to the exact command line: containers are not here to be run -------------------------------------

CLUSTER = {
    "launcher": "slurm",
    "runtime": None,
    "image": None,
    "mounts": ["/data", "/scratch:/tmp/scratch:ro"],
    "env": {"NCCL_SOCKET_IFNAME": "ib0"},
    "cpus_per_gpu": 4,
    "processes": "torchrun",
}


@pytest.fixture
def job(monkeypatch, tmp_path):
    """As if this process were the batch script of a job on two nodes."""
    found = slurm.Job(7, "RUNNING", 1, ["n1", "n2"], None, "batch", "", str(tmp_path), [])
    monkeypatch.setattr(slurm, "here", lambda: found)
    monkeypatch.setattr(slurm, "addresses", lambda nodes: [f"10.0.0.{n[1:]}" for n in nodes])
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.usefixtures("job")
def test_torchrun_on_each_node():
    started = launch.launch(PROGRAM, resources(2, 8), CLUSTER)
    assert started.command == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--cpu-bind=none"),
        *("--kill-on-bad-exit=1", "--mpi=none", "--unbuffered"),
        *(sys.executable, "-m", "nemoflow.launch.node", "torchrun", "8", *PROGRAM),
    ]
    port = started.environment.pop("NEMOFLOW_PORT")
    assert 1024 < int(port) < 65536
    assert started.environment == {
        "NCCL_SOCKET_IFNAME": "ib0",
        "NEMOFLOW_NODES": "10.0.0.1,10.0.0.2",
        "NEMOFLOW_RUN": "7.1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert str(started) == launch.described(PROGRAM, resources(2, 8), CLUSTER)


@pytest.mark.usefixtures("job")
def test_a_task_for_each_gpu():
    command = launch.launch(PROGRAM, resources(2, 8), CLUSTER | {"processes": "srun"}).command
    assert command[1:5] == ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=4"]
    assert command[9:] == [sys.executable, "-m", "nemoflow.launch.node", "srun", "8", *PROGRAM]


@pytest.mark.usefixtures("job")
def test_the_nodes_that_the_job_has_count():
    assert "--nodes=2" in launch.launch(PROGRAM, resources(16, 8), CLUSTER).command


@pytest.mark.usefixtures("job")
def test_pyxis(tmp_path):
    cluster = CLUSTER | {"runtime": "pyxis", "image": "nvcr.example/nvidia/nemo:26.06"}
    command = launch.launch(PROGRAM, resources(2, 8), cluster).command
    assert command[9:] == [
        "--container-image=nvcr.example/nvidia/nemo:26.06",
        f"--container-mounts={tmp_path}:{tmp_path},{BASE}:{BASE},/data:/data,/scratch:/tmp/scratch:ro",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
        "--container-env=PYTHONPATH,PYTHONUNBUFFERED,NEMOFLOW_NODES,NEMOFLOW_PORT,NEMOFLOW_RUN,NEMOFLOW_STATE",
        *("python3", "-m", "nemoflow.launch.node", "torchrun", "8", "python3", *PROGRAM[1:]),
    ]
    once = launch.once(PROGRAM, cluster).command
    assert once[:4] == ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    assert once[-4:] == ["python3", *PROGRAM[1:]]


@pytest.mark.usefixtures("job")
def test_apptainer(tmp_path):
    cluster = CLUSTER | {"runtime": "apptainer", "image": "/images/nemo.sif"}
    started = launch.launch(PROGRAM, resources(2, 8), cluster)
    assert started.command[9:] == [
        *("apptainer", "exec", "--nv", "--no-home"),
        *("--bind", f"{tmp_path}:{tmp_path}", "--bind", f"{BASE}:{BASE}", "--bind", "/data:/data"),
        *("--bind", "/scratch:/tmp/scratch:ro", "--pwd", str(tmp_path), "/images/nemo.sif"),
        *("python3", "-m", "nemoflow.launch.node", "torchrun", "8", "python3", *PROGRAM[1:]),
    ]
    assert started.environment["APPTAINERENV_PYTHONPATH"].split(":")[0] == str(BASE)


def test_one_process_needs_no_launcher(job, monkeypatch):
    monkeypatch.setattr(slurm, "here", lambda: dataclasses.replace(job, nodes=["n1"]))
    assert launch.launch(PROGRAM, resources(), CLUSTER) == launch.Launch(PROGRAM, CLUSTER["env"])


def test_outside_of_a_job_a_stage_prepared_for_slurm_says_so(monkeypatch):
    monkeypatch.setattr(slurm, "here", lambda: None)
    with pytest.raises(NemoflowError, match="prepared to run as a Slurm job, and this is none"):
        launch.launch(PROGRAM, resources(), CLUSTER)


def test_each_task_becomes_a_rank_or_torchrun(capfd):
    """What the tasks of a step turn into, told by a program that prints it."""
    environ = {"NEMOFLOW_NODES": "127.0.0.1", "NEMOFLOW_PORT": "29555", "NEMOFLOW_RUN": "7.0", "SLURM_NODEID": "0"}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = f"import os; os.write(1, (' '.join(os.environ[n] for n in {names}) + chr(10)).encode())"  # in one piece
    for form, more in (("srun", {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}), ("torchrun", {})):
        command = [sys.executable, "-m", "nemoflow.launch.node", form, "2", sys.executable, "-c", told]
        subprocess.run(command, env=environment(**environ, **more), check=True, timeout=60)
    ranks = [line.split()[:3] for line in capfd.readouterr().out.splitlines()]
    assert ranks[0] == ["1", "1", "2"]
    assert sorted(ranks[1:]) == [["0", "0", "2"], ["1", "1", "2"]]


def test_an_image_is_known_by_its_content(tmp_path):
    image, store = tmp_path / "nemo.sif", tmp_path / "artifacts"
    store.mkdir()
    image.write_bytes(b"squashed")
    digest = hashlib.sha256(b"squashed").hexdigest()
    assert launch.identified(str(image), store) == f"{image}@sha256:{digest}"
    known = json.loads((store / ".images.json").read_text())
    (store / ".images.json").write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    assert launch.identified(str(image), store).endswith("0" * 64), "read once"
    image.write_bytes(b"other content")
    other = hashlib.sha256(b"other content").hexdigest()
    assert launch.identified(str(image), store) == f"{image}@sha256:{other}"
    assert launch.identified("nvidia/nemo:26.06", store) == "nvidia/nemo:26.06"
