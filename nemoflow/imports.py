"""Kind `import`: a model made elsewhere as a Megatron checkpoint, for other stages to start from.

    checkpoint/     as Megatron-Bridge's own iter_* directories. Of a Hugging Face model without an optimizer; its
                    run_config.yaml describes the model as a recipe function gets it from the hub, whatever machine
                    converted it. Of a Megatron-Bridge checkpoint links to its files

The conversion is a process of its own, python -m nemoflow.imports MODEL TOKENIZER OUT, since it needs Megatron. It
holds the model once in memory, in the type its config.json says. A Megatron checkpoint is looked at in such a process.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from nemoflow.conversion import converting, said, save
from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError
from nemoflow.export import layout
from nemoflow.hub import RUN_CONFIG
from nemoflow.launch import HERE
from nemoflow.progress import human
from nemoflow.store import read_json

CHECKPOINT = "checkpoint"


def make(
    payload: dict,  # noqa: ARG001 - a kind's
    inputs: dict,
    out: Path,
    progress: Callable[[str], None],
    launch: dict | None = None,
) -> Made:
    """Convert inputs["model"], a directory with config.json and *.safetensors, for inputs["tokenizer"]; or link to the
    files of a Megatron-Bridge checkpoint.

    Returns the measures {"parameters", "bytes" of the weight files read, "hf_config": content of config.json, of a
    Hugging Face model}, and the checkpoint's files with their sizes.

    Raises NemoflowError for weights that are cut off, a model Megatron-Bridge does not know, a tokenizer with more
    tokens than the model embeds, and a disk that is too small.
    """
    cluster = (launch or {}).get("cluster", HERE)
    if (inputs["model"] / RUN_CONFIG).exists():
        return _linked(inputs["model"], inputs["tokenizer"], out, progress, cluster)
    model, entries = inputs["model"], layout.weights(inputs["model"])
    if "backbone.embedding.weight" in entries:
        raise NemoflowError(
            f"{model}: has backbone.embedding.weight, as transformers 5 saves this model; published checkpoints, which "
            "Megatron-Bridge reads, say backbone.embeddings.weight: rename it"
        )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if (free := shutil.disk_usage(out).free) < size:
        raise NemoflowError(f"{out}: the checkpoint takes {human(size)} and {human(free)} are free; make room")
    progress(f"converts {human(size)} of weights, holding them in memory once")
    converting("nemoflow.imports", model, model, inputs["tokenizer"], out, cluster=cluster)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return Made({"parameters": layout.parameters(entries), "bytes": size, "hf_config": config}, listed(out))


def _linked(model: Path, tokenizer: Path, out: Path, progress: Callable[[str], None], cluster: dict) -> Made:
    """A Megatron-Bridge checkpoint, of which the source in `model` has the files."""
    names = [entry["name"] for entry in read_json(model / "sealed.json")["contents"]]
    progress(f"looks at a Megatron checkpoint of {len(names)} files")
    converting("nemoflow.imports", model, model, tokenizer, out, cluster=cluster)
    parameters = int((out / "parameters").read_text(encoding="utf-8"))
    (out / "parameters").unlink()
    checkpoint = out / CHECKPOINT
    checkpoint.mkdir()
    for name in names:
        # What is in `out` is moved into its parent, the artifact's directory, from where links have to lead
        (checkpoint / name).symlink_to(os.path.relpath(model / name, out.parent / CHECKPOINT))
    files = [{"name": f"{CHECKPOINT}/{name}", "size": (model / name).stat().st_size} for name in sorted(names)]
    return Made({"parameters": parameters, "bytes": sum(file["size"] for file in files)}, files)


def listed(out: Path) -> list[dict]:
    """The checkpoint's files with their sizes: too large to be read once more only for their digests."""
    files = sorted(p for p in (out / CHECKPOINT).rglob("*") if p.is_file())
    return [{"name": p.relative_to(out).as_posix(), "size": p.stat().st_size} for p in files]


def _look(model: Path, tokenizer: Path, out: Path) -> None:
    """Write the number of a Megatron checkpoint's parameters. Raises NemoflowError for one that cannot be used."""
    from nemoflow.average import weights

    shapes, _ = weights(model)
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith("embedding.word_embeddings.weight")), 0)
    if (known := _tokens(tokenizer)) > rows:
        raise NemoflowError(f"{tokenizer}: has {known} tokens, the model embeds {rows}")
    (out / "parameters").write_text(str(sum(map(math.prod, shapes.values()))), encoding="utf-8")


def _tokens(tokenizer: Path) -> int:
    tokens = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    return max([*tokens["model"]["vocab"].values(), *(t["id"] for t in tokens["added_tokens"])]) + 1


def main(model: Path, tokenizer: Path, out: Path) -> None:
    """Convert, or look; see the module."""
    if (model / RUN_CONFIG).exists():
        _look(model, tokenizer, out)
        return
    from nemoflow import cpu

    if on_cpu := cpu.needed():
        cpu.enable()
    import torch
    import transformers
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if on_cpu:
        cpu.patch(training=False)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if (called := config.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise NemoflowError(
            f"{model}/config.json: model_type {called!r}: transformers {transformers.__version__} does not know it"
        )
    kind = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    try:
        bridge = AutoBridge.from_hf_pretrained(model, torch_dtype=kind)
        provider, settings = (bridge.to_megatron_provider(load_weights=load) for load in (True, False))
    except ValueError as error:
        raise NemoflowError(f"{model}/config.json: Megatron-Bridge does not know this model: {error}") from None
    if on_cpu:
        cpu.adapt_model(provider)
    if (known := _tokens(tokenizer)) > provider.vocab_size:
        raise NemoflowError(f"{tokenizer}: has {known} tokens, the model embeds {provider.vocab_size}")
    for one in (provider, settings):
        one.params_dtype = one.pipeline_dtype = kind
        one.bf16, one.fp16 = kind == torch.bfloat16, False
        one.should_pad_vocab = False
    with temporary_distributed_context(backend="gloo"):
        provider.finalize()
        model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
        megatron = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        save(megatron, out / CHECKPOINT, settings)


if __name__ == "__main__":
    said(Path(sys.argv[3]), main, *map(Path, sys.argv[1:]))
