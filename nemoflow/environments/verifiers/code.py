"""Whether a program passes its unit tests, each run in a sandbox (nemoflow/environments/sandbox.py).

The tests are those of NeMo-Gym's code_gen, in LiveCodeBench's form: `verifier_metadata.unit_tests` has `inputs` and
`outputs`, texts, and may have `fn_name`. Without it an input is what the program reads, and an output what it prints;
with it an input has an argument a line, as JSON, and an output is what the function returns, as JSON.
"""

import json
from decimal import Decimal, InvalidOperation

from nemoflow.environments import sandbox


def verify(answer: str, row: dict, *, seconds: float = 10, megabytes: int = 1024) -> float:
    """1.0 when the last block of code in the answer passes all tests, else 0.0. The limits are for each test.

    Raises RuntimeError where generated code cannot be kept apart from the machine.
    """
    tests = row["verifier_metadata"]["unit_tests"]
    name = tests.get("fn_name")
    cases = list(zip(tests["inputs"], tests["outputs"], strict=True))
    code = _code(answer)
    if not code:
        return 0.0
    for given, wanted in cases:
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()] if name else None
        printed = sandbox.run(code, given, name, arguments, seconds, megabytes)
        if printed is None or not (_returns(printed, wanted) if name else _prints(printed, wanted)):
            return 0.0
    return 1.0


def _code(answer: str) -> str:
    """What stands between the last two lines with a fence."""
    lines = answer.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def _returns(printed: str, wanted: str) -> bool:
    try:
        return json.loads(printed) == json.loads(wanted)
    except ValueError:
        return False


def _prints(printed: str, wanted: str) -> bool:
    """Whether the lines agree but for space at their ends, words but for how numbers are written."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (printed, wanted)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(one == other or _same(one.split(), other.split()) for one, other in zip(*lines, strict=True))


def _same(one: list[str], other: list[str]) -> bool:
    try:
        return [Decimal(word) for word in one] == [Decimal(word) for word in other]
    except InvalidOperation:
        return False
