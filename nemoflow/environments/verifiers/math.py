"""Whether an answer and the expected one are the same mathematically, by math-verify.

Scores as NeMo-Gym's math_with_judge does without its judge: the expected answer is read as the content of a LaTeX box,
the given one as an expression or as LaTeX, wherever it stands in the text.
"""

import functools
import logging


def verify(answer: str, row: dict) -> float:
    """1.0 when the answer is equal to the row's `expected_answer`, else 0.0; so also where either cannot be read."""
    return _score(answer, str(row["expected_answer"]))


@functools.lru_cache(maxsize=100_000)
def _score(answer: str, expected: str) -> float:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify import verify as equal
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        gold = parse(f"\\boxed{{{_bare(expected)}}}", [LatexExtractionConfig()])
        found = parse(answer, [ExprExtractionConfig(), LatexExtractionConfig()])
        return float(bool(gold) and equal(gold, found, 6))
    except (Exception, TimeoutException):  # NeMo-Gym's too counts as wrong what the library stumbles over
        return 0.0


def _bare(text: str) -> str:
    """Without the dollars or \\( \\) around it."""
    text = text.strip()
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2].strip()
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip()
    return text
