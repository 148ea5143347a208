"""Make a chats artifact.

python scripts/chats.py --stage artifacts/.stages/IDENTITY.json [--threads N]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.data import chats
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(chats), __doc__)
