"""Ask a model the questions of a task: python -m nemoflow.evaluation JOB OUT

JOB: as JSON, {"payload", "launch", "model": directory, "sources": directories}. What was measured goes to
OUT/measures.json.
"""

import json
import sys
from pathlib import Path

from nemoflow.conversion import said
from nemoflow.evaluation import evaluate


def main(job: dict, out: Path) -> None:
    inputs = {"model": Path(job["model"]), "sources": [*map(Path, job["sources"])]}
    measures = evaluate(job["payload"], inputs, out, job["launch"])
    (out / "measures.json").write_text(json.dumps(measures), encoding="utf-8")


if __name__ == "__main__":
    said(Path(sys.argv[2]), main, json.loads(sys.argv[1]), Path(sys.argv[2]))
