"""Kind `source`, written by a program: the standard library's documentation, chats about it, and sums.

The texts come from the interpreter that runs this, hence the payload names its exact version. Each generator is a
function of its arguments and the seed; its signature lists the arguments and their defaults, which never change once
released, since only what a recipe writes is in the identity.
"""

import hashlib
import importlib
import inspect
import json
import platform
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from nemoflow.errors import NemoflowError

_HEADING = re.compile(r'\n(?=\S[^\n]*\n([*=\-~^"])\1{2,}\n)')
_PHRASINGS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "Describe {name} in a few words.",
    "Tell me about {name} in Python.",
)
_SUM = "What is {a} + {b}?"
_LARGER = "Which is larger?\nA: {a}\nB: {b}"
_OBJECT = "Write {key} = {value} as JSON."
_KEYS = ("x", "y", "z")


def _docstrings() -> list[tuple[str, str]]:
    """(qualified name, docstring) of the standard library's public objects; see stdlib.py for why in a new process."""
    program = Path(__file__).with_name("stdlib.py")
    done = subprocess.run([sys.executable, "-I", "-S", program], stdout=subprocess.PIPE, check=True)
    return [(name, text) for name, text in json.loads(done.stdout)]


def stdlib_topics(seed: int) -> Iterator[dict]:
    """The language reference as pydoc ships it (`help("if")`), one section a document."""
    topics = importlib.import_module("pydoc_data.topics").topics
    sections = []
    for _, text in sorted(topics.items()):
        cuts = [0, *(match.end() for match in _HEADING.finditer(text)), len(text)]
        sections += [text[start:end].strip() for start, end in pairwise(cuts)]
    documents = [{"text": text + "\n"} for text in dict.fromkeys(sections) if text]
    random.Random(seed).shuffle(documents)
    yield from documents


def stdlib_docstrings(seed: int) -> Iterator[dict]:
    """The docstrings of the standard library, one a document, headed by the object's name."""
    documents = [{"text": f"{name}\n\n{text}\n"} for name, text in _docstrings()]
    random.Random(seed).shuffle(documents)
    yield from documents


def stdlib_chats(seed: int, *, max_chars: int = 300) -> Iterator[dict]:
    """A question about each documented object, answered by the first paragraph of its docstring.

    An answer longer than `max_chars` characters is cut after the last sentence that fits; when none fits, the object
    is left out. The wording of a question is chosen by a hash of the seed and the name.
    """
    chats = []
    for name, text in _docstrings():
        paragraph = " ".join(text.partition("\n\n")[0].split())
        if len(paragraph) > max_chars:
            paragraph = paragraph[: paragraph.rfind(". ", 0, max_chars) + 1]
        if len(paragraph) < 20:
            continue
        choice = hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % len(_PHRASINGS)
        chats.append(_chat(_PHRASINGS[choice].format(name=name), paragraph))
    random.Random(seed).shuffle(chats)
    yield from chats


def arithmetic_chats(seed: int, *, count: int = 2000, max_operand: int = 9) -> Iterator[dict]:
    """`count` chats that ask for the sum of two numbers from 0 to `max_operand` and answer with it.

    Every pair is asked once, in random order, before any pair is asked again.
    """
    for a, b in _pairs(seed, count, max_operand):
        yield _chat(_SUM.format(a=a, b=b), str(a + b))


def arithmetic_rl(seed: int, *, count: int = 100, max_operand: int = 9) -> Iterator[dict]:
    """`count` rows in NeMo-Gym's layout, with the questions of `arithmetic_chats`: a prompt, the agent that answers
    it, and what the verifier of that agent compares the answer with."""
    for a, b in _pairs(seed, count, max_operand):
        question = _SUM.format(a=a, b=b)
        yield {
            "responses_create_params": {"input": [{"role": "user", "content": question}]},
            "agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"},
            "question": question,
            "expected_answer": str(a + b),
        }


def arithmetic_preferences(seed: int, *, count: int = 100, max_operand: int = 9) -> Iterator[dict]:
    """`count` pairs of answers to the questions of `arithmetic_chats`: the sum, and another sum of such numbers."""
    order = random.Random(f"{seed} rejected")
    for a, b in _pairs(seed, count, max_operand):
        wrong = order.choice([n for n in range(2 * max_operand + 1) if n != a + b])
        yield {"prompt": _SUM.format(a=a, b=b), "chosen": str(a + b), "rejected": str(wrong)}


def comparison_chats(seed: int, *, count: int = 2000, max_operand: int = 9) -> Iterator[dict]:
    """`count` chats that ask which of two different numbers from 0 to `max_operand` is larger, A or B, and answer."""
    for a, b in _pairs(seed, count, max_operand, different=True):
        yield _chat(_LARGER.format(a=a, b=b), "AB"[b > a])


