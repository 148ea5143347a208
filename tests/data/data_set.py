"""Builds a small data set of every kind, as the stages of a recipe would: `python data_set.py DIRECTORY`."""

import json
import platform
import sys
from pathlib import Path

from nemoflow.data import blend, chats, generate, prompts, shards, tokenizer

PAYLOADS = {
    "source": {"seed": 0, "shards": 2, "python": platform.python_version(), "args": {}},
    "tokenizer": {"vocab_size": 1024, "chat_template": "chatml"},
    "shards": {"valid": "1/50", "test": "1/50", "text_field": "text", "append_eod": True, "max_broken": "1/1000"},
    "chats": {"pack_size": 256, "valid": "1/20", "seed": 0, "too_long": "drop", "max_broken": "1/1000"},
    "prompts": {"valid": "1/10", "max_broken": "0"},
}


def stage(root: Path, kind: str, label: str, make, inputs: dict, **settings) -> Path:
    """Make one artifact under root/kind/label, with its measures in sealed.json, and return its directory."""
    out = root / kind / label
    out.mkdir(parents=True)
    measures = make(PAYLOADS.get(kind, {}) | settings, inputs, out, print)
    (out / "sealed.json").write_text(json.dumps({"measures": measures}))
    return out


def build(root: Path) -> dict[str, Path]:
    """Every kind of artifact, by a short name."""
    made = {
        name: stage(root, "source", name, generate.make, {}, generator=name, args=args)
        for name, args in {
            "stdlib_topics": {},
            "stdlib_docstrings": {},
            "stdlib_chats": {},
            "arithmetic_chats": {"count": 300},
            "arithmetic_rl": {},
        }.items()
    }
    texts = [made["stdlib_topics"], made["stdlib_docstrings"]]
    made["tokenizer"] = stage(root, "tokenizer", "bpe", tokenizer.make, {"sources": texts})
    parts = []
    for source in texts:
        made[f"shards/{source.name}"] = stage(
            root, "shards", source.name, shards.make, {"source": source, "tokenizer": made["tokenizer"]}
        )
        parts.append(made[f"shards/{source.name}"])
    made["blend"] = stage(
        root, "blend", "b", blend.make, {"parts": parts}, parts=[{"share": "3/10"}, {"share": "7/10"}]
    )
    made["chats"] = stage(
        root,
        "chats",
        "c",
        chats.make,
        {"sources": [made["stdlib_chats"], made["arithmetic_chats"]], "tokenizer": made["tokenizer"]},
        parts=[{}, {"repeat": 2}],
    )
    made["prompts"] = stage(root, "prompts", "p", prompts.make, {"sources": [made["arithmetic_rl"]]})
    return made


if __name__ == "__main__":
    build(Path(sys.argv[1]))
