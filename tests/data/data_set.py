"""Builds a small data set of every kind, as the stages of a recipe would: `python data_set.py DIRECTORY`."""

import inspect
import json
import platform
import sys
from pathlib import Path

from nemoflow import kinds
from nemoflow.data import blend, chats, merge, prompts, shards, sources, tokenizer
from nemoflow.data.made import Made

SOURCE = {"seed": 0, "shards": 2, "python": platform.python_version(), "args": {}}


def stage(root: Path, kind: str, label: str, make, inputs: dict, **settings) -> Path:
    """Make one artifact under root/kind/label, with its payload and measures in sealed.json; its directory."""
    out = root / kind / label
    out.mkdir(parents=True)
    payload = kinds.complete({"kind": kind} | settings)
    offered = {"threads": 2, "launch": {}}
    more = {k: offered[k] for k in offered.keys() & inspect.signature(make).parameters.keys()}
    made = make(payload, inputs, out, print, **more)
    measures = made.measures if isinstance(made, Made) else made
    labels = [{"role": role, "label": path.name} for role, path in inputs.items() if isinstance(path, Path)]
    (out / "sealed.json").write_text(json.dumps({"payload": payload, "inputs": labels, "measures": measures}))
    return out


def build(root: Path) -> dict[str, Path]:
    """Every kind of artifact, by a short name."""
    made = {
        name: stage(root, "source", name, sources.make, {}, generator=name, **SOURCE | {"args": args})
        for name, args in {
            "stdlib_topics": {},
            "stdlib_docstrings": {},
            "stdlib_chats": {},
            "arithmetic_chats": {"count": 300},
            "arithmetic_rl": {},
            "arithmetic_preferences": {},
            "comparison_chats": {},
            "comparison_rl": {},
            "object_chats": {},
            "object_rl": {},
        }.items()
    }
    texts = [made["stdlib_topics"], made["stdlib_docstrings"]]
    made["tokenizer"] = stage(root, "tokenizer", "bpe", tokenizer.make, {"sources": texts}, vocab_size=1024)
    parts = []
    for source in texts:
        inputs = {"source": source, "tokenizer": made["tokenizer"]}
        cut = stage(root, "shards", source.name, shards.make, inputs, shards=[[[0]], [[1]]])
        made[f"shards/{source.name}"] = cut
        merged = stage(root, "merge", source.name, merge.make, {"parts": [cut], "source": source}, parts=["x"])
        made[f"merge/{source.name}"] = merged
        parts.append(merged)
    shares = [{"merge": "x", "share": "3/10"}, {"merge": "y", "share": "7/10"}]
    made["blend"] = stage(root, "blend", "b", blend.make, {"parts": parts}, parts=shares)
    made["chats"] = stage(
        root,
        "chats",
        "c",
        chats.make,
        {"sources": [made["stdlib_chats"], made["arithmetic_chats"]], "tokenizer": made["tokenizer"]},
        parts=[{"source": "x"}, {"source": "y", "repeat": "2"}],
        pack_size=256,
    )
    made["prompts"] = stage(
        root,
        "prompts",
        "p",
        prompts.make,
        {"sources": [made["arithmetic_rl"]], "placeholder_sources": []},
        parts=[{"source": "x"}],
        valid="1/10",
    )
    return made


if __name__ == "__main__":
    build(Path(sys.argv[1]))
