"""The canonical form: one text per meaning, and a refusal for everything else."""

import datetime
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemoflow.canonical import canonical, identity, plain
from nemoflow.errors import NemoflowError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value):
    """The same with the keys of every mapping in another order."""
    if isinstance(value, dict):
        return {k: reordered(v) for k, v in reversed(value.items())}
    return [reordered(v) for v in value] if isinstance(value, list) else value


@given(values)
def test_key_order_means_nothing(value):
    assert canonical(reordered(value)) == canonical(value)


@given(values)
def test_reading_the_text_back_gives_the_same_text(value):
    assert canonical(json.loads(canonical(value))) == canonical(value)


@given(values, values)
def test_different_values_have_different_texts(one, other):
    assert (canonical(one) == canonical(other)) == (repr(_exact(one)) == repr(_exact(other)))


def _exact(value):
    """The value with numbers of equal worth made one, but True and 1 kept apart by repr, and mappings sorted."""
    if isinstance(value, dict):
        return sorted((k, _exact(v)) for k, v in value.items())
    if isinstance(value, list):
        return ("list", [_exact(v) for v in value])
    return int(value) if isinstance(value, float) and value == math.trunc(value) else value


def test_numbers_have_one_spelling():
    assert canonical({"lr": 1.0e-3}) == canonical({"lr": 0.001}) == '{"lr":0.001}'
    assert canonical([1.0, -0.0, 2e3, Fraction(3, 10), Fraction(2, 2)]) == '[1,0,2000,"3/10","1"]'
    assert canonical([True, 1, None, "1"]) == '[true,1,null,"1"]'


def test_the_text_is_compact_sorted_and_unescaped():
    assert canonical({"b": ["ü", 1], "a": {}}) == '{"a":{},"b":["ü",1]}'


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        (1, 2),
        {1, 2},
        b"bytes",
        Path("/tmp"),
        datetime.date(2026, 1, 1),
        Decimal("0.1"),
        object(),
        1j,
        "\ud800",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_canonical_form_is_refused_by_its_path(value):
    with pytest.raises(NemoflowError, match=r"payload\.stages\[1\]\.lr: "):
        plain({"stages": [0, {"lr": value}]})


@pytest.mark.parametrize("key", [1, 1.5, True, None, ("a",)])
def test_keys_that_are_no_text_are_refused(key):
    with pytest.raises(NemoflowError, match="put it in quotes"):
        canonical({"outer": {key: 1}})


def test_identities_never_change():
    """The addresses of everything ever made hang on this."""
    assert identity({}) == "44136fa355b3"
    payload = {"kind": "sft", "lr": 1e-3, "parts": [{"share": Fraction(1, 3)}], "text": "äé", "none": None, "on": True}
    assert identity(payload) == "96e043108302"
