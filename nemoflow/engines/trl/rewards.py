"""Rewards that can be verified: what a row's environment says about an answer.

A row names its environment in `agent_ref.name`, as NeMo-Gym does. Here stand the ones that need no server.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from nemoflow.errors import NemoflowError

_NUMBER = re.compile(r"[+-]?(\d+(,\d{3})*(\.\d*)?|\.\d+)")


def _number(text: str) -> Decimal | None:
    """The number that a text is, with commas between thousands or without; None when it is anything else."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def math(answer: str, row: dict) -> float:
    """1.0 when the answer is the row's `expected_answer`, as a number or else as a text; 0.0 otherwise."""
    found, expected = answer.strip(), str(row["expected_answer"]).strip()
    numbers = _number(found), _number(expected)
    return float(numbers[0] == numbers[1] if None not in numbers else found == expected)


Verifier = Callable[[str, dict], float]
"""(answer without control tokens, row) -> reward."""

VERIFIERS: dict[str, tuple[Verifier, tuple[str, ...]]] = {
    "math_with_judge_simple_agent": (math, ("expected_answer",)),
}
"""`agent_ref.name` -> verifier, and the fields of a row that it reads."""


def check(row: dict, where: str) -> None:
    """Raise NemoflowError, starting with `where`, for a row that no verifier here can judge."""
    name = row.get("agent_ref", {}).get("name")
    if name not in VERIFIERS:
        raise NemoflowError(
            f"{where}: agent_ref.name: {name!r} has no verifier without a GPU; there are {', '.join(sorted(VERIFIERS))}"
        )
    for field in VERIFIERS[name][1]:
        if row.get(field) in (None, ""):
            raise NemoflowError(f"{where}: {field} is missing, which the verifier of {name} compares with")


def reward(answer: str, row: dict) -> float:
    """The reward of an answer to a row that passed `check`."""
    return VERIFIERS[row["agent_ref"]["name"]][0](answer, row)
