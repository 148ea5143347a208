"""From a request to Megatron-Bridge's ConfigContainer: recipe function, overrides, data, and what the run decides.

The classes are the installed ones, so an override is checked against what really exists. Imports Megatron.
"""

import difflib
import enum
import fnmatch
import functools
import importlib
import inspect
import io
import json
import os
import types
import typing
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from unittest import mock

import torch
import yaml
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from megatron.bridge.training.model_load_save import load_model_config
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.bridge.utils.yaml_utils import safe_yaml_representers
from transformers import AutoConfig

from nemoflow import cpu
from nemoflow.engines.megatron_bridge import REFUSED, outside, peft, reshard, tracking
from nemoflow.errors import NemoflowError

UNCOMPARED = (
    "checkpoint.*",
    "comm_overlap*",
    "dataset.dataset_root",
    "dataset.defer_npy_index_mmap",
    "dataset.fast_cache_load",
    "dataset.mmap_bin_files",
    "dataset.num_dataset_builder_threads",
    "dataset.offline_packing_specs.packed_metadata_path",
    "dataset.path_to_cache",
    "dataset.pin_memory",
    "env_vars*",
    "ft*",
    "inprocess_restart*",
    "model.*_fusion",
    "model.cuda_graph_*",
    "model.fine_grained_activation_offloading",
    "model.moe_grouped_gemm",
    "model.moe_hybridep_num_sms",
    "model.offload_modules",
    "model.persist_layer_norm",
    "model.recompute_*",
    "model.tp_comm_*",
    "model.transformer_impl",
    "model.use_fused_weighted_squared_relu",
    "model.use_te_rng_tracker",
    "nvrx_straggler*",
    "optimizer.overlap_*",
    "rng.te_rng_tracker",
    "straggler*",
    "tensor_inspect*",
    "train.exit_*",
    "train.manual_gc*",
)
"""Settings (fnmatch patterns) that may differ between two slots of a stage, besides the overrides outside its identity:
paths of this run, and kernels, which the device shim replaces too."""

ARCHITECTURE = (
    "hybrid_layer_pattern",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "gated_linear_unit",
    "add_bias_linear",
    "normalization",
    "position_embedding_type",
    "share_embeddings_and_output_weights",
    "vocab_size",
)
"""The model settings that decide which tensors a checkpoint has, and of which shapes."""


def build(request: dict, load: Path | None) -> ConfigContainer:
    """The configuration of a run: what `request` says (see train.py), starting from the checkpoint `load`, if any.

    Raises NemoflowError for a recipe function, an override or a combination that cannot be.
    """
    sft = request["kind"] == "sft"
    config = prepare(request)
    _fit(config, request)

    config.train.train_iters = request["horizon"]
    config.train.exit_interval = request["stop"]
    config.scheduler.override_opt_param_scheduler = False
    tracking.place(config, Path(request["metrics"]).parent)

    checkpoint, init = config.checkpoint, request["init"]
    checkpoint.save = request["checkpoints"]
    checkpoint.save_interval = request["save_interval"]
    checkpoint.dist_ckpt_strictness = "raise_all"
    checkpoint.dist_ckpt_optim_fully_reshardable = True  # or only the geometry that saved an optimizer can load it
    checkpoint.exit_on_missing_checkpoint = load is not None
    checkpoint.save_tokenizer_assets = False  # the tokenizer is an artifact of its own
    checkpoint.finetune = False
    checkpoint.load = checkpoint.pretrained_checkpoint = None
    if load is not None:
        if init and init["carry"] == "weights" and load == Path(init["checkpoint"]):
            checkpoint.pretrained_checkpoint = str(load)
            # The optimizer stays behind, which "raise_all" would call missing; that the checkpoint has no layer more
            # than the model is seen to by comparing the two architectures (_fit).
            checkpoint.dist_ckpt_strictness = "raise_unexpected"
        else:
            checkpoint.load = str(load)
        peft.load_from(config, request, load)
    if sft and not request["data"]["valid"]:
        config.validation.eval_iters = 0
    if cpu.needed():
        cpu.adapt(config)
    if checkpoint.load:
        reshard.fit(config, load)
    return config


def prepare(request: dict) -> ConfigContainer:
    """The recipe of `request` with its data and overrides in place: all that the order of the data follows from.

    Raises NemoflowError as `build` does.
    """
    config = _recipe(request)
    peft.configure(config, request)
    _place_data(config, request)
    apply_overrides(config, request["overrides"])
    peft.check(config, request)
    _fit_length(config, request)
    return config


