"""The toy recipe through Slurm, from nothing, as people call it: `snakemake --profile slurm hf_export/nano3-tiny`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from box import Box
from graph import BASE

from nemoflow.session import Session

NAME = "hf_export/nano3-tiny"


def snakemake(path: Path, *args: str) -> str:
    """In a directory that holds recipes; with the profile found by its name, as in a clone."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(BASE / "Snakefile"), *args]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=1500)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def directory(path: Path) -> Path:
    """The recipe with a micro batch of 4 in pretraining, which is no identity, so that four ranks can share a batch."""
    shutil.copytree(BASE / "config", path / "config")
    recipe = path / "config/recipes/nano3-tiny.yaml"
    text = recipe.read_text()
    assert "train.micro_batch_size: 16" in text
    recipe.write_text(text.replace("train.micro_batch_size: 16", "train.micro_batch_size: 4"))
    (path / "slurm").symlink_to(BASE / "profiles/slurm")
    return path


def artifacts(path: Path) -> dict[str, dict]:
    return {str(p.parent.relative_to(path)): json.loads(p.read_text()) for p in path.glob("artifacts/**/sealed.json")}


def test_the_whole_chain(slurm: Box, tmp_path: Path):
    """From nothing, with pretraining on 2 nodes x 2 ranks, to the same identities as on one machine."""
    work = directory(tmp_path / "cluster")
    cluster = {"gpu": "h100", "partition": "batch", "cpus_per_gpu": 1}
    cluster["stages"] = {"phase1": {"nodes": 2, "gpus_per_node": 2}, "phase2": {"nodes": 2, "gpus_per_node": 2}}
    (work / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    said = snakemake(work, "--profile", "slurm", NAME)
    found = artifacts(work)
    for trajectory in work.glob("artifacts/pretrain/*"):
        log = (trajectory / "attempts/1.log").read_text()
        assert "--nodes=2 --ntasks=2" in log
        assert "nemoflow.launch.node torchrun 2" in log
        assert "tensor_model_parallel_size: 1" in (trajectory / "attempts/1.config.yaml").read_text()
        assert json.loads((trajectory / "run.json").read_text())["attempts"][0]["job"]["id"] in slurm.jobs()
    assert "valid loss" in said

    # The same addresses, and the data byte for byte, as without Slurm
    local = directory(tmp_path / "local")
    snakemake(local, "data/nano3-tiny")
    data = artifacts(local)
    assert data.keys() <= found.keys()
    for name, record in data.items():
        assert record == found[name], name
    session = Session(local / "artifacts", [BASE / "config/recipes"])
    session.resolve([NAME])
    (target,) = session.names[NAME].values()
    assert (work / NAME).resolve() == work / target.directory.relative_to(local)
    # Nothing is left to do, and that is known without a job
    before = slurm.jobs()
    assert "Nothing to be done" in snakemake(work, "--profile", "slurm", NAME)
    assert slurm.jobs().keys() == before.keys()
    # Logs of jobs that succeeded are kept
    assert len(list((work / "logs/slurm").rglob("*.log"))) == len(before)
