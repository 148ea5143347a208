"""Chat templates: a chat as text, and where in it the assistant speaks.

Rendered as transformers' apply_chat_template does, once for each chat. Where the assistant speaks is known in one of
two ways:

  * the template says so, with {% generation %} ... {% endgeneration %} around it; or
  * it is found by trying the template on chats of made-up words: what it writes before every answer, the *header*
    ("<|im_start|>assistant\\n"), and the control token that ends a turn. Chats cannot spell either, for those that do
    are refused, so each header in a rendered chat begins an answer, and the next end of a turn ends it. What the
    template writes for a model to go on from (the generation prompt, say the header and "<think>\\n") is no part of the
    answer, the token that ends it is. What is found is tried on further chats before it is used.

Templates of which neither is true are an error.

There is no `strftime_now` here: a chat that says today's date would be another chat every day.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import jinja2
import msgspec
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nemoflow.data.tokenizer import Trained
from nemoflow.errors import NemoflowError

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Marks of generation blocks in a rendered chat: code points Unicode reserves for a program's own use."""

_REFUSED = "refused by the chat template"

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template raises that does not take a chat."""

_OF_DICT = frozenset(dir(dict))
"""Names after a dot that mean the dictionary's own, not what is in it."""

_THINKING: tuple[dict, ...] = (
    {},
    *({"enable_thinking": on, "chat_template_kwargs": {"enable_thinking": on}} for on in (True, False)),
)
"""Variables by which published templates let the caller choose whether the model is to think."""


class Unusable(ValueError):
    """A chat that cannot be learned from. `reason` is one of a few, to count by; the text may say more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates. Messages and loops are looked into without a detour: as the sandbox
    does, but in a tenth of the time; most of rendering would be that."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self._missing: dict[str, jinja2.Undefined] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            if attribute in obj:
                return obj[attribute]
            if attribute not in self._missing:
                self._missing[attribute] = self.undefined(obj={}, name=attribute)
            return self._missing[attribute]
        if kind in (LoopContext, Namespace) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return super().getattr(obj, attribute)


class _Generation(Extension):
    """The block {% generation %} ... {% endgeneration %} of chat templates, rendered with a mark at either end."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END))
        return [begin, *body, end]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter: what templates written for transformers expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _user(word: str) -> dict:
    return {"role": "user", "content": word}


def _answer(word: str, **more: Any) -> dict:
    return {"role": "assistant", "content": word, **more}


def _call(arguments: Any) -> dict:
    function = {"name": "kovafu", "arguments": arguments}
    return {"tool_calls": [{"id": "call00001", "type": "function", "function": function}]}


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "kovafu",
            "description": "Miwuda.",
            "parameters": {
                "type": "object",
                "properties": {"hakah": {"type": "string", "description": "Lupige."}},
                "required": ["hakah"],
            },
        },
    }
]
_ARGUMENTS = {"hakah": "tibito"}