def valid_samples(config: ConfigContainer) -> int:
    """Samples of one evaluation."""
    validation = config.validation
    return validation.eval_iters * (validation.eval_global_batch_size or config.train.global_batch_size)


def _recipe(request: dict) -> ConfigContainer:
    """What the recipe function returns. An SFT has the model of the checkpoint it starts from; no hub is asked."""
    function = _function(request["function"])
    given = {**request.get("arguments", {}), **peft.arguments(function, request)}
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise NemoflowError(f"arguments: {request['function']}: {error}") from None
    if request["kind"] == "pretrain":
        asked = _hub_of(request.get("hf_config"))
    else:
        if not request["init"]:
            raise NemoflowError("init: an SFT starts from a checkpoint; give the stage an `init`")
        model, _ = load_model_config(request["init"]["checkpoint"])
        hub = types.SimpleNamespace(to_megatron_provider=lambda **_: model)

        def asked(*_, **__):
            return hub

    with mock.patch.object(AutoBridge, "from_hf_pretrained", asked):
        return function(**given)


def _hub_of(hf_config: dict | None):
    """What a recipe function gets that asks the hub for a model: the one that `hf_config` describes."""

    def asked(name, *_, **__):
        if not hf_config:
            raise NemoflowError(f"function: asks the hub for {name}; write its config.json as the recipe's hf_config")
        return AutoBridge.from_hf_config(transformers_config(hf_config))

    return asked


def transformers_config(content: dict):
    """The transformers configuration with this content of a config.json. Raises NemoflowError for an unknown key."""
    settings = {k: v for k, v in content.items() if k != "model_type"}
    try:
        config = AutoConfig.for_model(content["model_type"], **settings)
    except (KeyError, ValueError) as error:
        raise NemoflowError(f"hf_config.model_type: {content.get('model_type')!r}: {error}") from None
    known = {*type(config)().to_dict(), *inspect.signature(type(config)).parameters, *type(config).attribute_map}
    for key in settings:
        if key not in known and key in vars(config):  # older spellings, as in published files, are taken and dropped
            raise NemoflowError(f"hf_config.{key}: no setting of {content['model_type']}{_hint(key, sorted(known))}")
    return config


def _function(name: str):
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, ValueError):
        raise NemoflowError(f"function: {name}: there is no module {module!r}") from None
    except AttributeError:
        known = [n for n in vars(importlib.import_module(module)) if n.endswith("_config") and not n.startswith("_")]
        raise NemoflowError(f"function: {name}: no such recipe in {module}{_hint(attribute, known)}") from None


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _place_data(config: ConfigContainer, request: dict) -> None:
    """Put the stage's data in the recipe's place, before overrides, which may set how it is read."""
    data = request["data"]
    config.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    config.tokenizer.tokenizer_model = request["tokenizer"]
    config.tokenizer.hf_tokenizer_kwargs = {}
    if request["kind"] == "pretrain":
        weights = json.loads((Path(data["blend"]) / "weights.json").read_text(encoding="utf-8"))
        config.dataset.blend = config.dataset.split = None
        config.dataset.blend_per_split = [_blend(weights.get(split)) for split in ("train", "valid")] + [None]
        config.dataset.path_to_cache = data["cache"]
        return
    size = data["pack_size"]
    packing = PackedSequenceSpecs(
        packed_sequence_size=size,
        packed_train_data_path=data["train"],
        packed_val_data_path=data["valid"],
        pad_seq_to_mult=data["pad_multiple"],
        packed_metadata_path=str(Path(request["scratch"]) / "packing.jsonl"),
    )
    config.dataset = GPTSFTDatasetConfig(
        seq_length=size,
        dataset_root=request["scratch"],  # where upstream would write; the packed files are given
        seed=config.dataset.seed,
        enable_offline_packing=True,
        offline_packing_specs=packing,
        do_validation=data["valid"] is not None,
        do_test=False,
    )
    config.model.seq_length = size
    config.train.micro_batch_size = 1  # what packed rows are for; upstream refuses another


def _blend(parts: list | None) -> tuple[list[str], list[float]] | None:
    return ([prefix for prefix, _ in parts], [float(Fraction(weight)) for _, weight in parts]) if parts else None


