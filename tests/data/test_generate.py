import json
import pdb
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemoflow.data import generate
from nemoflow.data.verifiers import check_row
from nemoflow.environments.verifiers import mcqa, structured_outputs
from nemoflow.errors import NemoflowError


def rows(source: Path) -> list[dict]:
    return [json.loads(line) for shard in sorted(source.glob("files/*.jsonl")) for line in shard.open()]


def make(out, **payload):
    return generate.make(
        {"generator": "arithmetic_chats", "args": {}, "seed": 0, "shards": 2, "python": sys.version.split()[0]}
        | payload,
        out,
        print,
    )


def test_released_arguments_and_defaults():
    assert {name: generate.arguments(name) for name in generate.GENERATORS} == {
        "stdlib_topics": {},
        "stdlib_docstrings": {},
        "stdlib_chats": {"max_chars": 300},
        "arithmetic_chats": {"count": 2000, "max_operand": 9},
        "arithmetic_rl": {"count": 100, "max_operand": 9},
        "arithmetic_preferences": {"count": 100, "max_operand": 9},
        "comparison_chats": {"count": 2000, "max_operand": 9},
        "comparison_rl": {"count": 100, "max_operand": 9},
        "object_chats": {"count": 2000, "max_value": 9},
        "object_rl": {"count": 30, "max_value": 9},
    }


@pytest.mark.parametrize(
    ("name", "documents", "size"), [("stdlib_topics", 200, 450_000), ("stdlib_docstrings", 4000, 10**6)]
)
def test_texts_are_enough_distinct_and_without_addresses(made, name, documents, size):
    texts = [row["text"] for row in rows(made[name])]
    assert len(texts) >= documents
    assert sum(map(len, texts)) >= size
    assert len(set(texts)) == len(texts)
    assert not any(re.search(r"0x[0-9a-f]{8,}", text) for text in texts if " at 0x" in text)
    assert all(text.strip() for text in texts)


def test_rows_are_dealt_out_evenly(made):
    for name in generate.GENERATORS:
        sizes = [len(shard.read_bytes().splitlines()) for shard in sorted(made[name].glob("files/*.jsonl"))]
        assert len(sizes) == 2
        assert 0 <= sizes[0] - sizes[1] <= 1


def test_a_docstring_is_headed_by_its_name(made):
    assert any(row["text"].startswith("json.loads\n\nDeserialize ``s``") for row in rows(made["stdlib_docstrings"]))


def test_chats_answer_what_was_asked(made):
    answers = {}
    for row in rows(made["stdlib_chats"]):
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert 20 <= len(answer["content"]) <= 300
        answers[question["content"]] = answer["content"]
    found = [answer for question, answer in answers.items() if " heapq.heappush " in f"{question.rstrip('.')} "]
    assert found == ["Push item onto heap, maintaining the heap invariant."]
    assert len({question.replace("?", " ").split()[0] for question in answers}) >= 4


def test_sums_are_right_and_every_pair_is_asked_once_a_pass(made):
    asked = []
    for row in rows(made["arithmetic_chats"]):
        question, answer = (message["content"] for message in row["messages"])
        a, b = map(int, re.fullmatch(r"What is (\d) \+ (\d)\?", question).groups())
        assert int(answer) == a + b
        asked.append(question)
    assert len(asked) == 300
    assert all(asked.count(question) == 3 for question in set(asked))


def test_rl_rows_ask_what_the_chats_teach(made):
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows(made["arithmetic_chats"])}
    found = rows(made["arithmetic_rl"])
    assert len({row["question"] for row in found}) == 100
    for row in found:
        assert row["responses_create_params"]["input"] == [{"role": "user", "content": row["question"]}]
        assert row["expected_answer"] == answers[row["question"]]
        assert row["agent_ref"]["name"] == "math_with_judge_simple_agent"


def test_the_seed_changes_the_order_only(out, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert make(out, generator="stdlib_topics") == make(other, generator="stdlib_topics", seed=1)
    assert rows(out) != rows(other)
    assert sorted(row["text"] for row in rows(out)) == sorted(row["text"] for row in rows(other))


def test_arguments_reach_the_generator(out):
    assert make(out, args={"count": 7, "max_operand": 99})["documents"] == 7
    assert any(re.search(r"\d\d", row["messages"][0]["content"]) for row in rows(out))


def test_measures_are_rows_and_bytes(made):
    measures = json.loads((made["stdlib_topics"] / "sealed.json").read_text())["measures"]
    shards = list(made["stdlib_topics"].glob("files/*.jsonl"))
    assert measures == {
        "documents": len(rows(made["stdlib_topics"])),
        "bytes": sum(shard.stat().st_size for shard in shards),
    }


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"python": "3.11.4"}, f"this is Python {re.escape(sys.version.split()[0])}, .* of Python 3.11.4"),
        ({"generator": "poems"}, "generator: 'poems' is unknown; known: arithmetic_chats, "),
        ({"args": {"cuont": 3}}, "args.cuont is unknown; it takes count, max_operand"),
        ({"generator": "stdlib_topics", "args": {"x": 1}}, "args.x is unknown; it takes no arguments"),
        ({"args": {"count": "3"}}, "args.count: '3' is not a positive integer"),
        ({"args": {"count": 0}}, "args.count: 0 is not a positive integer"),
    ],
)
def test_bad_payloads_are_refused_before_anything_is_written(out, payload, message):
    with pytest.raises(NemoflowError, match=message):
        make(out, **payload)
    assert not list(out.iterdir())


def test_the_documentation_is_the_interpreters_whatever_was_done_to_this_process(out):
    """Libraries patch the standard library as they are imported: pytest replaces pdb.set_trace."""
    assert pdb.set_trace.__module__ != "pdb"
    make(out, generator="stdlib_docstrings")
    assert any(row["text"].startswith("pdb.set_trace\n") for row in rows(out))


def test_optimised_away_docstrings_are_found_all_the_same(made):
    code = "from nemoflow.data.generate import stdlib_docstrings as f; print(sum(len(row['text']) for row in f(0)))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(len(row["text"]) for row in rows(made["stdlib_docstrings"]))


@pytest.mark.parametrize(
    ("kind", "verify", "count"), [("comparison", mcqa.verify, 90), ("object", structured_outputs.verify, 30)]
)
def test_what_chats_teach_is_what_the_verifiers_of_the_rl_rows_want(made, kind, verify, count):
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows(made[f"{kind}_chats"])}
    found = rows(made[f"{kind}_rl"])
    assert len(answers) == count
    assert {row["responses_create_params"]["input"][0]["content"] for row in found} == set(answers)
    for row in found:
        check_row(row)
        right = answers[row["responses_create_params"]["input"][0]["content"]]
        assert verify(right, row) == 1
        assert {verify(answer, row) for answer in answers.values() if answer != right} == {0}


def test_preferred_sums_are_right_and_rejected_ones_are_not(made):
    found = rows(made["arithmetic_preferences"])
    for row in found:
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["chosen"] == str(a + b) != row["rejected"]
        assert 0 <= int(row["rejected"]) <= 18
    assert len({row["rejected"] for row in found}) > 10
