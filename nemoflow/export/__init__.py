"""Kind `hf_export`: a trained state as a Hugging Face checkpoint that plain transformers loads.

Here are the files around the weights; the weights themselves are converted by a process of its own (convert.py).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from nemoflow.conversion import converting
from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError
from nemoflow.export import card, layout
from nemoflow.launch import HERE
from nemoflow.lineage import CLOSURE
from nemoflow.store import dump, file_digest

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)

CARD = "README.md"
"""The model card. It says what the training took, which two runs do not share, so it is no part of what is sealed."""

CHAT_END = "<|im_end|>"
"""The token that ends a turn of a chat: generation stops at it as at the end of a document."""


def make(
    payload: dict,
    inputs: dict,
    out: Path,
    progress: Callable[[str], None],
    lineage: list[dict],
    attempts: dict[str, list[dict]] | None = None,
    launch: dict | None = None,
) -> Made:
    """Write the checkpoint of a trained state into `out`: config.json, model.safetensors, tokenizer, README.md, ...

    payload: {"engine": "megatron_bridge" | "trl" | "nemo_rl", "dtype": "float32" | "bfloat16"}. inputs: {"state":
    directory with a link `checkpoint`, "tokenizer": directory}, and for a state of adapters "base": like "state", of
    the model beneath them; then out/adapter holds them too (adapter.py). lineage: sealed records of all the state comes
    from, in order; lineage.json holds them. attempts: those of run.json, by identity of the trainings, for the card.
    launch: "cluster", where the conversion runs.

    Returns the measures {"parameters", "bytes" of the weight files, "dtype"}, and the contents, without the card.

    Raises NemoflowError for a damaged checkpoint, a model that has no such form, and a tokenizer that does not fit it.
    """
    checkpoint, tokenizer = inputs["state"] / "checkpoint", inputs["tokenizer"]
    if not checkpoint.is_dir():
        raise NemoflowError(f"{checkpoint}: is missing; the state's checkpoint was moved or deleted")
    tokens = special_tokens(tokenizer)
    progress("converts the weights")
    base = [inputs["base"] / "checkpoint"] if "base" in inputs else []
    ids = {name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    about = json.dumps({"tokens": ids, "hf_config": described(lineage)})
    arguments = payload["engine"], checkpoint, about, payload["dtype"], out, *base
    converting("nemoflow.export.convert", checkpoint, *arguments, cluster=(launch or {}).get("cluster", HERE))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    entries = layout.weights(out)
    if config["model_type"] == "nemotron_h":  # others have been compared with transformers' own
        layout.compare({name: tuple(e["shape"]) for name, e in entries.items()}, layout.expected(config), str(out))
    if tokens["size"] > config["vocab_size"]:
        raise NemoflowError(
            f"{tokenizer}: has {tokens['size']} tokens, the model embeds {config['vocab_size']}; "
            "it is not the tokenizer this model was trained with"
        )
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)
    generation = {
        "bos_token_id": tokens["bos_token_id"],
        "eos_token_id": tokens["ends"],
        "pad_token_id": tokens["pad_token_id"],
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
    measures = {
        "parameters": layout.parameters(entries),
        "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
        "dtype": payload["dtype"],
    }
    chat = (out / "chat_template.jinja").exists()
    (out / CARD).write_text(card.text(config, measures, lineage, chat, attempts or {}), encoding="utf-8")
    (out / CLOSURE).write_text(dump({"artifacts": lineage}), encoding="utf-8")
    files = sorted(p for p in out.rglob("*") if p.is_file() and p != out / CARD)
    sizes = ({"name": p.relative_to(out).as_posix(), "size": p.stat().st_size, "sha256": file_digest(p)} for p in files)
    return Made(measures, list(sizes))


def special_tokens(tokenizer: Path) -> dict:
    """{"bos_token_id", "eos_token_id", "pad_token_id", "ends": ids that end generation, "size"} of a tokenizer.

    A token that the tokenizer does not have is None. Raises NemoflowError when there is no tokenizer, or no end token.
    """
    try:
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        ids = model["model"]["vocab"] | {t["content"]: t["id"] for t in model["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NemoflowError(f"{tokenizer}: no tokenizer that can be read there: {error}") from None

    def token(role: str) -> int | None:
        name = config.get(role)
        return ids.get(name["content"] if isinstance(name, dict) else name)

    end = token("eos_token")
    if end is None:
        raise NemoflowError(f"{tokenizer}/tokenizer_config.json: eos_token: names no token; generation would never end")
    ends = [end, *(ids[CHAT_END] for _ in range(CHAT_END in ids and ids[CHAT_END] != end))]
    return {
        "bos_token_id": token("bos_token"),
        "eos_token_id": end,
        "pad_token_id": token("pad_token"),
        "ends": ends,
        "size": max(ids.values()) + 1,
    }


def described(lineage: list[dict]) -> dict | None:
    """What the recipe, or the imported model's own config.json, says of the model; None for recipe functions alone."""
    found = [r["payload"].get("hf_config") or r["measures"].get("hf_config") for r in lineage]
    return next((content for content in reversed(found) if content), None)
