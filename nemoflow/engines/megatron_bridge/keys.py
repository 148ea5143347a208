"""The settings of the installed Megatron-Bridge as a table, keys.json, by which a recipe is checked without Megatron.

    python -m nemoflow.engines.megatron_bridge.keys          writes keys.json anew, after a change of release

The table has, per section of ConfigContainer, the classes it can hold; per class, its keys with their types; what the
mixed precision recipes set; and per known recipe function, the values that the geometry depends on (VALUES). Only
reading it needs no Megatron.
"""

import difflib
import functools
import json
import types
from pathlib import Path

FILE = Path(__file__).with_name("keys.json")

RECIPES = "megatron.bridge.recipes."
FAMILIES = ("deepseek", "glm", "gpt_oss", "llama", "moonlight", "nemotronh", "olmoe", "qwen")
"""The packages of recipe functions whose values the table has: language models that need no more of the hub than what
AutoBridge.from_hf_pretrained returns."""

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8")
"""Types of numbers by torch's names."""

PACKAGES = ("megatron-bridge", "megatron-core")

VALUES = {
    "checkpoint": ["ckpt_format"],
    "comm_overlap": ["overlap_moe_expert_parallel_comm", "delay_wgrad_compute"],
    "dataset": ["dataloader_type", "eod_mask_loss", "seq_length"],
    "ddp": [
        "average_in_collective",
        "data_parallel_sharding_strategy",
        "fsdp_manual_registration",
        "nccl_ub",
        "num_distributed_optimizer_instances",
        "use_distributed_optimizer",
        "use_megatron_fsdp",
    ],
    "dist": [
        "eval_context_parallel_size",
        "use_decentralized_pg",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "use_tp_pp_dp_mapping",
    ],
    "model": [
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "bf16",
        "calculate_per_token_loss",
        "context_parallel_size",
        "cp_comm_type",
        "cpu_offloading",
        "cuda_graph_impl",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "ffn_hidden_size",
        "first_last_layers_bf16",
        "fp16",
        "fp4",
        "fp4_recipe",
        "fp8",
        "fp8_recipe",
        "hidden_size",
        "hierarchical_context_parallel_sizes",
        "hybrid_layer_pattern",
        "kv_channels",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_num_heads",
        "mamba_state_dim",
        "microbatch_group_size_per_vp_stage",
        "moe_aux_loss_coeff",
        "moe_expert_capacity_factor",
        "moe_ffn_hidden_size",
        "moe_flex_dispatcher_backend",
        "moe_grouped_gemm",
        "moe_pad_expert_input_to_capacity",
        "moe_router_group_topk",
        "moe_router_load_balancing_type",
        "moe_router_num_groups",
        "moe_router_topk",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
        "mtp_hybrid_override_pattern",
        "mtp_num_layers",
        "multi_latent_attention",
        "num_attention_heads",
        "num_layers",
        "num_layers_at_end_in_bf16",
        "num_layers_at_start_in_bf16",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "num_moe_experts",
        "num_query_groups",
        "params_dtype",
        "pipeline_dtype",
        "pipeline_model_parallel_layout",
        "pipeline_model_parallel_size",
        "recompute_granularity",
        "recompute_method",
        "recompute_modules",
        "recompute_num_layers",
        "seq_length",
        "sequence_parallel",
        "tensor_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ],
    "optimizer": ["use_distributed_optimizer"],
    "train": ["check_weight_hash_across_dp_replicas_interval", "global_batch_size", "micro_batch_size"],
    "validation": ["eval_global_batch_size", "eval_iters", "eval_micro_batch_size"],
}
"""The settings by section that geometry.py reads."""

MODELS = ("MLAModelProvider", "HybridModelProvider", "GPTModelProvider")
"""The classes of models."""

PRECISION = ("bf16", "first_last_layers_bf16", "fp16", "fp4", "fp4_recipe", "fp8", "fp8_recipe")
PRECISION += ("fp8_param_gather", "num_layers_at_end_in_bf16", "num_layers_at_start_in_bf16", "params_dtype")
PRECISION += ("pipeline_dtype", "reuse_grad_buf_for_mxfp8_param_ag")
"""Fields of MixedPrecisionConfig; a job copies them over the model's fields of the same names."""


@functools.cache
def table() -> dict:
    """What keys.json says."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def function(name: str | None) -> dict | None:
    """What the table has of the recipe function with this dotted name: `model`, its class; `hub`, the model it asks the
    hub for; `values`, by section.key; None for a function that is not in the table."""
    short = (name or "").removeprefix(RECIPES)
    known = table()
    return known["functions"].get(known["aliases"].get(short, short))


def misspelt(name: str | None) -> str | None:
    """Why there cannot be a recipe function of this name, with the nearest; None where there is, or may be one."""
    short, known = (name or "").removeprefix(RECIPES), table()
    if short == name or short.partition(".")[0] not in FAMILIES:
        return None
    names = {*known["functions"], *known["aliases"], *known["others"]}
    if short in names:
        return None
    module, _, wanted = short.rpartition(".")
    own = {each.rpartition(".")[2] for each in names if each.rpartition(".")[0] == module}
    if own:
        return f"no such recipe function in {RECIPES}{module}; {near(wanted, own)}"
    return f"no such recipe function; {near(short, names, RECIPES)}"


def near(word: str, known, prefix: str = "") -> str:
    """A hint at the nearest of the `known` words, or at all of them."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.6)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    shown = sorted(known)
    return f"there are {', '.join(shown[:40])}{', ...' if len(shown) > 40 else ''}"


def problem(key: str, value) -> str | None:
    """Why no recipe can set `key` (section.name) to `value`, with what would be right; None where one can."""
    known = table()
    section, _, name = key.partition(".")
    if section not in known["sections"]:
        return f"no section of Megatron-Bridge's; {near(section, known['sections'])}"
    classes = known["sections"][section]
    if not name:
        if value is None and section in known["optional"]:
            return None
        if section == "mixed_precision":
            if isinstance(value, str) and value.replace("-", "_") in known["precisions"]:
                return None
            return f"{value!r} is no mixed precision recipe; {near(str(value), known['precisions'])}"
        return f"is a section; set its keys, such as {section}.{next(iter(_keys(*classes)), 'NAME')}"
    if section == "env_vars":
        good = isinstance(value, str | int | float)
        return None if good else f"{value!r} is a {type(value).__name__}; it must be text or a number"
    return _problem(section, name, classes, value)


@functools.cache
def _keys(*classes: str) -> dict[str, list]:
    """The keys of several classes with all their types."""
    found: dict[str, list] = {}
    for cls in classes:
        for name, kinds in table()["classes"][cls].items():
            found[name] = found.get(name, []) + [kind for kind in kinds if kind not in found.get(name, [])]
    return found


def _problem(done: str, rest: str, classes: list[str], value) -> str | None:
    name, _, rest = rest.partition(".")
    keys = _keys(*classes)
    if name not in keys:
        return f"no setting {name!r} in {done}; {near(name, keys, f'{done}.')}"
    if rest:
        inner = [kind["class"] for kind in keys[name] if isinstance(kind, dict) and "class" in kind]
        if inner:
            return _problem(f"{done}.{name}", rest, inner, value)
        return f"{done}.{name} has no settings of its own"
    return mismatch(value, keys[name])


def mismatch(value, kinds: list) -> str | None:
    """Why `value` is none of `kinds`, types as the table writes them; None where it is one. null is always allowed,
    because defaults of upstream often are None where the type says otherwise."""
    if value is None or "any" in kinds or any(_is(value, kind) for kind in kinds):
        return None
    if not (set(map(str, kinds)) - {"function"}):
        return "is a function of the recipe function's and cannot be given by name"
    right = " or ".join(_said(kind) for kind in kinds if kind != "function")
    hint = ""
    if isinstance(value, str) and {"int", "float"} & {k for k in kinds if isinstance(k, str)} and _number(value):
        hint = f" (YAML reads {value} as text: write {float(value)!r})"
    chosen = isinstance(value, str) and all(isinstance(k, dict) and {"enum", "literal"} & k.keys() for k in kinds)
    found = repr(value) if chosen else f"{value!r} is {_said(type(value).__name__, 'a value of another type')}"
    return f"{found}; it must be {right}{hint}"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is(value, kind) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return type(value) is int
        case "float":
            return type(value) in (int, float)
        case "str":
            return isinstance(value, str)
        case "dtype":
            return value in DTYPES
        case "dict":
            return isinstance(value, dict)
        case {"enum": names}:
            return value in names
        case {"literal": values}:
            return any(value == each and type(value) is type(each) for each in values)
        case {"list": kinds}:
            return isinstance(value, list) and all(mismatch(each, kinds) is None for each in value)
    return False


def _said(kind, otherwise: str = "") -> str:
    match kind:
        case "list":
            return "a list"
        case {"enum": values} | {"literal": values}:
            return f"one of {', '.join(map(str, values))}"
        case {"list": kinds}:
            return f"a list of {' or '.join(map(_said, kinds))}"
        case {"class": _}:
            return "set by its own keys"
        case "dtype":
            return f"one of {', '.join(DTYPES)}"
    names = {"bool": "true or false", "int": "an int", "float": "a float", "str": "text", "dict": "a mapping"}
    return names.get(kind, otherwise)


# -- making the table: imports Megatron --------------------------------------------------------------------------------


def text(_=None) -> str:
    """keys.json for the installed release. Asks no network: what a recipe function wants from the hub is made up."""
    from importlib.metadata import version

    from nemoflow import cpu

    cpu.enable()
    from megatron.bridge.training.mixed_precision import MIXED_PRECISION_RECIPES as PRECISIONS

    classes: dict[str, dict] = {}
    defaults: dict[str, dict] = {}
    sections, optional = _sections(classes, defaults)
    functions, aliases, others = _functions(defaults)
    made = {
        "release": {name: version(name) for name in PACKAGES},
        "sections": sections,
        "optional": optional,
        "classes": classes,
        "defaults": defaults,
        "precisions": {
            name: {field: _plain(getattr(recipe(), field)) for field in PRECISION}
            for name, recipe in PRECISIONS.items()
            if "-" not in name
        },
        "functions": functions,
        "aliases": aliases,
        "others": others,
    }
    return _format(made)


def _format(value, depth: int = 0) -> str:
    """JSON with a line per key of a class and per function, so that a new release can be read as a difference."""
    if not isinstance(value, dict) or depth == 3 or not value:
        return json.dumps(value, sort_keys=True)
    inner = ",\n".join(
        f"{' ' * (depth + 1)}{json.dumps(key)}: {_format(value[key], depth + 1)}" for key in sorted(value)
    )
    return f"{{\n{inner}\n{' ' * depth}}}" + ("\n" if depth == 0 else "")


def _sections(classes: dict[str, dict], defaults: dict[str, dict]) -> tuple[dict[str, list[str]], list[str]]:
    """The classes each section can hold, among those the engine uses, and the sections that can be null.

    Fills in the keys of these classes, and what they have for VALUES before a recipe function sets anything.
    """
    import typing
    from dataclasses import MISSING, fields, is_dataclass

    from megatron.bridge.data.builders import GPTSFTDatasetConfig
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.models.mla_provider import MLAModelProvider
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig

    used = {
        "dataset": [GPTDatasetConfig, GPTSFTDatasetConfig],
        "model": [HybridModelProvider, GPTModelProvider, MLAModelProvider],
        "peft": [LoRA, DoRA],
        "env_vars": [],
    }
    hints = typing.get_type_hints(ConfigContainer)
    sections, optional = {}, []
    for field in fields(ConfigContainer):
        if field.name.startswith("_"):
            continue
        options = _options(hints[field.name])
        held = used.get(field.name, [cls for cls in options if is_dataclass(cls)])
        settable = [cls for cls in held if _described(cls, classes)]
        if not settable and field.name != "env_vars":
            continue
        sections[field.name] = [cls.__name__ for cls in held]
        for cls in held if field.name in VALUES else ():
            found = {f.name: _plain(f.default) for f in fields(cls) if f.default is not MISSING}
            known = {name: found.get(name) for name in VALUES[field.name]}
            defaults[cls.__name__] = {name: value for name, value in known.items() if value is not None}
        if type(None) in options:
            optional.append(field.name)
    return sections, optional


def _described(cls: type, classes: dict[str, dict]) -> bool:
    """Enter the keys of `cls`, and of the classes its keys hold. Whether it has any."""
    import typing
    from dataclasses import fields

    if cls.__name__ in classes:
        return bool(classes[cls.__name__])
    entry = classes[cls.__name__] = {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # annotations name what is imported for type checkers only
        hints = {}
    for field in fields(cls):
        if field.name.startswith("_"):
            continue
        kinds = _kinds(hints.get(field.name, typing.Any), classes)
        # An annotation that its own default belies
        if type(field.default) in (bool, int, float, str) and not any(_is(field.default, kind) for kind in kinds):
            kinds = [kind for kind in kinds if kind != "any"] + [type(field.default).__name__]
        entry[field.name] = kinds
    return bool(entry)


def _options(hint) -> list:
    """The alternatives of a type hint, without the layers of Optional, Union and Annotated."""
    import typing

    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for each in typing.get_args(hint) for option in _options(each)]
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    return [hint]


def _kinds(hint, classes: dict[str, dict]) -> list:
    """A type hint as the table writes it."""
    import collections.abc
    import enum
    import typing
    from dataclasses import is_dataclass

    import torch
    from megatron.core.transformer import ModuleSpec

    found: list = []
    for option in _options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option is type(None):
            continue
        if option is typing.Any:
            kind = "any"
        elif origin is typing.Literal:
            kind = {"literal": list(arguments)}
        elif (origin or option) in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
            inner = [k for a in arguments if a is not Ellipsis for k in _kinds(a, classes)] or ["any"]
            kind = {"list": [k for n, k in enumerate(inner) if k not in inner[:n]]}
        elif (origin or option) in (dict, collections.abc.Mapping):
            kind = "dict"
        elif option in (bool, int, float, str):
            kind = option.__name__
        elif option is Path:
            kind = "str"
        elif option is torch.dtype:
            kind = "dtype"
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            kind = {"enum": list(option.__members__)}
        elif isinstance(option, type) and is_dataclass(option):
            settable = option is not ModuleSpec and _described(option, classes)
            kind = {"class": option.__name__} if settable else "function"
        else:
            kind = "function"  # callables, module specs, process groups: made by recipe functions only
        if kind not in found:
            found.append(kind)
    if any(isinstance(kind, dict) and "enum" in kind for kind in found) and "str" in found:
        found.remove("str")  # a string is read as a member's name
    return found or ["any"]


def _plain(value):
    """A setting as JSON; functions and objects as None."""
    import enum

    import torch

    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else None


def _functions(defaults: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str], list[str]]:
    """The recipe functions of FAMILIES by dotted name, the other names they go by, and names of what is not told."""
    import importlib
    import inspect
    import pkgutil

    functions: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    others: set[str] = set()
    for family in FAMILIES:
        package = importlib.import_module(RECIPES + family)
        inner = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        for module in map(importlib.import_module, [package.__name__, *inner]):
            for name, made in vars(module).items():
                own = inspect.isfunction(made) and made.__module__.startswith(package.__name__ + ".")
                if not own or not name.endswith("_config") or name.startswith("_"):
                    continue
                true = f"{made.__module__}.{made.__name__}".removeprefix(RECIPES)
                alias = f"{module.__name__}.{name}".removeprefix(RECIPES)
                if true not in functions and true not in others:
                    if values := _values(made, defaults):
                        functions[true] = values
                    else:
                        others.add(true)
                if true in others:
                    others.add(alias)
                elif alias != true:
                    aliases[alias] = true
    return functions, aliases, sorted(others)


