"""The house: lint, and what the files at the top promise."""

import re
import subprocess
import sys
from pathlib import Path

BASE = Path(__file__).resolve().parents[1]

ALLOWED = {
    # A job is started by a launcher that runs on the node and starts the container itself; Snakemake's own
    # `container:` around it would wrap srun. What runs where stands in envs/.
    r"Specify a conda environment or container for each rule",
    # help prints to the terminal.
    r"No log directive defined",
}
"""What `snakemake --lint` says of this workflow and is meant so, with the reason."""


def test_snakemake_lint_finds_nothing_but_what_is_meant():
    command = [sys.executable, "-m", "snakemake", "--lint"]
    printed = subprocess.run(command, cwd=BASE, capture_output=True, text=True).stderr
    found = set(re.findall(r"^    \* (.*):$", printed, re.M))
    assert {f for f in found if not any(re.match(a, f) for a in ALLOWED)} == set()
    assert {a for a in ALLOWED if not any(re.match(a, f) for f in found)} == set(), "allowed, but no longer said"


def test_snakefile_is_a_table_of_contents():
    assert len((BASE / "Snakefile").read_text().splitlines()) < 80


def test_library_imports_no_snakemake():
    for path in {*(BASE / "nemoflow").rglob("*.py")} - {BASE / "nemoflow/gate.py"}:  # which wraps its executor
        assert not re.search(r"^\s*(import|from) snakemake", path.read_text(), re.M), path


def test_jobs_in_a_container_need_the_checkout_and_what_the_image_has():
    """A NeMo image has Megatron, transformers, psutil and PyYAML, and this checkout on PYTHONPATH; none of these."""
    lacking = (
        "snakemake",
        "pydantic",
        "gigatoken",
        "msgspec",
        "blake3",
        "numba",
        "xxhash",
        "lm_eval",
        "matplotlib",
        "trl",
    )
    programs = ("job", "training", "export", "imports", "average", "seal", "engines.megatron_bridge.train")
    import_without(lacking, programs)


def test_what_starts_programs_needs_none_of_what_they_need():
    """On a cluster with containers Snakemake's environment has no torch: conversions and trainings do, elsewhere."""
    lacking = ("torch", "megatron", "transformers", "trl", "lm_eval", "datasets", "ray")
    import_without(
        lacking, ("training", "export", "imports", "average", "evaluation", "seal", "session", "gate", "cli")
    )
    import_without(lacking, ("engines.megatron_bridge", "engines.trl", "lineage.trace", "verify"))


def import_without(lacking: tuple[str, ...], programs: tuple[str, ...]) -> None:
    """Import the library's modules where other packages are missing."""
    program = "\n".join(
        [
            "import importlib, sys",
            f"sys.modules.update(dict.fromkeys({lacking}))",  # importing one of them is an ImportError
            *(f"importlib.import_module('nemoflow.{name}')" for name in programs),
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BASE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
