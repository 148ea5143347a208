"""README.md of an exported model: what it is, what it was trained on and how, from the sealed records alone.

It speaks of labels and identities. Recipe names, hosts, dates and hours do not define a model and stay outside.
"""

import yaml

_MEASURES = {
    "documents": "documents",
    "chats": "chats",
    "rows": "rows",
    "tokens": "tokens",
    "vocab_size": "vocabulary",
    "iterations": "iterations",
    "parameters": "parameters",
}
"""Measures shown in the lineage, and what they are called there; where they are given by split, those of training."""


def text(config: dict, measures: dict, lineage: list[dict], chat: bool) -> str:
    """The model card, as Markdown with YAML front matter.

    `config` is config.json, `measures` those of the export, `lineage` the sealed records of all it comes from, inputs
    before what consumes them; `chat` says whether the tokenizer has a chat template.
    """
    trained = [r for r in lineage if r["kind"] in ("pretrain", "sft", "rl")]
    sources = [r for r in lineage if r["kind"] == "source"]
    hybrid = "hybrid_override_pattern" in config
    own = ["nemotron_h", "mamba2", "moe"] if hybrid else [config["model_type"]]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*own, *dict.fromkeys(r["kind"] for r in trained)],
    }
    name = "NemotronH" if hybrid else config["architectures"][0].removesuffix("ForCausalLM")
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n",
        f"# {name}, {_count(measures['parameters'])} parameters\n",
        _model(config, measures),
        "## Use\n\n" + (_CHAT if chat else _TEXT),
        "## Training\n\n" + _training(trained),
        "## Data\n\n" + _data(sources),
        "## Lineage\n\nEvery artifact this model comes from, each before what was made from it. An identity is a hash "
        "of what defines the artifact, down to the data.\n\n" + _lineage(lineage),
    ]
    return "\n".join(parts)


def _count(number: int) -> str:
    """1,397,256 as 1.4M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _model(config: dict, measures: dict) -> str:
    pattern = config.get("hybrid_override_pattern", "")
    names = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "MLP"}
    layers = ", ".join(f"{pattern.count(s)} {name}" for s, name in names.items() if s in pattern)
    rows = [
        ("parameters", f"{measures['parameters']:,}"),
        ("weights", f"{measures['dtype']}, {measures['bytes']:,} bytes"),
        ("layers", f"{len(pattern)} (`{pattern}`): {layers}" if pattern else config["num_hidden_layers"]),
        ("hidden size", config["hidden_size"]),
        ("vocabulary", config["vocab_size"]),
        ("sequence length", config["max_position_embeddings"]),
    ]
    if "E" in pattern:
        rows.append(("experts", f"{config['n_routed_experts']}, {config['num_experts_per_tok']} per token"))
    return _table(("", ""), rows)


_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
"""

_CHAT = f"""{_LOAD}inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is 3 + 5?"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

_TEXT = f"""{_LOAD}inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""


def _training(trained: list[dict]) -> str:
    """One row per stage: how long, on how many tokens, and what came of it."""

    def change(measures: dict, name: str) -> str:
        first, last = measures.get(f"{name}_first"), measures.get(name)
        return f"{first:.4g} -> {last:.4g}" if None not in (first, last) else "" if last is None else f"{last:.4g}"

    rows = []
    for record in trained:
        measures = record["measures"]
        rows.append(
            (
                f"{record['kind']} {record['label']}",
                measures.get("iterations", ""),
                f"{measures['tokens']:,}" if "tokens" in measures else "",
                "" if record["kind"] == "rl" else change(measures, "loss"),
                change(measures, "valid_loss"),
                change(measures, "reward"),
            )
        )
    head = ("stage", "iterations", "tokens", "training loss", "validation loss", "reward")
    return (
        _table(head, rows)
        + "\nFirst value -> last value; a reward is the mean of the samples of a tenth of the steps.\n"
    )


def _data(sources: list[dict]) -> str:
    rows = []
    for record in sources:
        payload, measures = record["payload"], record["measures"]
        if "generator" in payload:
            arguments = ", ".join(f"{k} {v}" for k, v in sorted(payload.get("args", {}).items()))
            origin = f"generated: `{payload['generator']}`" + (f" ({arguments})" if arguments else "")
        elif "hub" in payload:
            hub = payload["hub"]
            subset = " ".join(hub[k] for k in ("config", "split") if hub.get(k))
            origin = f"`{hub['repo']}` ({subset}) at {hub['commit'][:12]}, {len(payload['files']):,} files"
        else:
            origin = f"{len(payload.get('files', []))} files, pinned by digest"
        size = f"{measures['documents']:,}" if "documents" in measures else ""
        rows.append((record["label"], origin, size, f"`{record['identity']}`"))
    return _table(("source", "origin", "documents", "identity"), rows)


def _lineage(lineage: list[dict]) -> str:
    rows = []
    for record in lineage:
        measures = record["measures"] | record["measures"].get("train", {})
        shown = {name: measures.get(name) for name in _MEASURES}
        shown = {name: value.get("train") if isinstance(value, dict) else value for name, value in shown.items()}
        said = [f"{value:,} {_MEASURES[name]}" for name, value in shown.items() if isinstance(value, int)]
        identity = f"`{record['identity']}`" + (f" at {record['at']}" if "at" in record else "")
        rows.append((record["kind"], record["label"], identity, ", ".join(said)))
    return _table(("kind", "label", "identity", "measures"), rows)
