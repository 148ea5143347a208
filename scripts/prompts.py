"""Make a prompts artifact.

python scripts/prompts.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.data import prompts
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(prompts), __doc__)
