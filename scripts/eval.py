"""Evaluate an export with one task of lm-evaluation-harness.

python scripts/eval.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import evaluation
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(evaluation), __doc__)
