"""The conversion itself: python -m nemoflow.export.convert ENGINE CHECKPOINT ABOUT DTYPE OUT [BASE]

Writes config.json and the safetensors files into OUT. A process of its own, because it imports torch, transformers
and, for the engine megatron_bridge, Megatron behind the device shim. ENGINE says what CHECKPOINT is: `megatron_bridge`
an iter_* directory with its run_config.yaml, `trl` a directory that transformers saved, `nemo_rl` a step_*
directory, whose policy is one or the other. Where CHECKPOINT holds adapters
alone, BASE is that of the model beneath them; the model is written merged, and the adapters into OUT/adapter.
"""

import functools
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemoflow.conversion import load, said
from nemoflow.engines.nemo_rl.checkpoints import MEGATRON
from nemoflow.errors import NemoflowError
from nemoflow.export import adapter, layout
from nemoflow.export import config as spelling

MAX_SHARD_SIZE = "5GB"

_MEGATRON_FILES = ("run_config.yaml", "metadata.json", ".metadata")

_ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "hybrid_layer_pattern",
    "mamba_head_dim",
    "mamba_num_heads",
    "mamba_num_groups",
    "mamba_state_dim",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_pre_softmax",
    "activation_func",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "share_embeddings_and_output_weights",
    "softmax_scale",
    "window_size",
)
"""Settings of a Megatron model that decide what function its weights compute, and so must survive the conversion."""


