import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemoflow.data.template import Template, Unusable
from nemoflow.data.tokenizer import TEMPLATES, load
from nemoflow.errors import NemoflowError

CHATML = (TEMPLATES / "chatml.jinja").read_text()
UNMARKED = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")

# Answers without thoughts get empty ones, as do old ones; the generation prompt has the model think or not.
THINKING = """
{%- set kw = chat_template_kwargs if chat_template_kwargs is defined else {} -%}
{%- set thinking = kw.enable_thinking if kw.enable_thinking is defined else true -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}
{%- set now = namespace(at=-1) -%}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- set thought = m.reasoning_content is string and now.at == ns.last -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if thought -%}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n' -}}
        {%- elif '<think>' not in m.content -%}{{- '<think></think>' -}}
        {%- endif -%}
        {{- m.content | trim -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '<tool_call>' + call.function.name -}}
            {%- for key, value in call.function.arguments | items -%}{{- ' ' ~ key ~ '=' ~ value -}}{%- endfor -%}
            {{- '</tool_call>\\n' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif m.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' -}}
    {%- else -%}
        {%- if m.role == 'user' -%}{%- set now.at = now.at + 1 -%}{%- endif -%}
        {{- '<|im_start|>' + m.role + '\\n' + m.content -}}
        {%- if m.role == 'system' and tools -%}{{- tools | tojson -}}{%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if thinking else '<think></think>') -}}
{%- endif -%}
"""

HEADERS = """
{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '<|im_start|>\\n\\n' + m.content | trim + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_start|>\\n\\n' -}}{%- endif -%}
"""

