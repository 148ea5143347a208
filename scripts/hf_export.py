"""Export a state as a Hugging Face checkpoint.

python scripts/hf_export.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import export
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(export), __doc__)
