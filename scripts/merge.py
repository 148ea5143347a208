"""Make a merge artifact.

python scripts/merge.py --stage artifacts/.stages/IDENTITY.json [--threads N]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.data import merge
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(merge), __doc__)
