"""The canonical form of a payload, and the identity derived from it.

Two payloads that mean the same have the same canonical text whatever the order of their keys or the spelling of their
numbers (`1.0e-3` and `0.001`, `1.0` and `1`). What cannot be written in exactly one way is refused, never guessed.
"""

import hashlib
import json
import math
from fractions import Fraction
from typing import Any

from nemoflow.errors import NemoflowError

IDENTITY_DIGITS = 12
"""Hex digits of an identity: 48 bits. A collision is detected when a stage is frozen, never silent."""


def plain(value: Any, key: str = "payload") -> Any:
    """`value` in JSON types with one spelling each; `key` is the path named in errors.

    Floats with an integral value become integers, fractions become strings such as "3/10".

    Raises NemoflowError for NaN, infinities, keys that are not strings, and any other type.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise NemoflowError(f"{key}: {value!r} is half of a character, which has no canonical form") from None
        return value
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NemoflowError(f"{key}: {value} has no canonical form; give a finite number")
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise NemoflowError(f"{key}: the key {name!r} is {type(name).__name__}; put it in quotes")
        return {plain(name, key): plain(item, f"{key}.{name}") for name, item in value.items()}
    raise NemoflowError(f"{key}: {value!r} ({type(value).__name__}) has no canonical form")


def canonical(value: Any) -> str:
    """The one text that stands for `value`: JSON, keys sorted, no spaces, UTF-8 unescaped."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity(payload: dict) -> str:
    """The identity of a payload: that of its canonical text."""
    return identity_of(canonical(payload))


def identity_of(text: str) -> str:
    """The first IDENTITY_DIGITS hex digits of the SHA-256 of a canonical text."""
    return hashlib.sha256(text.encode()).hexdigest()[:IDENTITY_DIGITS]
