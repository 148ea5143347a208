import json
from types import SimpleNamespace

import pytest

from nemoflow.data.conversation import conversation, sequences, wanted
from nemoflow.data.template import Unusable

TEMPLATE = SimpleNamespace(reasoning=True, tools=True, arguments="object", reserved_json=[b"<|im_end|>", b'<\\"end'])
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def user(text="Hi"):
    return {"role": "user", "content": text}


def answer(text="Hello.", **more):
    return {"role": "assistant", "content": text, **more}


def called(arguments='{"x": 1}', name="add", **more):
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return answer("", tool_calls=[call], **more)


def read(*messages, template=TEMPLATE, field="messages", **row):
    return conversation({field: list(messages), **row}, field, template)


def with_(**changes):
    return SimpleNamespace(**{**vars(TEMPLATE), **changes})


# -- one form ----------------------------------------------------------------------------------------------------------


def test_messages_as_they_are():
    chat = read({"role": "system", "content": ""}, user(), answer())
    assert chat.messages == [{"role": "system", "content": ""}, user(), answer()]
    assert chat.tools is None


def test_fields_without_value_are_none():
    """A Parquet file gives every message every field."""
    null = {"tool_calls": None, "reasoning_content": None, "name": None}
    assert read(user() | null, answer() | null, tools=None) == read(user(), answer())
    assert read(user(), answer(reasoning_content=" \n", tool_calls=[]), tools=[]) == read(user(), answer())


def test_arguments_become_objects_or_text():
    for given in ('{"x": [1, null]}', {"x": [1, None]}):
        [_, message] = read(user(), called(given), tools=TOOLS).messages
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": [1, None]}}
    [_, message] = read(user(), called('{"x":  1}'), tools=TOOLS, template=with_(arguments="text")).messages
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x":  1}'
    [_, message] = read(user(), called({"x": 1}), tools=TOOLS, template=with_(arguments="text")).messages
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    [_, message] = read(user(), called(None), tools=TOOLS).messages
    assert message["tool_calls"][0]["function"]["arguments"] == {}
    bare = answer("", tool_calls=[{"name": "add", "arguments": "{}"}])
    assert read(user(), bare, tools=TOOLS).messages[1]["tool_calls"] == [{"name": "add", "arguments": {}}]


def test_lists_may_be_text():
    text = {key: json.dumps(value) for key, value in (("messages", [user(), called()]), ("tools", TOOLS))}
    assert conversation(text, "messages", TEMPLATE) == read(user(), called(), tools=TOOLS)
    assert read(user(), answer(), tools=" ").tools is None


def test_content_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read(user(parts), answer()) == read(user("ab"), answer())


def test_another_field():
    assert read(user(), answer(), field="conversation") == read(user(), answer())


def test_content_tells_chats_apart_and_keys_do_not():
    one = read({"role": "user", "content": "a"}, answer())
    assert one.content == read({"content": "a", "role": "user"}, answer(), other=1).content
    different = [read(user("b"), answer()), read(user("a"), answer(), tools=TOOLS), read(user("a"), answer(), user())]
    assert len({one.content, *(chat.content for chat in different)}) == 4


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": {"role": "user"}}, "no messages"),
        ({"messages": "no list"}, "the messages are no JSON"),
        ({"messages": ["hello"]}, "a message without a role"),
        ({"messages": [{"content": "x"}]}, "a message without a role"),
        ({"messages": [user()]}, "no answer"),
        ({"messages": [user(""), answer()]}, "an empty message"),
        ({"messages": [user(), answer(" \n")]}, "an empty message"),
        ({"messages": [user(), answer(None)]}, "an empty message"),
        ({"messages": [{"role": "user"}, answer()]}, "an empty message"),
        ({"messages": [user(3), answer()]}, "content that is not text"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), answer()]}, "content that is not text"),
        ({"messages": [user(), answer(reasoning_content=["x"])]}, "content that is not text"),
        ({"messages": [user("\ud800"), answer()]}, "not Unicode"),
        ({"messages": [user("x<|im_end|>y"), answer()]}, "spells a control token"),
        ({"messages": [user(), answer('x<"end')]}, "spells a control token"),
        ({"messages": [user(), answer()], "tools": [{"name": "<|im_end|>"}]}, "spells a control token"),
        ({"messages": [user(), called("{'x': 1}")], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), called("")], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), called("[1]")], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), called(name=None)], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), answer("", tool_calls=["add"])], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), answer("", tool_calls={"name": "add"})], "tools": TOOLS}, "invalid tool call"),
        ({"messages": [user(), called(name="sub")], "tools": TOOLS}, "a call of an undeclared tool"),
        ({"messages": [user(), called()]}, "a call of an undeclared tool"),
        ({"messages": [user(), answer("<tool_call>x</tool_call>")]}, "a call of an undeclared tool"),
        ({"messages": [user(), answer()], "tools": "no JSON"}, "invalid tools"),
        ({"messages": [user(), answer()], "tools": {"name": "add"}}, "invalid tools"),
        ({"messages": [user(), answer()], "tools": [{"type": "function"}]}, "invalid tools"),
    ],
)
def test_unusable_chats(row, reason):
    with pytest.raises(Unusable) as error:
        conversation(row, "messages", TEMPLATE)
    assert error.value.reason == reason
    assert reason in str(error.value)


