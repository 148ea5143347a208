"""Kind `blend`: which shards a training stage reads and with which weights. Tokens are not touched.

Weights are given per prefix, since Megatron draws from a prefix by its weight whatever its size: a prefix has
share x its tokens / its source's tokens, so that all documents of a source are drawn equally often.
"""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from nemoflow.data.rows import SPLITS
from nemoflow.errors import NemoflowError


def _measures(shards: Path) -> dict:
    try:
        return json.loads((shards / "sealed.json").read_text(encoding="utf-8"))["measures"]
    except (OSError, ValueError, KeyError) as error:
        raise NemoflowError(f"{shards}/sealed.json: cannot be read ({error}); the shards are incomplete") from None


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write blend.json: {split: [[prefix, weight], ...]}, prefixes relative to the artifact's directory, in order of
    the parts, weights as exact fractions.

    `payload` is {"parts": [{"shards", "share": exact fraction}]}; inputs["parts"] are the shards in the same order. A
    part without tokens in valid or test is left out there; the others keep their ratio.

    Returns {"tokens": {split: n}, "documents": {split: n}}: what one pass over everything has.

    Raises NemoflowError when the shares do not add up to 1, the parts were tokenized differently, or one of them has
    nothing to train on.
    """
    total = sum(Fraction(part["share"]) for part in payload["parts"])
    if total != 1:
        raise NemoflowError(f"blend: the shares add up to {total}, not 1")
    parts = [_measures(shards) for shards in inputs["parts"]]
    for shards, measures in zip(inputs["parts"], parts, strict=True):
        for key in ("eod", "dtype", "vocab_size"):
            if measures[key] != parts[0][key]:
                raise NemoflowError(
                    f"blend: {shards.name} has {key} {measures[key]}, {inputs['parts'][0].name} has {parts[0][key]}; "
                    "blend shards of one tokenizer"
                )
        if not measures["prefixes"]["train"]:
            raise NemoflowError(f"blend: {shards.name} has nothing to train on")
    blend = {}
    counts: dict[str, dict[str, int]] = {"tokens": {}, "documents": {}}
    for split in SPLITS:
        blend[split] = []
        for key in counts:
            counts[key][split] = sum(entry[key] for measures in parts for entry in measures["prefixes"][split])
        for part, shards, measures in zip(payload["parts"], inputs["parts"], parts, strict=True):
            tokens = sum(entry["tokens"] for entry in measures["prefixes"][split])
            for entry in measures["prefixes"][split]:
                weight = Fraction(part["share"]) * Fraction(entry["tokens"], tokens)
                blend[split].append([f"../../shards/{shards.name}/{entry['prefix']}", str(weight)])
    (out / "blend.json").write_text(json.dumps(blend, indent=1) + "\n", encoding="utf-8")
    progress(f"{counts['tokens']['train']:,} tokens to train on, {counts['tokens']['valid']:,} to validate")
    return counts
