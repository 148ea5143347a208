"""Make digests of all files of a trained state.

python scripts/seal.py artifacts/pretrain/LABEL-IDENTITY/at-N/digests.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemoflow import seal
from nemoflow.errors import NemoflowError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digests", type=Path, help="the file to write, beside the state's sealed.json")
    parser.add_argument("--threads", type=int, default=1, help="files read at a time")
    parser.add_argument("--log", type=Path, help="where what is said goes too")
    args = parser.parse_args()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(f"digests of {args.digests.parent}: {text}", file=sys.stderr, flush=True)

    try:
        seal.make(args.digests.parent, say, args.threads)
    except NemoflowError as error:
        lines.append(str(error))
        raise SystemExit(f"nemoflow: error: {error}") from None
    finally:
        if args.log:
            args.log.parent.mkdir(parents=True, exist_ok=True)
            args.log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
