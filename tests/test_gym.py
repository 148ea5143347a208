"""math, mcqa and structured_outputs score as NeMo-Gym's own verifiers. NEMO_GYM: the python of an environment with
nemo-gym==0.4.0 math-verify[antlr4_9_3]==0.8.0 openapi-schema-validator tomli-w xmltodict, which needs no GPU."""

import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest

from nemoflow.environments.verifiers import math, mcqa, structured_outputs

PYTHON = os.environ.get("NEMO_GYM")

pytestmark = pytest.mark.skipif(PYTHON is None, reason="NEMO_GYM is not set")

OPTIONS = [{"A": "red wine"}, {"B": "7"}, {"C": "blue"}]
CHOSEN = (
    *(
        "\\boxed{B}",
        "\\boxed{b}",
        "\\boxed{ (B) }",
        "\\boxed{\\text{B}}",
        "\\boxed{D}",
        "\\boxed{blue}",
        "\\boxed{7 blue}",
    ),
    *("B", "Answer: B", "answer : b", "Answer: 7", "Answer: \\text{B}", "Answer: B.", "\\boxed{Red  Wine}"),
    *("", "\\boxed{A} \\boxed{B}", "the letter is b", "ب"),
)
PATTERNS = (None, r"letter is ([A-Za-z])", r"^\s*([AB])\s*$", ["(", r"([A-Dبا])\s*$"])
VALUES = (
    "8",
    "8 apples",
    "\\boxed{8}",
    "x+1",
    "\\boxed{\\frac{1}{2}}",
    "0.5",
    "",
    "nan",
    "1,024",
    "so $8$",
    "08",
    "12",
)
EXPECTED = ("8", "$8$", "\\(8\\)", "1/2", "0.5", "x+1", "1024", "12")
SCHEMAS = (
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "object", "properties": {"x": {"const": 3}}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1},
)
WRITTEN = (
    '{"a": 1}',
    '{"a": "x"}',
    '{"a": 1, "b": 2}',
    '{"x": 3}',
    "{}",
    "[1]",
    "[]",
    "a: 1",
    "- 1",
    "a = 1",
    "x",
    "",
    "[1] ",
)


def choices() -> list:
    found = []
    for answer, expected, mode, pattern in product(CHOSEN, ("B", "c", "A"), mcqa.MODES, PATTERNS):
        row = {"options": OPTIONS, "expected_answer": expected, "grading_mode": mode}
        found.append((answer, row | ({"template_metadata": {"output_regex": pattern}} if pattern else {})))
    return found


CASES = {
    "math": [(answer, {"question": "?", "expected_answer": gold}) for answer, gold in product(VALUES, EXPECTED)],
    "mcqa": choices(),
    "structured_outputs": [
        (answer, {"schema_str": json.dumps(schema), "schema_type": kind})
        for answer, schema, kind in product(WRITTEN, SCHEMAS, ("json", "yaml", "toml"))
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_nemo_gym(name):
    verify = {"math": math, "mcqa": mcqa, "structured_outputs": structured_outputs}[name].verify
    lines = "".join(json.dumps([name, answer, row]) + "\n" for answer, row in CASES[name])
    script = Path(__file__).with_name("gym_scores.py")
    done = subprocess.run([PYTHON, script], input=lines, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = done.stdout.splitlines()[-len(CASES[name]) :]
    ours = [str(verify(answer, row)) for answer, row in CASES[name]]
    assert len(set(theirs)) > 1
    assert [(*c, a, b) for c, a, b in zip(CASES[name], ours, theirs, strict=True) if a != b] == []
