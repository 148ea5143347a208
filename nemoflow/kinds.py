"""The kinds of artifact: what may stand in their payloads, their defaults, labels and inputs.

A payload holds what defines a result and nothing else. A setting equal to its default is left out, so a new setting
with a default changes no identity; hence a released default never changes (tests/test_kinds.py holds this table).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TRAINED = ("pretrain", "sft", "rl")
"""Kinds that are trajectories: their artifacts are states at-<N>."""


@dataclass(frozen=True)
class Kind:
    """One kind of artifact.

    defaults: settings left out of the payload when equal to these.
    algorithm: raised by hand when the bytes this kind makes from the same payload change; 1 is left out of the payload.
    label: payload -> readable part of the address; a pure function of the payload and its inputs' payloads.
    """

    label: Callable[[dict, Callable[[str], dict]], str]
    defaults: dict[str, Any] = field(default_factory=dict)
    algorithm: int = 1


def slug(text: str, limit: int = 48) -> str:
    """`text` in the characters of an address: lower case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:limit].strip("-.") or "x"


def _source(payload: dict, _: Callable) -> str:
    if "generator" in payload:
        return slug(payload["generator"])
    if "hub" in payload:
        hub = payload["hub"]
        parts = [hub["repo"].rpartition("/")[2], hub.get("config"), hub.get("split", "train")]
        return slug("-".join(p for p in parts if p and p not in ("default", "train")))
    if "model" in payload:
        return slug(payload["model"].get("repo", "local").rpartition("/")[2])
    return slug(f"{payload['format']}-{len(payload['files'])}-files")


def _tokenizer(payload: dict, _: Callable) -> str:
    if "hub" in payload:
        return slug(payload["hub"]["repo"].rpartition("/")[2], 32)
    return slug(f"bpe-{payload['vocab_size']}") if "vocab_size" in payload else "imported"


def _shards(payload: dict, look: Callable) -> str:
    name = f"{_source(look(payload['source']), look)}-{_tokenizer(look(payload['tokenizer']), look)}"
    first, count = payload.get("first", 0), len(payload["shards"])
    return f"{name}-{first}-{first + count - 1}" if count > 1 else f"{name}-{first}"


def _merge(payload: dict, look: Callable) -> str:
    tokenizer = look(look(payload["parts"][0])["tokenizer"])
    return f"{_source(look(payload['source']), look)}-{_tokenizer(tokenizer, look)}"


def _blend(payload: dict, look: Callable) -> str:
    names = [_source(look(look(part["merge"])["source"]), look) for part in payload["parts"]]
    return slug("-".join(names)) if len(names) < 4 else f"{len(names)}-sources"


def _index(payload: dict, look: Callable) -> str:
    return f"{_blend(look(payload['data']), look)}-{payload['samples']}-samples"


def _chats(payload: dict, look: Callable) -> str:
    names = [_source(look(part["source"]), look) for part in payload["parts"]]
    return slug("-".join([f"packed-{payload['pack_size']}", *(names if len(names) < 4 else [f"{len(names)}-sources"])]))


def _rows(payload: dict, look: Callable) -> str:
    return slug("-".join(_source(look(part["source"]), look) for part in payload["parts"]))


def _megatron(payload: dict, _: Callable) -> str:
    """The recipe function's model: nemotron_3_nano_pretrain_config -> nemotron-3-nano."""
    name = payload.get("function") or payload["engine"]
    return slug(re.sub(r"_(pretrain|sft|peft)(_config)?$", "", name.rpartition(".")[2]))


def _rl(payload: dict, _: Callable) -> str:
    return slug(payload["algorithm"])


def _import(payload: dict, look: Callable) -> str:
    return _source(look(payload["model"]), look)


def _average(payload: dict, look: Callable) -> str:
    return f"{_state(payload['of'][0], look)}-and-{len(payload['of']) - 1}-more"


def _select(payload: dict, look: Callable) -> str:
    of = _state({"trajectory": payload["of"][0]["trajectory"]}, look)
    return f"{payload['best']}-{slug(payload['metric'])}-{of}"


def _state(of: dict, look: Callable) -> str:
    """A trajectory's state, or a flat model such as an import."""
    model = look(of["trajectory"])
    label = f"{KINDS[model['kind']].label(model, look)}-{model['kind']}"
    return f"{label}-{of['at']}" if "at" in of else label


def _export(payload: dict, look: Callable) -> str:
    return _state(payload["of"], look)


def _eval(payload: dict, look: Callable) -> str:
    return f"{slug(payload['task']['name'])}-{_export(look(payload['of']), look)}"


