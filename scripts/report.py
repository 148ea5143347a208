"""Draw the report of an export and its evaluations, and of all they come from, from their records.

python scripts/report.py report/nano3-tiny hf_export=../../artifacts/hf_export/grpo-rl-50-0123456789ab
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.errors import NemoflowError
from nemoflow.report.made import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", type=Path)
    parser.add_argument("links", nargs="+", metavar="SUB=TARGET")
    args = parser.parse_args()
    try:
        write(args.name, dict(link.split("=", 1) for link in args.links))
    except NemoflowError as error:
        raise SystemExit(f"nemoflow: error: {error}") from None
