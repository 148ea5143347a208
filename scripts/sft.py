"""Reach a state of a sft stage: train from the newest checkpoint, or only seal what is there.

python scripts/sft.py --stage artifacts/.stages/IDENTITY.json --at N
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.job import run
from nemoflow.training import train

if __name__ == "__main__":
    run(train, __doc__)