class Template:
    """A chat template, with what was found out about it.

    reserved: texts of control tokens that the template writes around turns: a chat that spells one of them would be
    taken apart in other places than it was put together. reserved_json: the same in UTF-8, as JSON spells them.
    tools, reasoning: whether it writes the tools that are declared, and what the assistant thinks. arguments: how it
    takes those of a tool call, "object" or "text"; None when it writes no tool calls.

    `source` is its text, `origin` what to call it in errors. Raises NemoflowError when it is no valid Jinja, refuses a
    plain chat, or does not show where the assistant speaks.
    """

    def __init__(self, source: str, tokenizer: Trained, origin: str):
        self._origin = origin
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateError as error:
            raise NemoflowError(f"{origin}: the chat template is not valid Jinja ({error})") from None
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._tokens = {role: tokenizer.special(role) for role in roles if tokenizer.special(role)}
        self._names = {**self._template.globals, **self._tokens}
        self._control = sorted(
            (token.content for token in tokenizer.engine.get_added_tokens_decoder().values()), key=len, reverse=True
        )
        self._marked = _MARKS.search(source) is not None
        self._find_out()

    def render(self, messages: list[dict], tools: list | None, answers: int = 0) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and where in it the assistant speaks: (first character, one past the last), in order.

        answers: of how many of the last answers that is wanted; 0 for all.

        Raises Unusable when the template does not take the chat, or writes more or fewer answers than it has.
        """
        text = self._rendered(messages, tools)
        text, spans = _unmarked(text) if self._marked else (text, list(self._answers(text)))
        if (answers or not self._marked) and len(spans) != sum(m["role"] == "assistant" for m in messages):
            raise Unusable(_REFUSED, "it does not write one answer for each of the assistant's messages")
        return text, spans[-answers:]

    def _rendered(self, messages: list[dict], tools: list | None = None, prompt: bool = False, **more: Any) -> str:
        try:
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt, **more}
            context = self._template.new_context(self._names | given, shared=True)
            return "".join(self._template.root_render_func(context))
        except _REFUSALS as error:
            raise Unusable(_REFUSED, str(error)) from None

    def _plain(self, *arguments: Any, **more: Any) -> str:
        return _unmarked(self._rendered(*arguments, **more))[0]

    def _answers(self, text: str) -> Iterator[tuple[int, int]]:
        """Where headers stand, and the ends of these turns."""
        header, end = self._header, self._end
        at = text.find(header)
        while at >= 0:
            begin = at + next((len(p) for p in self._prompts if text.startswith(p, at)), len(header))
            past = text.find(end, begin)
            if past < 0:
                raise Unusable(_REFUSED, f"it writes an answer without {end} after it")
            past += len(end)
            yield begin, past
            at = text.find(header, past)

    # -- what is found out by trying -----------------------------------------------------------------------------------

    def _find_out(self) -> None:
        user, answer, more = "wibolo", "Zuvatu", "nefiro"
        try:
            asked = self._plain([_user(user)])
            chat = self._plain([_user(user), _answer(answer), _user(more)])
        except Unusable as error:
            raise NemoflowError(f"{self._origin}: {error}, though it has but a question and an answer") from None
        if [chat.count(word) for word in (user, answer, more)] != [1, 1, 1]:
            raise NemoflowError(f"{self._origin}: the chat template does not write each message once")
        self._find_features(user, answer)
        gap, rest = chat.partition(user)[2].split(answer)
        after = rest.partition(more)[0]
        prompts = {
            self._tried([_user(user)], prompt=True, **variables).removeprefix(asked) for variables in _THINKING
        } - {""}
        answers = [_answer(answer), _answer(f"{answer} <think>{answer}</think>")]
        if self.reasoning:
            answers.append(_answer(answer, reasoning_content=more))
        written = [(asked, self._tried([_user(user), a])) for a in answers]
        if self.arguments:
            call = _answer("", **_call(self._given(_ARGUMENTS)))
            written.append((self._tried([_user(user)], _TOOLS), self._tried([_user(user), call], _TOOLS)))
        tails = [whole[len(before) :] for before, whole in written if whole.startswith(before)]
        self._header = _common_beginning([*prompts, *filter(None, tails)])
        own = gap.partition(self._header)[0] + self._header if self._header else gap
        found = {self._tokens.get("bos_token"), self._tokens.get("eos_token"), *self._in(own), *self._in(after)}
        self.reserved = sorted(found - {None})
        self.reserved += [_BEGIN, _END] if self._marked else []
        # As they are spelled inside JSON, which is where they are looked for.
        self.reserved_json = [msgspec.json.encode(text)[1:-1] for text in self.reserved]
        if self._marked:
            return
        first = self._in(after)[:1]
        self._prompts = sorted(prompts, key=len, reverse=True)
        self._end = first[0] if first else ""
        if not self._end or not self._in(self._header) or not self._found_is_right():
            raise NemoflowError(
                f"{self._origin}: the chat template does not show where the assistant speaks; put {{% generation %}} "
                "and {% endgeneration %} around it"
            )

    def _tried(self, *arguments: Any, **more: Any) -> str:
        """The text, or none when the template refuses."""
        try:
            return self._plain(*arguments, **more)
        except Unusable:
            return ""

    def _in(self, text: str) -> list[str]:
        """The control tokens in a text, in order; of those that begin alike, the longest."""
        found, at = [], 0
        while at < len(text):
            token = next((t for t in self._control if t and text.startswith(t, at)), "")
            found += [token] if token else []
            at += len(token) or 1
        return found

    def _given(self, arguments: dict) -> Any:
        return arguments if self.arguments == "object" else json.dumps(arguments)

    def _find_features(self, user: str, answer: str) -> None:
        self.reasoning = "retugo" in self._tried([_user(user), _answer(answer, reasoning_content="retugo")])
        self.tools = "kovafu" in self._tried([_user(user)], _TOOLS)
        as_object, as_text = (
            self._tried([_user(user), _answer("", **_call(given))], _TOOLS)
            for given in (_ARGUMENTS, json.dumps(_ARGUMENTS))
        )
        self.arguments = None
        if "tibito" in as_object and str(_ARGUMENTS) not in as_object:
            self.arguments = "object"
        elif json.dumps(_ARGUMENTS) in as_text:
            self.arguments = "text"

    def _found_is_right(self) -> bool:
        """Whether each word of longer chats is taken for the speech of who said it."""
        told = [
            {"role": "system", "content": "sys0"},
            *(_user("use1"), _answer("ass2")),
            *(_user("use3"), _answer("ass4", **({"reasoning_content": "thi5"} if self.reasoning else {}))),
            *(_user("use6"), _answer("ass7\n\nass8 <x>")),
        ]
        calls = _answer("ass9", **_call(self._given({"hakah": "ass10"}))) if self.arguments else None
        tooled = [*told, _user("use11"), calls, {"role": "tool", "tool_call_id": "call00001", "content": "too12"}]
        tooled.append(_answer("ass13"))
        chats = [(told, None), (told[1:], None), (told[1:3], None)]
        chats += [(tooled, _TOOLS), (tooled[1:], _TOOLS)] if calls else []
        tried = 0
        for messages, tools in chats:
            try:
                text, spans = self.render(messages, tools)
            except Unusable:
                continue
            tried += 1
            for word in re.finditer(r"(use|sys|too|ass|thi)\d+", text):
                spoken = any(begin <= word.start() and word.end() <= past for begin, past in spans)
                if spoken != (word[1] in ("ass", "thi")):
                    return False
        return tried > 0


def _common_beginning(texts: list[str]) -> str:
    first, last = min(texts, default=""), max(texts, default="")
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without marks, and what was between them."""
    outside, *spoken = marked.split(_BEGIN)
    text, spans = outside, []
    for part in spoken:
        inside, _, outside = part.partition(_END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans
