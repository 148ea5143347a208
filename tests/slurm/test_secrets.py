"""Tokens reach jobs through the environment alone: never a file, a command line, a log or a record."""

import subprocess
from pathlib import Path

import psutil
from box import Box

TOKENS = {"HF_TOKEN": "hf_planted0token1of2the3test", "WANDB_API_KEY": "planted4key5of6the7test"}


def on_command_lines() -> list[list[str]]:
    found = (p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    return [words for words in found if any(token in word for word in words for token in TOKENS.values())]


def holding(root: Path) -> list[Path]:
    """Files below `root` in which a token stands."""
    secrets = [token.encode() for token in TOKENS.values()]
    files = (p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    return [p for p in files if any(secret in p.read_bytes() for secret in secrets)]


def test_secrets_reach_jobs_by_the_environment_alone(slurm: Box, demo, tmp_path: Path):
    demo.set("phase1", overrides={"sleep.seconds": 0.5})
    command = demo._command("pretrain/demo@phase1", "--verbose", "-p")
    command["env"] |= TOKENS
    log = tmp_path / "said.log"
    with log.open("w") as file:
        child = subprocess.Popen(**command, stdout=file, stderr=subprocess.STDOUT)
    trajectory = demo.wait_for("pretrain", 5, seconds=90)
    trainer = demo.owners(trajectory)[-1]
    assert {name: trainer.environ()[name] for name in TOKENS} == TOKENS
    assert on_command_lines() == []
    job = slurm.run("scontrol", "show", "job", "--details") + slurm.run("squeue", "--format=%all")
    child.wait(timeout=180)
    said = log.read_text()
    assert child.returncode == 0, said
    for token in TOKENS.values():
        assert token not in job
        assert token not in said
    assert holding(demo.path) == []
    # Slurm itself keeps what sbatch exports, for root alone, as long as it knows the job
    outside = [p for p in holding(slurm.dir) if p.stat().st_mode & 0o077 and "state" not in p.parts]
    assert outside == []