def _fit_length(config: ConfigContainer, request: dict) -> None:
    """Make data and model agree on the sequence length."""
    overrides, model = request["overrides"], config.model
    if request["kind"] == "pretrain":
        if overrides.get("dataset.seq_length", model.seq_length) != model.seq_length:
            raise NemoflowError(
                f"overrides.dataset.seq_length: {overrides['dataset.seq_length']} differs from model.seq_length, "
                f"{model.seq_length}; leave it out"
            )
        config.dataset.seq_length = model.seq_length
    elif model.seq_length != request["data"]["pack_size"]:
        raise NemoflowError(
            f"overrides.model.seq_length: {model.seq_length} differs from the pack size of the data, "
            f"{request['data']['pack_size']}; leave it out"
        )


def _fit(config: ConfigContainer, request: dict) -> None:
    """Make model and data agree: vocabulary, and an architecture equal to the initial checkpoint's."""
    overrides, model = request["overrides"], config.model
    # The number of rows of the embedding stands in the configuration as it is, so that no later reader pads again.
    tokens = build_tokenizer(config.tokenizer).vocab_size
    if request["init"]:
        parent, _ = load_model_config(request["init"]["checkpoint"])
        rows = _rows(parent)
        if "model.vocab_size" not in overrides:
            model.vocab_size = rows
        parent.vocab_size = rows
        _same_architecture(model, parent, request["init"]["checkpoint"])
    elif "model.vocab_size" not in overrides:
        # Not by TP, which may change: the recipes' multiple, 128, suits all of them
        model.vocab_size = calculate_padded_vocab_size(tokens, model.make_vocab_size_divisible_by, 1)
    if model.vocab_size < tokens:
        raise NemoflowError(f"the tokenizer has {tokens} tokens and the model {model.vocab_size} rows for them")
    config.tokenizer.use_tokenizer_vocab_size = False
    model.should_pad_vocab = False


def _rows(model) -> int:
    if not model.should_pad_vocab:
        return model.vocab_size
    multiple = model.make_vocab_size_divisible_by
    return calculate_padded_vocab_size(model.vocab_size, multiple, model.tensor_model_parallel_size)


def _same_architecture(model, parent, checkpoint: str) -> None:
    differing = [k for k in ARCHITECTURE if getattr(model, k, None) != getattr(parent, k, None)]
    if differing:
        listed = ", ".join(f"{k} {getattr(parent, k, None)!r} (here {getattr(model, k, None)!r})" for k in differing)
        raise NemoflowError(f"init: the checkpoint {checkpoint} is of another architecture: it has {listed}")


def apply_overrides(config: ConfigContainer, overrides: dict) -> None:
    """Set `section.key` to its value, for every override, in place.

    A key may also name a whole section that the recipe leaves optional (`mixed_precision: null`). torch dtypes and
    enumerations are given by name. Raises NemoflowError, naming the override, for one that is refused or unknown (with
    the nearest known name), or whose value has a wrong type.
    """
    for key, value in overrides.items():
        if key in REFUSED:
            raise NemoflowError(f"overrides.{key}: a recipe cannot set this: {REFUSED[key]}")
        *path, name = key.split(".")
        owner, done = config, []
        for part in path:
            _known(owner, part, done, key)
            owner = _section(owner, part)
            done.append(part)
            if not is_dataclass(owner) and part != "env_vars":
                raise NemoflowError(f"overrides.{key}: {'.'.join(done)} is {owner!r}, which has no settings")
        if isinstance(owner, dict):
            owner[name] = value
            continue
        _known(owner, name, done, key)
        setattr(owner, name, _convert(value, owner, name, key))


def _section(owner, name: str):
    """The settings `owner` has under `name`: a precision given by name as its settings, and a section that the recipe
    function leaves out, such as comm_overlap, with its defaults."""
    if name == "mixed_precision" and isinstance(owner.mixed_precision, str):
        owner.mixed_precision = get_mixed_precision_config(owner.mixed_precision)
    elif name not in ("mixed_precision", "peft") and getattr(owner, name) is None:
        options = [option for option in _options(_hints(type(owner)).get(name)) if is_dataclass(option)]
        if len(options) == 1:
            needed = {"tp_comm_overlap": False} if options[0] is CommOverlapConfig else {}
            setattr(owner, name, options[0](**needed))
    return getattr(owner, name)