def _values(function, defaults: dict[str, dict]) -> dict | None:
    """What a recipe function sets, as far as the geometry reads it; of a model from the hub, what it changes of it.

    None for one that asks the hub for more than a model, or only says that it does not exist yet.
    """
    from unittest import mock

    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config
    from transformers import AutoConfig

    class Asked(GPTModelProvider):
        """A model in the place of the hub's, which notes what is set."""

        def __setattr__(self, name, value):
            object.__setattr__(self, name, value)
            self.__dict__.setdefault("_noted", set()).add(name)

    hub: list[str] = []

    def ask(name, *_, **__):
        hub.append(str(name))
        model = Asked(num_layers=1, hidden_size=1, num_attention_heads=1)
        model.__dict__["_noted"] = set()
        return types.SimpleNamespace(to_megatron_provider=lambda *_, **__: model)

    class Missing(Exception):
        """What the hub would have to say."""

    with (
        mock.patch.object(AutoBridge, "from_hf_pretrained", ask),
        mock.patch.object(AutoConfig, "from_pretrained", side_effect=Missing),
    ):
        try:
            config = function()
        except (Missing, NotImplementedError):
            return None
    values = {}
    for section, names in VALUES.items():
        owner = getattr(config, section)
        noted = owner.__dict__.get("_noted") if section == "model" else None
        usual = {} if noted is not None else _usual(owner, defaults)
        for name in names if owner is not None else ():
            if hasattr(owner, name) and (noted is None or name in noted):
                value = _plain(getattr(owner, name))
                if noted is not None or value != usual.get(name):
                    values[f"{section}.{name}"] = value
    precision = config.mixed_precision and get_mixed_precision_config(config.mixed_precision)
    return {
        "model": None if hub else next(c.__name__ for c in type(config.model).__mro__ if c.__name__ in MODELS),
        "dataset": type(config.dataset).__name__,
        "hub": hub[0] if hub else None,
        "tokenizer": config.tokenizer.tokenizer_model,
        "values": values,
        "precision": precision and {name: _plain(getattr(precision, name)) for name in PRECISION},
    }


def _usual(owner, defaults: dict[str, dict]) -> dict:
    """The defaults of an object's class, or of the nearest one above that the table has."""
    return next((defaults[c.__name__] for c in type(owner).__mro__ if c.__name__ in defaults), {})


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
