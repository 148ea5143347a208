"""Make a name: a link to an artifact, or a directory of links.

python scripts/name.py sft/nano3-tiny =../artifacts/sft/nemotron-3-nano-0123456789ab/at-40
python scripts/name.py data/nano3-tiny sft=../../artifacts/chats/packed-256-0123456789ab
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow.errors import NemoflowError
from nemoflow.session import show

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", type=Path)
    parser.add_argument("links", nargs="+", metavar="[SUB]=TARGET")
    args = parser.parse_args()
    try:
        show(args.name, dict(link.split("=", 1) for link in args.links))
    except NemoflowError as error:
        raise SystemExit(f"nemoflow: error: {error}") from None
