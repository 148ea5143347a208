"""Make a Megatron checkpoint of a Hugging Face model.

python scripts/hf_import.py --stage artifacts/.stages/IDENTITY.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import imports
from nemoflow.job import build, run

if __name__ == "__main__":
    run(build(imports), __doc__)
