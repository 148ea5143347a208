"""Adapters of a Megatron checkpoint: merged into their base, and as a directory that the `peft` library reads.

LoRA adds scale B A to a weight; DoRA gives each row of that sum a length of its own. Megatron fuses layers that a
Hugging Face model has apart (q, k and v; gate and up), and lets all experts of a layer share an adapter. Its rows are
taken apart as the bridge's own mapping takes the weight's, and what is shared is written out for each.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemoflow.errors import NemoflowError

DIRECTORY = "adapter"
"""Its name within an export."""

STACKED = {"nemotron_h": ("up_proj", "down_proj")}
"""Model types whose routed experts transformers holds as one parameter per projection, (expert, out, in), under names
that `peft` does not take apart by itself; in the order in which it wraps them, the innermost first."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)$")

_REFUSED_BY_PEFT = (
    "The `peft` library refuses adapters of a Mamba layer's `out_proj`, which fused kernels never call as a layer, and "
    "so this one. The merged model beside it is complete. To have an adapter that the library takes, train with "
    "`peft.target_modules` without `out_proj`."
)


@dataclass
class Part:
    """The adapter of one weight (out, in): down (dim, in) is LoRA's A, up (out, dim) its B, magnitude (out) DoRA's."""

    weight: Any
    down: Any
    up: Any
    scale: float
    magnitude: Any = None


def check(checkpoint: Path, base: Path | None) -> None:
    """Raise NemoflowError unless there is a base exactly for a Megatron iter_* directory that holds adapters alone."""
    peft = _settings(checkpoint)
    if peft and base is None:
        raise NemoflowError(
            f"{checkpoint}: holds adapters alone; the checkpoint of the model beneath them is wanted too"
        )
    if base and not peft:
        raise NemoflowError(f"{checkpoint}: holds a whole model and no adapters for {base}")


def _settings(checkpoint: Path) -> dict | None:
    """The adapters' part of a checkpoint's configuration; None for a whole model."""
    return yaml.safe_load((checkpoint / "run_config.yaml").read_text(encoding="utf-8")).get("peft")


def merge(checkpoint: Path, bridge: Any, model: list, dtype: str, out: Path) -> None:
    """Put the adapters of `checkpoint` into the base `model`, in place, and write them into `out`/adapter.

    `bridge` is the AutoBridge of the model. Raises NemoflowError for adapters of another model.
    """
    from megatron.core.utils import unwrap_model

    take_out(_load(checkpoint, unwrap_model(model)), bridge, model, dtype, out)


def take_out(peft: Any, bridge: Any, model: list, dtype: str, out: Path) -> None:
    """Merge the adapters with which `peft` (LoRA or DoRA) has wrapped `model`, in place, and write them as `merge`."""
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
    from megatron.core.utils import unwrap_model

    chunks = unwrap_model(model)
    parts = [part for chunk in chunks for m in chunk.modules() if isinstance(m, AdapterWrapper) for part in _parts(m)]
    for chunk in chunks:
        for parent in list(chunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, AdapterWrapper):
                    setattr(parent, name, child.to_wrap)
    config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)  # a model's files, or their config alone
    _write(_named(bridge, model, parts), config.model_type, peft, dtype, out / DIRECTORY)
    _merge(parts)


def _load(checkpoint: Path, chunks: list) -> Any:
    """Wrap the layers of a model in the adapters of `checkpoint`, in place. Returns their settings."""
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.checkpointing import (
        _generate_model_state_dict,
        apply_peft_adapter_filter_to_state_dict,
    )
    from megatron.core import dist_checkpointing

    from nemoflow.engines.megatron_bridge import peft as mended

    mended.layers()
    settings = _settings(checkpoint)
    kind = DoRA if settings["_target_"].endswith(".DoRA") else LoRA
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    peft = kind(**{name: value for name, value in settings.items() if name in known and value is not None})
    peft(chunks, training=False)
    wanted = apply_peft_adapter_filter_to_state_dict(_generate_model_state_dict(chunks, {}), peft)
    loaded, left, absent = dist_checkpointing.load(wanted, str(checkpoint), strict="return_all")
    wrong = sorted({*absent, *(name for name in left if ".adapter." in name and "optimizer." not in name)})
    if wrong:
        raise NemoflowError(
            f"{checkpoint}: adapters of another model: {wrong[0]} "
            f"{'is missing there' if wrong[0] in absent else 'has no place in this one'}"
        )
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"], strict=False)
    return peft


def _parts(wrapper: Any) -> Iterator[Part]:
    """The adapters in a wrapped layer: one, or one per expert where experts are computed together."""
    adapter, layer = wrapper.adapter, wrapper.to_wrap
    scale, magnitude = adapter.alpha / adapter.dim, getattr(adapter, "weight_magnitude", None)
    down, up = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    experts = getattr(layer, "num_gemms", None)
    if experts is None:
        yield Part(layer.weight, down, up, scale, None if magnitude is None else magnitude.detach())
    for i in range(experts or 0):
        own = (down[i], up[i]) if down.dim() == 3 else (down, up)
        yield Part(getattr(layer, f"weight{i}"), *own, scale)


