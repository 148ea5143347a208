"""The table of defaults: a released default never changes, since settings equal to it are in no identity."""

import pytest

from nemoflow import kinds

DEFAULTS = {
    "source": {"seed": 0, "args": {}},
    "tokenizer": {"chat_template": "chatml"},
    "shards": {
        "text_field": "text",
        "append_eod": True,
        "control_strings": "plain",
        "max_broken": "1/1000",
        "pool": "1",
        "first": 0,
    },
    "merge": {"valid": 8_000_000, "test": 8_000_000, "cap": "1/50", "prefixes": 1},
    "blend": {},
    "index": {"overrides": {}, "arguments": {}, "hf_config": {}},
    "chats": {"valid": "1/20", "seed": 0, "too_long": "drop", "pad_multiple": 1, "max_broken": "1/1000"},
    "prompts": {"valid": "1/20", "placeholders": {}, "allow_unresolved": [], "max_broken": "0", "agents": {}},
    "preferences": {"valid": "1/20", "fields": {}, "max_broken": "1/1000"},
    "import": {"version": 1, "hf_config": {}},
    "average": {"version": 1},
    "select": {"version": 1},
    "pretrain": {"version": 1, "overrides": {}, "arguments": {}, "hf_config": {}, "skip": 0},
    "sft": {"version": 1, "overrides": {}, "arguments": {}, "skip": 0},
    "rl": {"version": 1, "overrides": {}, "environments": {}},
    "hf_export": {"dtype": "bfloat16"},
    "eval": {"fewshot": None, "limit": None, "chat": False},
}
"""Entries are added here, never changed: a new meaning is a new key."""

ALGORITHMS = dict.fromkeys(DEFAULTS, 1) | {"tokenizer": 2, "chats": 2}
"""Raised together with the code that changes what a kind makes from the same payload."""


def test_defaults_never_change():
    assert {name: kind.defaults for name, kind in kinds.KINDS.items()} == DEFAULTS
    assert {name: kind.algorithm for name, kind in kinds.KINDS.items()} == ALGORITHMS


def test_a_payload_leaves_out_defaults_and_what_is_not_set():
    payload = kinds.payload("shards", source="a", tokenizer="b", shards=[[[0]]], pool="1", first=3, text_field=None)
    assert payload == {"kind": "shards", "source": "a", "tokenizer": "b", "shards": [[[0]]], "first": 3}
    assert kinds.complete(payload) == payload | DEFAULTS["shards"] | {"first": 3}


def test_a_raised_algorithm_makes_another_payload(monkeypatch):
    before = kinds.payload("blend", parts=[])
    raised = kinds.Kind(kinds.KINDS["blend"].label, {}, algorithm=2)
    monkeypatch.setitem(kinds.KINDS, "blend", raised)
    assert kinds.payload("blend", parts=[]) == before | {"algorithm_version": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Stdlib_Topics", "stdlib-topics"),
        ("../../etc", "etc"),
        ("a b/c", "a-b-c"),
        ("ünï", "n"),
        ("", "x"),
        ("...", "x"),
        ("x" * 100, "x" * 48),
        ("a" * 47 + "/b", "a" * 47),
    ],
)
def test_slugs_are_safe_in_paths(text, expected):
    assert kinds.slug(text) == expected


def test_inputs_are_in_order_with_their_states():
    trained = {"kind": "sft", "data": "d", "tokenizer": "t", "init": {"from": "p", "at": 7, "carry": "weights"}}
    assert kinds.inputs(trained) == [kinds.Ref("init", "p", 7), kinds.Ref("data", "d"), kinds.Ref("tokenizer", "t")]
    from_export = trained | {"kind": "rl", "init": {"export": "e", "carry": "weights"}}
    assert kinds.inputs(from_export)[0] == kinds.Ref("model", "e")
    assert kinds.inputs(from_export | {"teacher": "f"})[:2] == [kinds.Ref("model", "e"), kinds.Ref("teacher", "f")]
    parts = [{"merge": "b", "share": "1/2"}, {"merge": "a", "share": "1/2"}]
    assert kinds.inputs({"kind": "blend", "parts": parts}) == [kinds.Ref("parts", "b"), kinds.Ref("parts", "a")]
    placeholders = {"z": {"source": "c"}, "b": {"source": "d"}}
    assert kinds.inputs({"kind": "prompts", "parts": [{"source": "s"}], "placeholders": placeholders}) == [
        kinds.Ref("sources", "s"), kinds.Ref("placeholder_sources", "d"), kinds.Ref("placeholder_sources", "c")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no such kind"):
        kinds.inputs({"kind": "other"})
