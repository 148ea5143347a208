import json

import pytest

from nemoflow.data import prompts
from nemoflow.errors import NemoflowError


def row(question="What is 1 + 1?", **changes):
    made = {
        "responses_create_params": {"input": [{"role": "user", "content": question}], "temperature": 1},
        "agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"},
        "expected_answer": "2",
        "anything": {"else": [1, 2.50, None]},
    }
    return {key: value for key, value in (made | changes).items() if value is not ...}


def make(sources, out, **payload):
    return prompts.make({"valid": "1/10", "max_broken": "0"} | payload, {"sources": sources}, out, print)


def test_rows_pass_through_byte_for_byte(write_source, out):
    lines = [json.dumps(row(f"What is {i}?"), indent=None, separators=(", ", " :  ")).encode() for i in range(300)]
    measures = make([write_source(lines)], out)
    train = (out / "train.jsonl").read_bytes().splitlines()
    valid = (out / "validation.jsonl").read_bytes().splitlines()
    assert measures["rows"] == {"train": len(train), "validation": len(valid)}
    assert measures["agents"] == {"math_with_judge_simple_agent": 300}
    assert 10 <= len(valid) <= 60
    assert sorted(train + valid) == sorted(lines)
    assert train == [line for line in lines if line in set(train)]


def test_a_prompt_is_on_one_side_whatever_else_is_in_the_row(write_source, out):
    make([write_source([row(f"q{i}", expected_answer=str(a)) for i in range(100) for a in range(3)])], out)
    sides = [
        {json.loads(line)["responses_create_params"]["input"][0]["content"] for line in (out / name).open()}
        for name in ("train.jsonl", "validation.jsonl")
    ]
    assert len(sides[0]) + len(sides[1]) == 100
    assert not sides[0] & sides[1]


def test_generated_rows(made):
    measures = json.loads((made["prompts"] / "sealed.json").read_text())["measures"]
    assert sum(measures["rows"].values()) == 100
    assert measures["rows"]["validation"] > 0


def test_tool_items_need_no_role(write_source, out):
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    used = row(responses_create_params={"input": [{"role": "user", "content": "x"}, call]})
    assert make([write_source([used])], out, valid="0")["rows"]["train"] == 1


def test_other_agents_need_no_expected_answer(write_source, out):
    other = row(agent_ref={"name": "code_gen_simple_agent"}, expected_answer=...)
    assert make([write_source([other])], out, valid="0")["agents"] == {"code_gen_simple_agent": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses_create_params": ...}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": []}}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": "hello"}}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": ["hello"]}}, r"input\[0\] has no role or no content"),
        ({"responses_create_params": {"input": [{"content": "x"}]}}, r"input\[0\] has no role or no content"),
        ({"responses_create_params": {"input": [{"role": "user"}]}}, r"input\[0\] has no role or no content"),
        ({"agent_ref": ...}, "agent_ref.name is missing"),
        ({"agent_ref": {"name": ""}}, "agent_ref.name is missing"),
        ({"expected_answer": ...}, "expected_answer is missing, which agent math_with_judge_simple_agent compares"),
        ({"expected_answer": ""}, "expected_answer is missing"),
    ],
)
def test_an_unusable_row_is_named_by_file_and_line(write_source, out, changes, message):
    source = write_source([row(), row(**changes)])
    with pytest.raises(NemoflowError, match=rf"source/shard-00000\.jsonl:2: .*{message}"):
        make([source], out)


def test_broken_rows_within_the_allowance_are_left_out(write_source, out):
    measures = make([write_source([row(), b"{", row(agent_ref=...)])], out, max_broken="2/3", valid="0")
    assert measures["rows"]["train"] == 1
    assert measures["broken"] == {"agent_ref.name is missing": 1, "not JSON": 1}


def test_no_rows_at_all(write_source, out):
    with pytest.raises(NemoflowError, match="there are no usable prompts"):
        make([write_source([])], out)