def _merge(parts: list[Part]) -> None:
    import torch

    from nemoflow.engines.megatron_bridge.peft import effective

    with torch.no_grad():
        for part in parts:
            part.weight.copy_(effective(part.weight, part.down, part.up, part.scale, part.magnitude))


def _named(bridge: Any, model: list, parts: list[Part]) -> dict[str, Part]:
    """Published name of a layer, without `.weight` -> its adapter, with the rows that are that layer's.

    Which rows these are is asked of the bridge: it converts a weight whose every entry is the number of its row.
    """
    import torch

    # `get_conversion_tasks` wants a model's files, and only asks them for their names
    tasks = bridge._model_bridge.build_conversion_tasks(bridge.hf_pretrained, model)
    tasks = {id(task.param_weight): task for task in tasks if task is not None}
    found = {}
    for part in parts:
        task = tasks[id(part.weight)]
        out, width = part.weight.shape
        numbers = torch.arange(out, dtype=torch.float32)[:, None].expand(out, width).contiguous()
        for name, rows in task.mapping.megatron_to_hf(numbers, task.megatron_module).items():
            chosen = rows[:, 0].long()
            if rows.shape[1] != width or not torch.equal(rows, chosen[:, None].expand_as(rows).float()):
                raise NemoflowError(f"{name}: is not some rows of Megatron's weight, so its adapter cannot be written")
            magnitude = None if part.magnitude is None else part.magnitude[chosen]
            own = dataclasses.replace(part, weight=None, up=part.up[chosen], magnitude=magnitude)
            found[name.removesuffix(".weight")] = own
    return found


def _write(named: dict[str, Part], model_type: str, peft: Any, dtype: str, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as `peft` reads them."""
    import torch
    from safetensors.torch import save_file

    dora = any(part.magnitude is not None for part in named.values())
    tensors, parameters, stacks = {}, [], {}
    for name, part in named.items():
        down, up = _with_rank(part, peft.dim, peft.alpha)
        expert = _EXPERT.match(name)
        if expert and model_type in STACKED:
            layer, number, projection = expert.groups()
            stacks.setdefault(layer, {}).setdefault(projection, {})[int(number)] = down, up
            continue
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        if part.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = part.magnitude
    modules = {_within(name) for name in named if not (_EXPERT.match(name) and model_type in STACKED)}
    for layer, projections in stacks.items():
        order = [p for p in STACKED[model_type] if p in projections]
        for depth, projection in enumerate(reversed(order)):
            experts = [projections[projection][i] for i in sorted(projections[projection])]
            place = layer + ".base_layer" * depth
            tensors[f"{place}.lora_A.weight"] = torch.cat([down for down, _ in experts])
            tensors[f"{place}.lora_B.weight"] = torch.stack([up for _, up in experts], dim=2).flatten(1)
        parameters += [f"{_within(layer)}.{projection}" for projection in order]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": peft.alpha,
        "lora_dropout": 0.0,
        "r": peft.dim,
        "target_modules": sorted(modules),
        "use_dora": dora,
        **({"target_parameters": parameters} if parameters else {}),
    }
    out.mkdir()
    kind = getattr(torch, dtype)
    tensors = {f"base_model.model.{name}": t.to(kind).contiguous().clone() for name, t in sorted(tensors.items())}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    refused = model_type == "nemotron_h" and any(name.endswith(".out_proj") for name in modules)
    (out / "README.md").write_text(_card(dora, peft, sum(t.numel() for t in tensors.values()), refused))


def _within(name: str) -> str:
    """A layer's name without the model's own, its first part, which readers call differently."""
    return name.partition(".")[2] or name


def _with_rank(part: Part, dim: int, alpha: int) -> tuple[Any, Any]:
    """A and B of an adapter, of rank `dim` and scale alpha / dim: experts may have been trained with another rank."""
    from torch.nn.functional import pad

    missing = dim - part.down.shape[0]
    if missing == 0:
        return part.down, part.up
    return pad(part.down, (0, 0, 0, missing)), pad(part.up * (part.scale * dim / alpha), (0, missing))


def _card(dora: bool, peft: Any, parameters: int, refused: bool) -> str:
    name = "DoRA" if dora else "LoRA"
    use = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/directory")  # base: the model it was trained beside
```
"""
    return (
        f"# {name} adapter\n\nRank {peft.dim}, alpha {peft.alpha}, {parameters:,} numbers. The model in the directory "
        f"above has it merged in.\n\n{_REFUSED_BY_PEFT + chr(10) if refused else use}"
    )
