"""Sums and the like: whether an answer is nothing but the expected number, or the expected text."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?(\d+(,\d{3})*(\.\d*)?|\.\d+)")


def verify(answer: str, row: dict) -> float:
    """1.0 when the answer is the row's `expected_answer`, as a number or else as a text; 0.0 otherwise."""
    found, expected = answer.strip(), str(row["expected_answer"]).strip()
    numbers = _number(found), _number(expected)
    return float(numbers[0] == numbers[1] if None not in numbers else found == expected)


def _number(text: str) -> Decimal | None:
    """The number that a text is, with commas between thousands or without; None when it is anything else."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
