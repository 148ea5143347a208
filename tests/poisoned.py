"""Verifiers that do not do what they should, for tests of the judge; and one that does."""

import os
import time


def verify(answer, row):
    """What the answer says: raise, hang, die, or the value given."""
    match answer:
        case "raise":
            raise KeyError("expected_answer")
        case "hang":
            time.sleep(600)
        case "die":
            os._exit(7)
        case "nan":
            return float("nan")
        case "none":
            return None
        case "print":
            print("noise", flush=True)
            return 1
    return float(answer) * row.get("factor", 1)


def odd(answer, row):  # noqa: ARG001
    """Raises for answers that are odd numbers; the others are worth one."""
    if answer.strip() in ("1", "3", "5", "7", "9"):
        raise ValueError(f"{answer} is odd")
    return 1


def hang(answer, row):  # noqa: ARG001
    time.sleep(600)


def odd_length(answer, row):  # noqa: ARG001
    """Honest: one for an answer of an odd number of characters, which about half of a random model's are."""
    return len(answer) % 2