def check_megatron(checkpoint: Path) -> None:
    """Raise NemoflowError unless the checkpoint has all its files, as long as its own metadata says.

    The distributed loader's own errors for a file that is cut off are many and unclear, and some name no file.
    """
    for name in _MEGATRON_FILES:
        if not (checkpoint / name).is_file():
            raise NemoflowError(
                f"{checkpoint}: {name} is missing; a complete iter_* directory of Megatron-Bridge is wanted"
            )
    from torch.distributed.checkpoint import FileSystemReader

    try:
        stored = FileSystemReader(checkpoint).read_metadata().storage_data
        json.loads((checkpoint / "metadata.json").read_text(encoding="utf-8"))
    except (EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        raise NemoflowError(f"{checkpoint}: its metadata cannot be read: {error}") from None
    ends: dict[str, int] = {}
    for item in stored.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in sorted(ends.items()):
        file = checkpoint / name
        size = file.stat().st_size if file.exists() else None
        if size is None:
            raise NemoflowError(f"{file}: is missing from the checkpoint")
        if size < end:
            raise NemoflowError(f"{file}: has {size} bytes where the checkpoint needs {end}; it is cut off")


def hf_config(provider: Any, vocab_size: int, tokens: dict[str, int], described: dict | None = None) -> Any:
    """The transformers configuration of a Megatron provider.

    Of a hybrid model a NemotronHConfig, by the bridge's own mapping; of another the one that `described`, the content
    of a config.json, says. `vocab_size` is the number of rows of the embedding, padding included; `tokens` the ids of
    bos, eos and pad.

    Raises NemoflowError when the model has a setting that the configuration cannot say: it is taken back through the
    bridge, and must give the same model.
    """
    from megatron.bridge import AutoBridge

    if getattr(provider, "hybrid_layer_pattern", None):
        config = _nemotron_h(provider, vocab_size, tokens)
    elif described:
        from nemoflow.engines.megatron_bridge.config import transformers_config

        config = transformers_config(described | tokens | {"vocab_size": vocab_size})
    else:
        raise NemoflowError(
            "hf_config: what the model is called on the Hugging Face side is not known: write the recipe's hf_config"
        )
    back = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    for name in _ARCHITECTURE:
        said, meant = (_plain(name, getattr(p, name, None)) for p in (provider, back))
        if said != meant:
            raise NemoflowError(
                f"model.{name}: {said} cannot be said in a {config.model_type} config, which would mean {meant}; "
                "such a model cannot be exported"
            )
    return config


def _nemotron_h(provider: Any, vocab_size: int, tokens: dict[str, int]) -> Any:
    from megatron.bridge.models.nemotronh.nemotron_h_bridge import NemotronHBridge
    from transformers import NemotronHConfig

    mapped = NemotronHBridge.megatron_to_hf_config(provider)
    settable = set(NemotronHConfig.__dataclass_fields__) | {"hybrid_override_pattern"}
    return NemotronHConfig(
        **{name: value for name, value in mapped.items() if name in settable and value is not None}
        | tokens
        | {
            "vocab_size": vocab_size,
            "architectures": ["NemotronHForCausalLM"],
            "norm_topk_prob": provider.moe_router_topk > 1,  # Megatron normalises the scores of several experts only
            "moe_latent_size": provider.moe_latent_size,
        }
    )


def _plain(name: str, value: Any) -> Any:
    """A setting as something to compare and show: functions by name, None as what it means to the router."""
    if value is None and name in ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"):
        return 1
    return getattr(value, "__name__", value)


def from_megatron(
    checkpoint: Path,
    tokens: dict[str, int],
    described: dict | None = None,
    adapted: Path | None = None,
    change: Callable[[Any, list], None] | None = None,
) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """The config and the tensors (published name, torch.Tensor) of a Megatron-Bridge iter_* directory.

    `tokens` and `described` as in hf_config.
    With adapters in a checkpoint of their own, `adapted`, that describes the model, and `change` puts them into it: it
    is called with the bridge and the loaded model.

    Raises NemoflowError for a checkpoint that is cut off, or whose model has no NemotronH form.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_model_config
    from megatron.core import dist_checkpointing

    provider, _ = load_model_config(str(adapted or checkpoint))
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    rows = stored["embedding.word_embeddings.weight"].global_shape[0]
    config = hf_config(provider, rows, tokens, described)
    bridge = AutoBridge.from_hf_config(config)
    model = load(checkpoint)
    # The loader takes what the model asks for and ignores the rest of the checkpoint: a layer too many, for example.
    held = sum(math.prod(t.global_shape) for name, t in stored.items() if "optimizer." not in name)
    asked = sum(t.numel() for t in model[0].state_dict().values() if t is not None)
    if held != asked:
        raise NemoflowError(
            f"{checkpoint}: holds {held:,} numbers, its run_config.yaml describes a model of {asked:,}; "
            "they do not belong together"
        )
    if change:
        change(bridge, model)
    return config, bridge.export_hf_weights(model, cpu=True, show_progress=False)


def from_transformers(checkpoint: Path) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """The config and the tensors (published name, torch.Tensor) of a NemotronH checkpoint that transformers saved.

    transformers 5 writes the embedding under a name (`backbone.embedding.weight`) that Megatron-Bridge and vLLM do not
    know; it goes out under the published one.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    if not (checkpoint / "config.json").is_file():
        raise NemoflowError(f"{checkpoint}: config.json is missing; a checkpoint saved by transformers is wanted")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    if config.model_type != "nemotron_h":
        raise NemoflowError(f"{checkpoint}/config.json: model_type {config.model_type!r}; nemotron_h is wanted")
    layout.weights(checkpoint)  # refuses files that are cut off
    tensors = {n: t for f in sorted(checkpoint.glob("*.safetensors")) for n, t in load_file(f).items()}
    return config, ((n.replace("backbone.embedding.", "backbone.embeddings."), t) for n, t in tensors.items())


def write(config: Any, tensors: Iterator[tuple[str, Any]], dtype: str, out: Path) -> None:
    """Write config.json and the safetensors files of a model into `out`.

    Floating tensors are stored as `dtype` ("float32" or "bfloat16"), the router's bias always as float32.

    Raises NemoflowError when a tensor is missing, is not part of such a model, or has another shape.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    published = spelling.published(config, dtype) if config.model_type == "nemotron_h" else plain(config, dtype)
    kind = getattr(torch, dtype)
    found = {
        name: tensor.detach().to(torch.float32 if name.endswith(layout.ROUTER_BIAS) else kind).contiguous().clone()
        for name, tensor in tensors
        if not (config.tie_word_embeddings and name == "lm_head.weight")  # the bridge has it twice then
    }
    wanted = layout.expected(published) if config.model_type == "nemotron_h" else shapes(config)
    layout.compare({name: tuple(tensor.shape) for name, tensor in found.items()}, wanted, "the converted model")
    plan = split_torch_state_dict_into_shards({n: found[n] for n in wanted}, max_shard_size=MAX_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: found[name] for name in names}, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors makes it readable to its owner alone
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (out / "config.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")


def plain(config: Any, dtype: str) -> dict:
    """The content of config.json for a model that is published as transformers spells it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    content = json.loads(config.to_json_string(use_diff=False))
    kept = {k: v for k, v in content.items() if not k.startswith("_") and k not in ("dtype", "transformers_version")}
    return kept | {"architectures": [CLASSES[config.model_type]], "torch_dtype": dtype}


def shapes(config: Any) -> layout.Shapes:
    """Name -> shape of every tensor of the transformers model; one that another is tied to is not stored."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def policy(step: Path) -> tuple[str, Path]:
    """What the policy of a step of NeMo-RL is: a checkpoint of ("megatron_bridge", directory), or one that transformers
    reads, ("trl", directory). Raises NemoflowError for neither.
    """
    if (step / MEGATRON).is_dir():
        return "megatron_bridge", step / MEGATRON
    found = [file.parent for file in sorted((step / "policy" / "weights").rglob("config.json"))]
    if len(found) == 1 and any(found[0].glob("*.safetensors")):
        return "trl", found[0]
    raise NemoflowError(
        f"{step}: holds neither {MEGATRON} nor a whole checkpoint in safetensors; with the DTensor backend write "
        "checkpointing.model_save_format: safetensors and checkpointing.save_consolidated: true"
    )


def main(engine: str, checkpoint: Path, about: dict, dtype: str, out: Path, base: Path | None = None) -> None:
    """Convert a checkpoint; see the module.

    `about`: {"tokens": {"bos_token_id", "eos_token_id", "pad_token_id"}, "hf_config": null, or what the model was
    described by}.
    """
    tokens, described = about["tokens"], about["hf_config"]
    if engine == "nemo_rl":
        engine, checkpoint = policy(checkpoint)
    if engine == "trl":
        write(*from_transformers(checkpoint), dtype, out)
        return
    check_megatron(checkpoint)
    adapter.check(checkpoint, base)
    from nemoflow import cpu

    if on_cpu := cpu.needed():
        cpu.enable()
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    if on_cpu:
        cpu.patch(training=False)
    with temporary_distributed_context(backend="gloo"):
        if base is None:
            write(*from_megatron(checkpoint, tokens, described), dtype, out)
            return
        check_megatron(base)
        change = functools.partial(adapter.merge, checkpoint, dtype=dtype, out=out)
        write(*from_megatron(base, tokens, described, checkpoint, change), dtype, out)


if __name__ == "__main__":
    arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    said(arguments[-1], main, *arguments, *map(Path, sys.argv[6:]))