KINDS: dict[str, Kind] = {
    "source": Kind(_source, {"seed": 0, "args": {}}),
    "tokenizer": Kind(_tokenizer, {"chat_template": "chatml"}, algorithm=2),
    "shards": Kind(
        _shards,
        {
            "text_field": "text",
            "append_eod": True,
            "control_strings": "plain",
            "max_broken": "1/1000",
            "pool": "1",
            "first": 0,
        },
    ),
    "merge": Kind(_merge, {"valid": 8_000_000, "test": 8_000_000, "cap": "1/50", "prefixes": 1}),
    "blend": Kind(_blend),
    "index": Kind(_index, {"overrides": {}, "arguments": {}, "hf_config": {}}),
    "chats": Kind(
        _chats,
        {
            "valid": "1/20",
            "seed": 0,
            "too_long": "drop",
            "pad_multiple": 1,
            "max_broken": "1/1000",
        },
        algorithm=2,
    ),
    "prompts": Kind(
        _rows, {"valid": "1/20", "placeholders": {}, "allow_unresolved": [], "max_broken": "0", "agents": {}}
    ),
    "preferences": Kind(_rows, {"valid": "1/20", "fields": {}, "max_broken": "1/1000"}),
    "import": Kind(_import, {"version": 1, "hf_config": {}}),
    "average": Kind(_average, {"version": 1}),
    "select": Kind(_select, {"version": 1}),
    "pretrain": Kind(_megatron, {"version": 1, "overrides": {}, "arguments": {}, "hf_config": {}, "skip": 0}),
    "sft": Kind(_megatron, {"version": 1, "overrides": {}, "arguments": {}, "skip": 0}),
    "rl": Kind(_rl, {"version": 1, "overrides": {}, "environments": {}}),
    "hf_export": Kind(_export, {"dtype": "bfloat16"}),
    "eval": Kind(_eval, {"fewshot": None, "limit": None, "chat": False}),
}


def payload(kind: str, **settings: Any) -> dict:
    """The payload of a stage of `kind`: its settings less those that equal their defaults or are None."""
    defaults = KINDS[kind].defaults
    kept = {k: v for k, v in settings.items() if v is not None and not (k in defaults and v == defaults[k])}
    if KINDS[kind].algorithm != 1:
        kept["algorithm_version"] = KINDS[kind].algorithm
    return {"kind": kind, **kept}


def complete(payload: dict) -> dict:
    """The payload with every default written out, as the programs that make artifacts read it."""
    return {**KINDS[payload["kind"]].defaults, **payload}


@dataclass(frozen=True)
class Ref:
    """A reference to an artifact: a stage, and for a trajectory the state `at`. `role` says what it is used for."""

    role: str
    identity: str
    at: int | None = None


def inputs(payload: dict) -> list[Ref]:
    """The artifacts a stage consumes, in order; a role may stand several times."""
    match payload["kind"]:
        case "source":
            return []
        case "tokenizer":
            return [Ref("sources", s) for s in payload.get("sources", [])]
        case "shards":
            return [Ref("source", payload["source"]), Ref("tokenizer", payload["tokenizer"])]
        case "merge":
            return [*(Ref("parts", part) for part in payload["parts"]), Ref("source", payload["source"])]
        case "blend":
            return [Ref("parts", part["merge"]) for part in payload["parts"]]
        case "index":
            return [Ref("data", payload["data"]), Ref("tokenizer", payload["tokenizer"])]
        case "chats":
            return [Ref("sources", part["source"]) for part in payload["parts"]] + [
                Ref("tokenizer", payload["tokenizer"])
            ]
        case "prompts":
            found = [Ref("sources", part["source"]) for part in payload["parts"]]
            placeholders = payload.get("placeholders", {})
            return found + [Ref("placeholder_sources", placeholders[key]["source"]) for key in sorted(placeholders)]
        case "preferences":
            return [Ref("sources", part["source"]) for part in payload["parts"]]
        case "pretrain" | "sft" | "rl":
            init = payload.get("init", {})
            start = [Ref("init", init["from"], init.get("at"))] if "from" in init else []
            start += [Ref("model", init["export"])] if "export" in init else []
            start += [Ref("teacher", payload["teacher"])] if "teacher" in payload else []
            return [*start, Ref("data", payload["data"]), Ref("tokenizer", payload["tokenizer"])]
        case "import":
            return [Ref("model", payload["model"]), Ref("tokenizer", payload["tokenizer"])]
        case "average" | "select":
            return [Ref("states", of["trajectory"], of.get("at")) for of in payload["of"]]
        case "hf_export":
            of = payload["of"]
            found = [Ref("state", of["trajectory"], of.get("at")), Ref("tokenizer", payload["tokenizer"])]
            base = payload.get("base")
            return [*found, Ref("base", base["trajectory"], base.get("at"))] if base else found
        case "eval":
            data = payload["data"]
            return [Ref("model", payload["of"]), *(Ref("sources", data[split]) for split in sorted(data))]
    raise ValueError(f"no such kind: {payload['kind']}")