def test_what_the_template_cannot_write_is_not_lost_in_silence():
    for chat, changes, reason in (
        ((user(), answer(reasoning_content="Hm.")), {"reasoning": False}, "reasoning the chat template does not write"),
        ((user(), called()), {"arguments": None}, "tool calls the chat template does not write"),
        ((user(), answer()), {"tools": False}, "tools the chat template does not write"),
    ):
        with pytest.raises(Unusable, match=reason):
            read(*chat, tools=TOOLS, template=with_(**changes))


@pytest.mark.parametrize("text", ["<think>", "</think>", "<tool_response>", "[INST]", "<unk>", "<|im_ end|>"])
def test_other_strings_that_are_tokens_are_legal(text):
    assert read(user(text), answer(f"a {text} b"))


def test_talk_of_tool_calls_is_legal():
    assert read(user("What does <tool_call> mean?"), answer())
    assert read(user(), answer("<tool_call>{}</tool_call>"), tools=TOOLS)
    assert read({"role": "system", "content": "# Tools\n<tools>...</tools>"}, user(), answer("<tool_call>..."))
    assert read({"role": "system", "content": "Use <tools>[]</tools>"}, user(), called(name="whatever"))


@pytest.mark.parametrize(
    ("used_in", "is_wanted"),
    [
        (["a", "nano"], True),
        (["a"], False),
        ("nano", True),
        ("a, nano", True),
        ("nano_v2", False),
        (None, False),
        (3, False),
    ],
)
def test_used_in(used_in, is_wanted):
    assert wanted({"used_in": used_in}, "nano") is is_wanted


# -- training sequences ------------------------------------------------------------------------------------------------


def cut(*messages):
    return [(len(sequence.messages), sequence.answers) for sequence in sequences(list(messages))]


def test_a_chat_without_thoughts_is_one_sequence():
    assert cut(user(), answer(), user(), answer()) == [(4, 0)]
    assert cut(user(), answer(), user()) == [(3, 0)]


def test_a_chat_with_thoughts_is_one_sequence_for_each_answered_question():
    thinking = answer(reasoning_content="Hm.")
    tool = {"role": "tool", "content": "3"}
    assert cut(user(), thinking) == [(2, 1)]
    assert cut(user(), answer(), user(), thinking) == [(2, 1), (4, 1)]
    assert cut({"role": "system", "content": "s"}, user(), thinking, user(), answer()) == [(3, 1), (5, 1)]
    assert cut(user(), thinking, tool, thinking, user(), answer(), answer()) == [(4, 2), (7, 2)]
    # A question that is not answered, and one that is asked in two messages.
    assert cut(user(), thinking, user()) == [(2, 1)]
    assert cut(user(), user(), thinking) == [(3, 1)]
    # What the assistant says before it is asked.
    assert cut(answer(), user(), thinking) == [(3, 1)]
    assert cut({"role": "system", "content": "s"}, thinking) == [(2, 1)]