def _known(owner, name: str, done: list[str], key: str) -> None:
    known = [f.name for f in fields(owner) if not f.name.startswith("_")]
    if name not in known:
        place = ".".join(done)
        what = f"no setting {name!r} in {place}" if place else f"no section {name!r}"
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {'.'.join([*done, close[0]])!r}?" if close else f"known: {', '.join(sorted(known))}"
        raise NemoflowError(f"overrides.{key}: {what}; {hint}")


@functools.cache
def _hints(cls: type) -> dict:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a class whose annotations name what is only imported for type checkers
        return {}


def _options(hint) -> list:
    """The alternatives of a type hint, without the layers of Optional, Union and Annotated."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [o for h in typing.get_args(hint) for o in _options(h)]
    return [hint]


def _convert(value, owner, name: str, key: str):
    """`value` as the type that `owner`'s field `name` has. null is always allowed: upstream defaults are often None."""
    if value is None:
        return None
    current = getattr(owner, name)
    options = _options(_hints(type(owner)).get(name, typing.Any))
    if current is not None:
        options = [*options, type(current)]

    for option in options:
        if option is torch.dtype and isinstance(value, str):
            dtype = getattr(torch, value, None)
            if isinstance(dtype, torch.dtype):
                return dtype
            raise NemoflowError(f"overrides.{key}: {value!r} is no torch dtype; say float32 or bfloat16")
        if isinstance(option, type) and issubclass(option, enum.Enum) and isinstance(value, str):
            if value in option.__members__:
                return option[value]
            raise NemoflowError(f"overrides.{key}: {value!r} is none of {', '.join(option.__members__)}")
    plain = {o for o in options if o in (bool, int, float, str)}
    literals = [a for o in options if typing.get_origin(o) is typing.Literal for a in typing.get_args(o)]
    if literals and value not in literals and type(value) not in plain - {type(current)}:
        raise NemoflowError(f"overrides.{key}: {value!r} is none of {', '.join(map(repr, literals))}")
    containers = [o for o in options if typing.get_origin(o) in (list, tuple, dict) or o in (list, tuple, dict)]
    if plain and not containers and not literals and typing.Any not in options:
        if type(value) is int and float in plain and int not in plain:
            return float(value)
        if type(value) not in plain:
            right = " or ".join(sorted(o.__name__ for o in plain))
            raise NemoflowError(f"overrides.{key}: {value!r} is a {type(value).__name__}; it must be a {right}")
    if callable(current) and isinstance(value, str):
        raise NemoflowError(f"overrides.{key}: is a function of the recipe and cannot be given by name")
    return value


def resolved(config: ConfigContainer) -> dict:
    """`config` as plain YAML values."""
    text = io.StringIO()
    with safe_yaml_representers():
        yaml.safe_dump(config.to_dict(), text, default_flow_style=False)
    return yaml.safe_load(text.getvalue())


def record(config: ConfigContainer, path: Path, attempt: Path | None = None) -> None:
    """Write the resolved configuration to `path` at a stage's first start; later, refuse to go on when it differs.
    Each time it is written to `attempt`, for what may differ and does.

    Raises NemoflowError naming the settings that differ, except what may differ (UNCOMPARED).
    """
    now = resolved(config)
    text = yaml.safe_dump(now, sort_keys=True)
    if attempt:
        attempt.write_text(text, encoding="utf-8")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
        return
    before, now = flatten(yaml.safe_load(path.read_text(encoding="utf-8"))), flatten(now)
    missing = object()
    differing = sorted(k for k in {*before, *now} if not _outside(k) and before.get(k, missing) != now.get(k, missing))
    if differing:
        listed = "; ".join(f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise NemoflowError(
            f"{path}: the stage began with another configuration, so going on would mix two: {listed}{more}; "
            "bring it back, or raise the stage's `version:` to train it anew"
        )


def _outside(key: str) -> bool:
    return outside(key) or any(fnmatch.fnmatchcase(key, pattern) for pattern in UNCOMPARED)


def flatten(value, prefix: str = "") -> dict:
    """{'a': {'b': [1]}} -> {'a.b': [1]}; paths of data lose their directories, which may change between two slots."""
    if isinstance(value, dict) and value:
        return {k: v for name, each in value.items() for k, v in flatten(each, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): _without_directories(value)}


def _without_directories(value):
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    if isinstance(value, list):
        return [_without_directories(v) for v in value]
    return value
