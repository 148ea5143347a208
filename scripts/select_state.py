"""Choose the one of several trained states that goes on.

python scripts/select_state.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import select
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(select), __doc__)
