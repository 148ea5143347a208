"""In what artifacts differ, together with what they were made from: settings, inputs, results, code.

Inputs are compared before what consumes them; what differs only because an input does is not said again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemoflow import kinds

Key = tuple[str, int | None]
"""An artifact: identity, and the state of a training."""


@dataclass
class Side:
    """An artifact, finished or planned. inputs: (role, key) in order. label: of its address, without the identity."""

    key: Key
    title: str
    payload: dict
    inputs: list[tuple[str, Key]]
    measures: dict = field(default_factory=dict)
    code: list[str] = field(default_factory=list)
    label: str = ""


@dataclass(frozen=True)
class Difference:
    """One difference: the artifact in human words, the setting, and both values; None where there is none."""

    where: str
    what: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {_short(self.a)} -> {_short(self.b)}"


class Walk:
    """Compares pairs of artifacts, each pair once, inputs before what consumes them."""

    def __init__(self, look: Callable[[Key], Side]):
        self.look, self.differences = look, list[Difference]()
        self._seen: set[tuple[Key, Key]] = set()

    def compare(self, a: Side, b: Side, title: str = "") -> None:
        """Add the differences of two artifacts of one kind, and before them those of their inputs."""
        stack = [(a, b, title, False)]
        while stack:
            a, b, title, inputs_done = stack.pop()
            if inputs_done:
                self._own(a, b, title or (a.title if a.title == b.title else f"{a.title} / {b.title}"))
            elif a.key != b.key and (a.key, b.key) not in self._seen:
                self._seen.add((a.key, b.key))
                stack.append((a, b, title, True))
                stack += [(self.look(x), self.look(y), "", False) for _, x, y in reversed(self._pairs(a, b)) if x and y]

    def _own(self, a: Side, b: Side, title: str) -> None:
        for role, x, y in self._pairs(a, b):
            if x is None or y is None:
                left, right = (self.look(key).title if key else None for key in (x, y))
                self.differences.append(Difference(title, role, left, right))
        left, right = settings(a), settings(b)
        if a.key[1] != b.key[1] and a.measures:
            left, right = left | {"at": a.key[1]}, right | {"at": b.key[1]}
        self._values(title, left, right, "")
        self._values(title, _flat(a.measures), _flat(b.measures), "result ")
        if a.code and b.code and set(a.code) != set(b.code):
            self.differences.append(Difference(title, "code", ", ".join(a.code), ", ".join(b.code)))

    def _values(self, title: str, a: dict, b: dict, prefix: str) -> None:
        for key in dict.fromkeys([*a, *b]):
            one, two = a.get(key), b.get(key)
            if one != two:
                self.differences += [
                    Difference(title, f"{prefix}{key}{place}", x, y) for place, x, y in _parts(one, two)
                ]

    def _pairs(self, a: Side, b: Side) -> list[tuple[str, Key | None, Key | None]]:
        """The inputs that only one of the two has, paired by role: those of one label in order, then what is left in
        order; None for what has no counterpart."""
        common = set(a.inputs) & set(b.inputs)
        found = []
        for role in dict.fromkeys(role for role, _ in (*a.inputs, *b.inputs)):
            one, two = ([key for r, key in side.inputs if r == role and (r, key) not in common] for side in (a, b))
            alike: dict[str, list[Key]] = {}
            for key in two:
                alike.setdefault(self.look(key).label, []).append(key)
            pairs = {key: same.pop(0) for key in one if (same := alike.get(self.look(key).label))}
            taken = set(pairs.values())
            left = iter([key for key in two if key not in taken])
            found += [(role, key, pairs.get(key) or next(left, None)) for key in one]
            found += [(role, None, key) for key in left]
        return found


def _parts(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Where two values differ: of two lists of one length the entries, and the keys of these; else the whole."""
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return [("", a, b)]
    found = []
    for number, (one, two) in enumerate(zip(a, b, strict=True)):
        if isinstance(one, dict) and isinstance(two, dict):
            keys = [key for key in dict.fromkeys([*one, *two]) if one.get(key) != two.get(key)]
            found += [(f"[{number}].{key}", one.get(key), two.get(key)) for key in keys]
        elif one != two:
            found.append((f"[{number}]", one, two))
    return found


def settings(side: Side) -> dict:
    """The payload by dotted key, with defaults, and inputs by their role: that they differ is said where they do."""
    roles = {key[0]: role for role, key in side.inputs}
    kind = side.payload["kind"]
    return _flat(kinds.complete(side.payload) if kind in kinds.KINDS else side.payload, roles)


def _flat(value: dict, roles: dict[str, str] | None = None, prefix: str = "") -> dict:
    found = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= _flat(item, roles, f"{prefix}{key}.")
        else:
            found[prefix + key] = _named(item, roles or {})
    return found


def _named(item: Any, roles: dict[str, str]) -> Any:
    if isinstance(item, list):
        return [_named(one, roles) for one in item]
    if isinstance(item, dict):
        return {key: _named(one, roles) for key, one in item.items()}
    return f"<{roles[item]}>" if isinstance(item, str) and item in roles else item


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{len(value):,} entries" if isinstance(value, list) else f"{text[:97]}..."
