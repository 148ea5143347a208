"""Kind `blend`: which tokenized sources a training stage reads and with which weights. Tokens are not touched.

    weights.json    what defines it: {split: [[prefix relative to this directory, weight as an exact fraction], ...]}
    blend.json      the same as Megatron-Bridge reads it (per_split_data_args_path): {split: [weight, prefix, ...]}
                    with absolute prefixes. For this place only, hence not sealed, and not read by our own trainer
    summary.csv     a line per source: share, documents, tokens by split, bytes, what was dropped and why
    summary.svg     the same to look at

Weights are given per prefix, since Megatron draws from a prefix by its weight whatever its size: a prefix has
share x its tokens / its source's tokens, so that all documents of a source are drawn equally often.
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from nemoflow.data.made import Made
from nemoflow.data.rows import SPLITS
from nemoflow.errors import NemoflowError


def _sealed(merge: Path) -> dict:
    try:
        return json.loads((merge / "sealed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NemoflowError(f"{merge}/sealed.json: cannot be read ({error}); it is incomplete") from None


def _name(sealed: dict) -> str:
    """The label of a merge's source."""
    return next(entry["label"] for entry in sealed["inputs"] if entry["role"] == "source")


def prefix_weights(shares: Sequence[Fraction], parts: Sequence[dict], split: str) -> list[list[tuple[str, Fraction]]]:
    """The prefixes of a split with their weights, for each part: share x tokens of the prefix / tokens of the part.

    `parts` are the measures of merges. The weights of a split add up to what the shares do.
    """
    found = []
    for share, measures in zip(shares, parts, strict=True):
        prefixes = measures["prefixes"][split]
        total = sum(prefix["tokens"] for prefix in prefixes)
        found.append([(prefix["prefix"], share * Fraction(prefix["tokens"], total)) for prefix in prefixes])
    return found


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> Made:
    """Write weights.json, blend.json, summary.csv and summary.svg.

    `payload` is {"parts": [{"merge", "share": exact fraction}]}; inputs["parts"] are the merges in the same order.

    Returns as measures {"tokens": {split: n}, "documents": {split: n}}: what one pass over everything has, and "parts":
    [{"source": label, "share", "tokens": {split: n}}].

    Raises NemoflowError when the shares do not add up to 1, the parts were tokenized differently, or one of them lacks
    a split.
    """
    shares = [Fraction(part["share"]) for part in payload["parts"]]
    if sum(shares) != 1:
        raise NemoflowError(f"blend: the shares add up to {sum(shares)}, not 1")
    merges: list[Path] = inputs["parts"]
    records = [_sealed(merge) for merge in merges]
    parts = [record["measures"] for record in records]
    for merge, measures in zip(merges, parts, strict=True):
        for key in ("eod", "dtype", "vocab_size"):
            if measures[key] != parts[0][key]:
                raise NemoflowError(
                    f"blend: {merge.name} has {key} {measures[key]}, {merges[0].name} has {parts[0][key]}; blend "
                    "sources of one tokenizer"
                )
        for split in SPLITS:
            if not measures["prefixes"][split]:
                raise NemoflowError(f"blend: {merge.name} has nothing in its {split} split")
    weights, for_bridge = {}, {}
    for split in SPLITS:
        found = prefix_weights(shares, parts, split)
        pairs = [(m, p, w) for m, each in zip(merges, found, strict=True) for p, w in each]
        weights[split] = [[f"../../merge/{merge.name}/{prefix}", str(weight)] for merge, prefix, weight in pairs]
        for_bridge[split] = [
            text for merge, prefix, weight in pairs for text in (repr(float(weight)), str(merge.absolute() / prefix))
        ]
    (out / "weights.json").write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
    (out / "blend.json").write_text(json.dumps(for_bridge, indent=1) + "\n", encoding="utf-8")
    labels = [_name(record) for record in records]
    # Two sources of local files may have the same label; their merges' names hold identities.
    names = [label if labels.count(label) == 1 else merge.name for label, merge in zip(labels, merges, strict=True)]
    table = _table(names, shares, parts)
    table.to_csv(out / "summary.csv", index=False, lineterminator="\n")
    _draw(names, shares, parts, out / "summary.svg")
    counts = {
        key: {split: sum(prefix[key] for m in parts for prefix in m["prefixes"][split]) for split in SPLITS}
        for key in ("tokens", "documents")
    }
    listed = [
        {"source": name, "share": str(share), "tokens": _by_split(measures)}
        for name, share, measures in zip(names, shares, parts, strict=True)
    ]
    progress(f"{counts['tokens']['train']:,} tokens to train on, {counts['tokens']['valid']:,} to validate")
    from nemoflow.job import contents  # the usual digests, of all but what holds this place's paths

    sealed = [file for file in contents(out) if file["name"] != "blend.json"]
    return Made({**counts, "parts": listed}, sealed)


def _by_split(measures: dict) -> dict[str, int]:
    return {split: sum(prefix["tokens"] for prefix in measures["prefixes"][split]) for split in SPLITS}


def _table(names: Sequence[str], shares: Sequence[Fraction], parts: Sequence[dict]):
    """A pandas table with a line per source."""
    import pandas as pd  # takes a while to import, and only this job needs it

    rows = [
        {
            "source": name,
            "share": str(share),
            "documents": m["documents"],
            "tokens": m["tokens"],
            **{f"{split} tokens": tokens for split, tokens in _by_split(m).items()},
            "bytes": m["bytes"],
            "bytes per token": round(m["bytes"] / m["tokens"], 3),
            "tokens per document": round(m["tokens"] / m["documents"], 1),
            "shards": m["shards"],
            "rows": m["rows"],
            "dropped": sum(m["dropped"].values()),
            **{f"dropped: {reason}": count for reason, count in m["dropped"].items()},
            "spelling control tokens": m["control_strings"],
        }
        for name, share, m in zip(names, shares, parts, strict=True)
    ]
    table = pd.DataFrame(rows)
    reasons = [column for column in table.columns if column.startswith("dropped: ")]
    table[reasons] = table[reasons].fillna(0).astype(int)
    return table


def _draw(names: Sequence[str], shares: Sequence[Fraction], parts: Sequence[dict], path: Path) -> None:
    from nemoflow.data import picture

    picture.blend(names, [float(share) for share in shares], parts, path)
