"""A chat as a row holds it: checked, put in one form, and cut into training sequences.

Chats are in OpenAI's form: a list of messages with "role", "content", and where they have them "tool_calls" and
"reasoning_content"; beside it "tools", the functions declared. Tools, and the arguments of calls, may be JSON text.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from nemoflow.data.template import Template, Unusable


class Conversation(NamedTuple):
    """messages: as templates take them, none of their fields None. tools: None when none are declared. content: both
    as bytes, the same for equal chats whatever they were read from."""

    messages: list[dict]
    tools: list[dict] | None
    content: bytes


class Sequence(NamedTuple):
    """messages: of one training sequence. answers: of how many of its last answers the loss is taken; 0 for all."""

    messages: list[dict]
    answers: int


def wanted(row: dict, used_in: str) -> bool:
    """Whether the row's `used_in`, a list or names divided by commas, has this name."""
    names = row.get("used_in")
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    return isinstance(names, list) and used_in in names


def conversation(row: dict, field: str, template: Template) -> Conversation:
    """The chat in a row, its messages in `field`.

    Raises Unusable when it is none, lacks an answer, calls tools that there are not, or has what the template cannot
    write or keep apart.
    """
    given = row.get(field)
    if isinstance(given, str):  # some files keep lists as text
        given = _json(given, "the messages are no JSON")
    if not isinstance(given, list) or not given:
        raise Unusable("no messages", f"{field!r} is not a non-empty list")
    tools = _tools(row.get("tools"), template)
    messages = [_message(message, template) for message in given]
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no answer", "no message is the assistant's")
    _check_calls(messages, tools)
    try:
        content = msgspec.json.encode([messages, tools], order="deterministic")
    except UnicodeEncodeError:
        raise Unusable("not Unicode", "a lone surrogate, which UTF-8 cannot spell") from None
    for spelled in template.reserved_json:
        if spelled in content:
            raise Unusable("spells a control token", spelled.decode())
    return Conversation(messages, tools, content)


def sequences(messages: list[dict]) -> Iterator[Sequence]:
    """The training sequences of a chat: the whole of it; or, where the assistant's thoughts are written down, one for
    each of the user's turns that is answered, up to the next. Templates leave out what was thought before the last
    question, so that each turn is learned as it will be read."""
    if not any(message.get("reasoning_content") for message in messages):
        yield Sequence(messages, 0)
        return
    answers = 0
    asked = False
    for at, message in enumerate(messages):
        if message["role"] == "user":
            if answers and asked:
                yield Sequence(messages[:at], answers)
            answers, asked = 0, True
        elif message["role"] == "assistant":
            answers += 1
    if answers:
        yield Sequence(messages, answers)


def _json(text: str, reason: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise Unusable(reason, text[:80]) from None


def _message(given: Any, template: Template) -> dict:
    """One message without fields that are None, its content a string."""
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(role, str):
        raise Unusable("a message without a role")
    message = {key: value for key, value in given.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise Unusable("content that is not text", f"of type {type(content).__name__}")
    message["content"] = content
    thought = message.get("reasoning_content", "")
    if not isinstance(thought, str):
        raise Unusable("content that is not text", "reasoning_content")
    if thought.strip():
        if not template.reasoning:
            raise Unusable("reasoning the chat template does not write")
    else:
        message.pop("reasoning_content", None)
        thought = ""
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, template)
    else:
        message.pop("tool_calls", None)
    if not content.strip() and role in ("user", "assistant") and not (thought or calls):
        raise Unusable("an empty message", f"of the {role}")
    return message


def _joined(parts: list) -> str:
    """OpenAI's content in parts, when all are text."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("content that is not text", "a part of another type")
    return "".join(texts)


def _calls(given: Any, template: Template) -> list[dict]:
    if template.arguments is None:
        raise Unusable("tool calls the chat template does not write")
    if isinstance(given, str):
        given = _json(given, "invalid tool call")
    if not isinstance(given, list):
        raise Unusable("invalid tool call", "'tool_calls' is not a list")
    return [_call(call, template.arguments) for call in given]


def _call(given: Any, form: str) -> dict:
    """A tool call with its arguments as the template takes them."""
    if not isinstance(given, dict):
        raise Unusable("invalid tool call", "not an object")
    call = {key: value for key, value in given.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("invalid tool call", "no function is named")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    found = _json(arguments, "invalid tool call") if isinstance(arguments, str) else arguments
    if not isinstance(found, dict):
        raise Unusable("invalid tool call", "arguments that are no JSON object")
    if form == "text":
        found = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    function = {**function, "arguments": found}
    return {**call, "function": function} if "function" in call else function


def _tools(given: Any, template: Template) -> list[dict] | None:
    if isinstance(given, str):
        given = _json(given, "invalid tools") if given.strip() else None
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(_name(tool), str) for tool in given):
        raise Unusable("invalid tools", "'tools' is not a list of functions with names")
    if not template.tools:
        raise Unusable("tools the chat template does not write")
    return given


def _name(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _check_calls(messages: list[dict], tools: list[dict] | None) -> None:
    """Refuse calls of tools that are not declared. Some chats declare them in the system's text: of these only that a
    declaration is there."""
    declared = {_name(tool) for tool in tools or ()}
    told = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    in_text = any("<tools>" in text or "# Tools" in text for text in told)
    for message in messages:
        if message["role"] != "assistant":
            continue
        for call in message.get("tool_calls", ()):
            if _name(call) not in declared and not (in_text and not tools):
                raise Unusable("a call of an undeclared tool", str(_name(call))[:80])
        if not tools and not in_text and "<tool_call>" in message["content"]:
            raise Unusable("a call of an undeclared tool", "<tool_call> in the text, and no tools")
