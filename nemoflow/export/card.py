"""README.md of an exported model: what it is, what it was trained on and how.

From the sealed records, by labels and identities, and from run.json what the training took. What a training took does
not define the model, so the card is no part of what is sealed; the records in lineage.json beside it are.
"""

import yaml
from huggingface_hub import ModelCard, ModelCardData

from nemoflow import summary
from nemoflow.kinds import TRAINED
from nemoflow.lineage import graph

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

_LICENSES = {"stdlib_topics": "PSF-2.0", "stdlib_docstrings": "PSF-2.0", "stdlib_chats": "PSF-2.0"}
"""Generator -> license of what it takes its texts from: Python's documentation."""

_NEMO_RL = "policy.megatron_cfg"

_SETTINGS = {
    "learning rate": ("optimizer.lr", "grpo.learning_rate", "dpo.learning_rate", f"{_NEMO_RL}.optimizer.lr"),
    "least": ("optimizer.min_lr", f"{_NEMO_RL}.optimizer.min_lr"),
    "schedule": (
        *("scheduler.lr_decay_style", "grpo.lr_scheduler_type", "dpo.lr_scheduler_type"),
        f"{_NEMO_RL}.scheduler.lr_decay_style",
    ),
    "batch": (
        *("train.global_batch_size", "grpo.per_device_train_batch_size", "dpo.per_device_train_batch_size"),
        "policy.train_global_batch_size",
    ),
    "sequence length": ("model.seq_length", "policy.max_total_sequence_length"),
    "weight decay": (
        *("optimizer.weight_decay", "grpo.weight_decay", "dpo.weight_decay"),
        f"{_NEMO_RL}.optimizer.weight_decay",
    ),
}
"""Column of the table of hyperparameters -> settings it shows, of any engine."""


def text(config: dict, measures: dict, lineage: list[dict], chat: bool, attempts: dict[str, list[dict]]) -> str:
    """The model card, as Markdown with YAML front matter that the Hugging Face Hub understands.

    `config` is config.json, `measures` those of the export, `lineage` the sealed records of all it comes from, inputs
    before what consumes them; `chat` says whether the tokenizer has a chat template; `attempts` of run.json, by
    identity of the training.
    """
    trained = [r for r in lineage if r["kind"] in TRAINED]
    sources = [r for r in lineage if r["kind"] == "source"]
    hybrid = "hybrid_override_pattern" in config
    own = ["nemotron_h", "mamba2", "moe"] if hybrid else [config["model_type"]]
    imported = {r["payload"]["model"] for r in lineage if r["kind"] == "import"}
    bases = [r["payload"]["model"]["repo"] for r in sources if r["identity"] in imported and r["payload"].get("model")]
    front = ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=list(dict.fromkeys(r["payload"]["hub"]["repo"] for r in sources if "hub" in r["payload"])) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*own, *dict.fromkeys(r["kind"] for r in trained), "nemoflow"],
    )
    name = "NemotronH" if hybrid else config["architectures"][0].removesuffix("ForCausalLM")
    parts = [
        f"# {name}, {_count(measures['parameters'])} parameters\n",
        _model(config, measures),
        "## Use\n\n" + (_CHAT if chat else _TEXT),
        "## Training\n\n" + _training(trained, attempts),
        "## Data\n\n" + _data(sources),
        "## Lineage\n\nEvery artifact this model comes from, each before what was made from it. An identity is a hash "
        "of what defines the artifact, down to the data. `lineage.json` holds the records of all of them, with every "
        "file and its digest.\n\n" + _lineage(lineage),
    ]
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(parts)))


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


def _training(trained: list[dict], attempts: dict[str, list[dict]]) -> str:
    """A row per stage: how long, on how many tokens, what came of it and what it took; and with which settings."""

    def change(measures: dict, name: str) -> str:
        first, last = measures.get(f"{name}_first"), measures.get(name)
        return f"{first:.4g} -> {last:.4g}" if None not in (first, last) else "" if last is None else f"{last:.4g}"

    def title(record: dict) -> str:
        return f"{record['kind']} {record['label']} to {record['at']}"

    rows, settings = [], []
    for record in trained:
        measures, own = record["measures"], attempts.get(record["identity"], [])
        hours = summary.gpu_hours(own, record["at"])
        rows.append(
            (
                title(record),
                measures.get("iterations", ""),
                f"{measures['tokens']:,}" if "tokens" in measures else "",
                "" if record["kind"] == "rl" else change(measures, "loss"),
                change(measures, "valid_loss"),
                change(measures, "reward"),
                change(measures, "accuracy"),
                summary.hardware(own),
                "" if hours is None else f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}",
            )
        )
        overrides = record["payload"].get("overrides", {})
        shown = (next((overrides[key] for key in keys if key in overrides), "") for keys in _SETTINGS.values())
        settings.append((title(record), *shown))
    head = ("stage", "iterations", "tokens", "training loss", "validation loss", "reward", "preferences")
    return "\n".join(
        [
            _table((*head, "hardware", "GPU-hours"), rows),
            "First value -> last value; a reward is the mean of the samples of a tenth of the steps, preferences the "
            "share of pairs in which the chosen answer is preferred, more than by the model before.\n",
            _table(("stage", *_SETTINGS), settings),
            "What is empty there is as the recipe function has it. All that is set:\n",
            *(_all_settings(title(record), record["payload"]) for record in trained),
        ]
    )


def _all_settings(title: str, payload: dict) -> str:
    """What defines a training, folded away."""
    text = yaml.safe_dump({k: v for k, v in payload.items() if k != "kind"}, sort_keys=True, allow_unicode=True)
    return f"<details><summary>{title}</summary>\n\n```yaml\n{text}```\n\n</details>\n"


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
        elif payload.get("model"):
            origin = f"model `{payload['model']['repo']}` at {payload['model']['commit'][:12]}"
        else:
            origin = f"{len(payload.get('files', []))} files, pinned by digest"
        size = f"{measures['documents']:,}" if "documents" in measures else ""
        license_ = measures.get("license") or _LICENSES.get(payload.get("generator")) or "not known"
        license_ = "none, it is generated" if license_ == "not known" and "generator" in payload else license_
        rows.append((record["label"], origin, license_, size, f"`{record['identity']}`"))
    return _table(("source", "origin", "license", "documents", "identity"), rows)


def _lineage(lineage: list[dict]) -> str:
    """As a chart and as a table; the shards of a source, which may be thousands, in the chart alone."""
    rows = []
    for record in lineage:
        if record["kind"] == "shards":
            continue
        measures = record["measures"] | record["measures"].get("train", {})
        shown = {name: measures.get(name) for name in _MEASURES}
        shown = {name: value.get("train") if isinstance(value, dict) else value for name, value in shown.items()}
        said = [f"{value:,} {_MEASURES[name]}" for name, value in shown.items() if isinstance(value, int)]
        identity = f"`{record['identity']}`" + (f" at {record['at']}" if "at" in record else "")
        rows.append((record["kind"], record["label"], identity, ", ".join(said)))
    chart = f"```mermaid\n{graph.mermaid(graph.told(lineage))}\n```\n"
    return f"{chart}\n{_table(('kind', 'label', 'identity', 'measures'), rows)}"