def comparison_rl(seed: int, *, count: int = 100, max_operand: int = 9) -> Iterator[dict]:
    """`count` rows for NeMo-Gym's mcqa, with the questions of `comparison_chats`."""
    for a, b in _pairs(seed, count, max_operand, different=True):
        yield {
            "responses_create_params": {"input": [{"role": "user", "content": _LARGER.format(a=a, b=b)}]},
            "agent_ref": {"type": "responses_api_agents", "name": "mcqa_simple_agent"},
            "options": [{"A": str(a)}, {"B": str(b)}],
            "expected_answer": "AB"[b > a],
            "template_metadata": {"output_regex": r"^\s*([AB])\s*$"},
        }


def object_chats(seed: int, *, count: int = 2000, max_value: int = 9) -> Iterator[dict]:
    """`count` chats that ask for a JSON object with one key and a number from 0 to `max_value`, and answer with it."""
    for key, value in _objects(seed, count, max_value):
        yield _chat(_OBJECT.format(key=key, value=value), json.dumps({key: value}, separators=(",", ":")))


def object_rl(seed: int, *, count: int = 30, max_value: int = 9) -> Iterator[dict]:
    """`count` rows for NeMo-Gym's structured_outputs, with the questions of `object_chats`."""
    for key, value in _objects(seed, count, max_value):
        yield {
            "responses_create_params": {"input": [{"role": "user", "content": _OBJECT.format(key=key, value=value)}]},
            "agent_ref": {"type": "responses_api_agents", "name": "structured_outputs_simple_agent"},
            "schema_str": json.dumps({"type": "object", "properties": {key: {"const": value}}}),
            "schema_type": "json",
        }


def _chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pairs(seed: int, count: int, max_operand: int, different: bool = False) -> Iterator[tuple[int, int]]:
    """`count` pairs of operands, all (max_operand + 1)**2 of them in each pass, or only those of different ones."""
    numbers = range(max_operand + 1)
    yield from _passes(seed, count, [(a, b) for a in numbers for b in numbers if not (different and a == b)])


def _objects(seed: int, count: int, max_value: int) -> Iterator[tuple[str, int]]:
    yield from _passes(seed, count, [(key, value) for key in _KEYS for value in range(max_value + 1)])


def _passes(seed: int, count: int, items: list[tuple]) -> Iterator[tuple]:
    """`count` items in passes over all, each pass shuffled anew."""
    order = random.Random(seed)
    for number in range(count):
        if number % len(items) == 0:
            order.shuffle(items)
        yield items[number % len(items)]


GENERATORS: dict[str, Callable[..., Iterator[dict]]] = {
    generator.__name__: generator
    for generator in (
        *(stdlib_topics, stdlib_docstrings, stdlib_chats),
        *(arithmetic_chats, arithmetic_rl, arithmetic_preferences),
        *(comparison_chats, comparison_rl, object_chats, object_rl),
    )
}


def arguments(name: str) -> dict[str, int]:
    """The arguments of a generator with their defaults."""
    parameters = inspect.signature(GENERATORS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_arguments(name: str, args: dict) -> None:
    """Raise NemoflowError when generator `name` or one of its arguments is unknown, or no positive integer."""
    if name not in GENERATORS:
        raise NemoflowError(f"generator: {name!r} is unknown; known: {', '.join(sorted(GENERATORS))}")
    known = arguments(name)
    for key, value in args.items():
        if key not in known:
            takes = ", ".join(known) or "no arguments"
            raise NemoflowError(f"generator {name}: args.{key} is unknown; it takes {takes}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise NemoflowError(f"generator {name}: args.{key}: {value!r} is not a positive integer")


def make(payload: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write the source of `payload`: {"generator", "args", "seed", "shards", "python"}.

    Returns {"documents", "bytes"}: rows, and bytes of the files.

    Raises NemoflowError when this interpreter is not the one named in the payload.
    """
    name = payload["generator"]
    check_arguments(name, payload["args"])
    if payload["python"] != platform.python_version():
        raise NemoflowError(
            f"source {name}: this is Python {platform.python_version()}, the stage is defined by the documentation "
            f"of Python {payload['python']}; run it with that one, or plan it anew with this one"
        )
    from nemoflow.data.rows import Shards, dump  # brings pyarrow, which the main process can do without

    with Shards(out, payload["shards"]) as shards:
        for row in GENERATORS[name](payload["seed"], **payload["args"]):
            shards.write(dump(row))
    progress(f"{shards.rows:,} documents, {shards.bytes / 1e6:.2f} MB in {payload['shards']} shards")
    return {"documents": shards.rows, "bytes": shards.bytes}