STRINGS = """
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content -}}
    {%- for call in m.tool_calls or [] -%}{{- call.function.name + call.function.arguments -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if tools -%}{{- tools | tojson -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [
    {"role": "system", "content": "Be brief."},
    user("Hi"),
    answer("Hello."),
    user("naïve 😀?"),
    answer("naiv 😀\n"),
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<ü & 'x'>", "parameters": {"type": "object"}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": "<1>", "y": [2, None]}}}
TOOLED = [
    user("Old"),
    answer("Answer.", reasoning_content="Old thought."),
    user("Now"),
    answer("", reasoning_content="Hm.", tool_calls=[CALL]),
    {"role": "tool", "tool_call_id": "call00001", "content": "three"},
    answer("It is three.", reasoning_content="So."),
]


@pytest.fixture(scope="module")
def tokenizer(made):
    return load(made["tokenizer"])


@pytest.fixture
def template(tokenizer):
    return lambda source: Template(source, tokenizer, "here")


def spoken(template, messages, tools=None, answers=0):
    text, spans = template.render(messages, tools, answers)
    return [text[begin:past] for begin, past in spans]


# -- where the assistant speaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CHATML, UNMARKED], ids=["marked", "found"])
def test_the_answers_and_their_ends(template, source):
    template = template(source)
    assert spoken(template, CHAT) == ["Hello.<|im_end|>", "naiv 😀\n<|im_end|>"]
    assert spoken(template, CHAT, answers=1) == ["naiv 😀\n<|im_end|>"]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": "<1>", "y": [2, null]}}\n</tool_call>'
    assert spoken(template, TOOLED, TOOLS) == [
        "Answer.<|im_end|>",
        f"<think>\nHm.\n</think>\n{call}<|im_end|>",
        "<think>\nSo.\n</think>\nIt is three.<|im_end|>",
    ]


def test_marked_and_found_are_the_same(template):
    marked, found = template(CHATML), template(UNMARKED)
    for messages, tools in ((CHAT, None), (CHAT, TOOLS), (TOOLED, TOOLS), (TOOLED[:2], None)):
        assert marked.render(messages, tools) == found.render(messages, tools)
    assert set(marked.reserved) - set(found.reserved) == {"\ufdd0", "\ufdd1"}


def test_what_the_generation_prompt_writes_is_not_learned(template):
    template = template(THINKING)
    assert spoken(template, CHAT) == ["Hello.<|im_end|>", "naiv 😀<|im_end|>"]
    assert spoken(template, TOOLED, TOOLS) == [
        "Answer.<|im_end|>",
        "Hm.\n</think>\n<tool_call>f x=<1> y=[2, None]</tool_call>\n<|im_end|>",
        "So.\n</think>\nIt is three.<|im_end|>",
    ]
    # Thoughts in the text of the answer are what the model wrote; no prompt ends in the midst of them.
    assert spoken(template, [user("a"), answer("<think>b</think>c")]) == ["<think>b</think>c<|im_end|>"]


def test_headers_of_several_control_tokens(template):
    template = template(HEADERS)
    assert spoken(template, CHAT) == ["Hello.<|im_end|>", "naiv 😀<|im_end|>"]


def test_control_tokens_around_turns_are_reserved_and_no_others(template):
    around = ["</s>", "<s>", "<|im_end|>", "<|im_start|>"]
    for source in (UNMARKED, THINKING, HEADERS):
        assert template(source).reserved == around
    assert template(CHATML).reserved == [*around, "\ufdd0", "\ufdd1"]


def test_features(template):
    def features(source):
        found = template(source)
        return found.reasoning, found.tools, found.arguments

    assert features(CHATML) == features(UNMARKED) == (True, True, "object")
    assert features(THINKING) == (True, False, "object")  # tools are declared in the system's message only
    assert features(HEADERS) == (False, False, None)
    assert features(STRINGS) == (False, True, "text")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant", "tool", "system"]),
            st.text(max_size=12) | st.sampled_from(["assistant\n", "<think>\n", "</think>", "im_start", "<tool_call>"]),
            st.none() | st.text(min_size=1, max_size=5),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_found_is_what_marks_say_whatever_is_said(tokenizer, turns):
    marked, found = (_cached(source, tokenizer) for source in (CHATML, UNMARKED))
    messages = [
        {"role": role, "content": text} | ({"reasoning_content": thought} if thought and role == "assistant" else {})
        for role, text, thought in turns
    ]
    assert marked.render(messages, None) == found.render(messages, None)


_TEMPLATES = {}


def _cached(source, tokenizer):
    if source not in _TEMPLATES:
        _TEMPLATES[source] = Template(source, tokenizer, "here")
    return _TEMPLATES[source]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "is not valid Jinja"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not show where the assistant speaks"),
        # No end of a turn; none of the last turn; no header; a header that text can spell.
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}", "does not show where"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
            "does not show where",
        ),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "does not show where"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}", "does not show where"),
        # The user's turns begin like the assistant's.
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", "does not show where"),
        ("{{ raise_exception('never') }}", "refused by the chat template .never., though it has but a question"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write each message once"),
        ("{{ messages[0].content }}", "does not write each message once"),
    ],
)
def test_templates_that_cannot_be_used(template, source, message):
    with pytest.raises(NemoflowError, match=f"^here: .*{message}"):
        template(source)


def test_an_answer_that_is_not_written_is_refused(template):
    source = UNMARKED.replace(
        "{%- for message in messages -%}", "{%- for message in messages if message.content != 'x' -%}"
    )
    assert source != UNMARKED
    found = template(source)
    with pytest.raises(Unusable, match="one answer for each"):
        found.render([user("a"), answer("x"), user("b"), answer("c")], None)


def test_refusals_have_one_reason(template):
    found = template(UNMARKED.replace("{%- if add_gen", "{{- 1 // (messages | length - 7) -}}{%- if add_gen"))
    with pytest.raises(Unusable, match="by zero") as error:
        found.render([user("a"), answer("b")] * 3 + [user("c")], None)
    assert error.value.reason == "refused by the chat template"


# -- as transformers renders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CHATML, THINKING, HEADERS], ids=["chatml", "thinking", "headers"])
def test_text_is_that_of_transformers(made, template, tmp_path, source):
    shutil.copytree(made["tokenizer"], tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(source)
    auto = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for messages, tools in ((CHAT, None), (CHAT, TOOLS), (TOOLED, TOOLS)):
        expected = auto.apply_chat_template(messages, tools=tools, tokenize=False)
        assert template(source).render(messages, tools)[0] == expected


@pytest.mark.parametrize(
    "expression",
    [
        "m.items",
        "m.items()",
        "m.get('a')",
        "m.keys() | list",
        "m.a",
        "m.b",
        "m.b is defined",
        "m['items']",
        "m.__class__",
    ],
)
def test_looking_into_messages_is_the_sandboxs(made, template, tmp_path, expression):
    """The short way to what is in a dictionary gives what the long one gives."""
    source = f"{{% set m = messages[0].m %}}{{{{ {expression} }}}}"
    wrapped = "{% if messages[0].m is defined %}" + source + "{% else %}" + UNMARKED + "{% endif %}"
    message = user("x") | {"m": {"a": 1, "items": 2, "keys": 3}}
    shutil.copytree(made["tokenizer"], tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(wrapped)
    auto = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    def result(render):
        try:
            text = render()
        except Exception as error:
            return type(error.__cause__ or error).__name__ if not isinstance(error, Unusable) else "refused"
        return text.partition(" at 0x")[0]

    theirs = result(lambda: auto.apply_chat_template([message], tokenize=False))
    ours = result(lambda: template(wrapped).render([message], None)[0])
    assert ours == (theirs if theirs not in ("SecurityError", "TypeError") else "refused")


def test_loops_and_namespaces_are_the_sandboxs(template):
    source = UNMARKED.replace(
        "{%- set now = ",
        "{%- for a in 'xyz' -%}{{- loop.index ~ loop.last ~ (loop.nextitem or '') -}}{%- endfor -%}{%- set now = ",
    )
    text, _ = template(source).render([user("a"), answer("b")], None)
    assert text.startswith("1Falsey2Falsez3True<|im_start|>user\n")
    refused = UNMARKED.replace("{%- set now = ", "{{- last.__init__ -}}{{- last.nothing -}}{%- set now = ")
    assert template(refused).render([user("a"), answer("b")], None)[0].startswith("<|im_start|>user\n")


def test_no_template_is_told_the_date(template):
    source = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + UNMARKED
    assert template(source).render([user("a"), answer("b")], None)[0].startswith("<|im_start|>user")


def test_json_is_not_escaped_for_html(template):
    text, _ = template(CHATML).render([user("a"), answer("b")], TOOLS)
    assert json.dumps(TOOLS[0]["function"], ensure_ascii=False) in text
