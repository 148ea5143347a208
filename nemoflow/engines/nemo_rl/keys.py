"""The settings of NeMo-RL's releases as a table, keys.json, by which overrides and configurations are checked.

survey.py makes the table from checkouts. Reading it needs nothing of NeMo-RL.
"""

import difflib
import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("keys.json")

_NAMES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "list": "a list"}
_NAMES |= {"null": "null", "section": "a section", "open": "a mapping"}


@functools.cache
def table(release: str) -> dict:
    """{"keys", "required", "sections", "defaults"} of a release; see survey.py."""
    return json.loads(TABLE.read_text(encoding="utf-8"))[release]


def _types(release: str, key: str) -> set[str] | None:
    """Types of a setting; None where there is no such setting."""
    known = table(release)["keys"]
    if key in known:
        return set(known[key].split("|"))
    parts = key.split(".")
    above = (known.get(".".join(parts[:count])) for count in range(len(parts) - 1, 0, -1))
    nearest = next((types.split("|") for types in above if types), [])
    return {"any"} if {"open", "any"} & set(nearest) else None


def is_free(key: str) -> bool:
    """Whether NeMo-Gym or vLLM, not NeMo-RL, says what may stand there."""
    return key.startswith(("env.", "policy.generation.vllm_kwargs.", "policy.optimizer.kwargs."))


def problem(release: str, algorithm: str | None, key: str, value: Any) -> str | None:
    """What is wrong with setting `key` to `value`, or None. algorithm: None before it is known."""
    sections = table(release)["sections"]
    section = key.partition(".")[0]
    if algorithm and section not in sections[algorithm]:
        return f"{algorithm} has no section {section}; it has {', '.join(sections[algorithm])}"
    if is_free(key):
        return None
    found = _types(release, key)
    if found is None:
        close = difflib.get_close_matches(key, table(release)["keys"], 1, cutoff=0.7)
        others = [r for r in json.loads(TABLE.read_text(encoding="utf-8")) if r != release and _types(r, key)]
        hint = f"did you mean {close[0]}?" if close else "see keys.json"
        return f"NeMo-RL {release} has no such setting; {f'{others[0]} has it; ' if others else ''}{hint}"
    return None if _fits(value, found) else f"{value!r}: {' or '.join(_NAMES[t] for t in sorted(found))} is wanted"


def _fits(value: Any, types: set[str]) -> bool:
    if "any" in types or (isinstance(value, str) and value.startswith("${")):
        return True
    match value:
        case None:
            return "null" in types
        case bool():
            return "bool" in types
        case int():
            return bool({"int", "float"} & types)
        case float():
            return "float" in types
        case dict():
            return bool({"section", "open"} & types)
    return {str: "str", list: "list"}.get(type(value)) in types


def problems(release: str, algorithm: str, content: dict) -> list[str]:
    """All that is wrong with a whole resolved configuration: unknown keys, wrong types, and keys that are missing in
    sections that are there and not disabled."""
    found: list[str] = []

    def visit(section: dict, prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            if said := problem(release, algorithm, key, value):
                found.append(f"{key}: {said}")
            elif isinstance(value, dict) and value.get("enabled", True) is not False and not is_free(f"{key}."):
                visit(value, f"{key}.")

    visit(content, "")
    for key in table(release)["required"][algorithm]:
        section, _, name = key.rpartition(".")
        above: Any = content
        enabled = True
        for part in section.split(".") if section else []:
            above = above.get(part) if isinstance(above, dict) else None
            enabled = enabled and isinstance(above, dict) and above.get("enabled", True) is not False
        if enabled and isinstance(above, dict) and name not in above:
            found.append(f"{key}: is missing")
    return found
