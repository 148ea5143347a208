"""Average the weights of trained states.

python scripts/average.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import average
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(average), __doc__)
