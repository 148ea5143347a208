"""Multiple choice: whether the chosen letter is the expected one. Scores as NeMo-Gym's mcqa.

Where a row's `template_metadata.output_regex` finds a choice, that is it: the last match of the first pattern that
matches, letters in any case. Else its `grading_mode` says where to look:

    strict_single_letter_boxed   a capital letter in the first \\boxed{} that holds one and no other (default)
    lenient_boxed                that, or else the only option whose text stands in the first \\boxed{}
    lenient_answer_colon         a letter alone, or an option's text, after "Answer:"
"""

import re

MODES = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")

_BOXED_LETTER = re.compile(r"\\boxed\{\s*[^A-Za-z]*([A-Z])[^A-Za-z]*\s*\}")
_BOXED = re.compile(r"\\boxed\{\s*(.*?)\s*\}", re.DOTALL)
_IN_TEXT = re.compile(r"\\text\{\s*(.*?)\s*\}", re.DOTALL)
_ANSWER = re.compile(r"(?i)answer\s*:\s*(.+)")

_LETTERS = str.maketrans(
    {
        letter: f" {latin}"
        for letters in ("أبجد", "অবডঢ", "ＡＢＣＤ")
        for letter, latin in zip(letters, "ABCD", strict=True)
    }
)
"""What stands for A to D in other scripts."""


def verify(answer: str, row: dict) -> float:
    """1.0 for the letter in the row's `expected_answer`, else 0.0. `options`: a list of {letter: text}."""
    mode = row.get("grading_mode") or MODES[0]
    if mode not in MODES:
        raise ValueError(f"grading_mode: {mode!r} is none of {', '.join(MODES)}")
    text, gold = answer.strip(), str(row.get("expected_answer") or "").strip().upper()
    options = [
        (key.upper(), value)
        for option in row.get("options") or []
        for key, value in option.items()
        if len(key) == 1 and key.isalpha() and value is not None
    ]
    return float(bool(text and gold) and (_by_pattern(text, row, options) or _by_mode(text, mode, options)) == gold)


def _by_pattern(text: str, row: dict, options: list[tuple[str, str]]) -> str | None:
    patterns = (row.get("template_metadata") or {}).get("output_regex") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = re.findall(pattern, text, re.IGNORECASE)
        except re.error:
            continue
        if found:
            chosen = found[-1].strip().translate(_LETTERS).strip().upper()
            if len(chosen) == 1 and chosen.isalpha():
                return chosen
            if letter := _option(chosen, options):
                return letter
    return None


def _by_mode(text: str, mode: str, options: list[tuple[str, str]]) -> str | None:
    letters = {letter for letter, _ in options}
    if mode == "lenient_answer_colon":
        if not (found := _ANSWER.search(text)):
            return None
        said = _unwrapped(found[1]).strip()
        return said.upper() if len(said) == 1 and said.upper() in letters else _option(said, options)
    if (found := _BOXED_LETTER.search(text)) and found[1] in letters:
        return found[1]
    if mode == "lenient_boxed" and (found := _BOXED.search(text)):
        said = [_plain(part) for part in (found[1], _unwrapped(found[1]))]
        meant = {letter for letter, option in options if _plain(option) and any(_plain(option) in s for s in said)}
        return meant.pop() if len(meant) == 1 else None
    return None


def _option(text: str, options: list[tuple[str, str]]) -> str | None:
    """The letter of the first option that reads `text`."""
    return next((letter for letter, option in options if _plain(option) == _plain(text)), None)


def _unwrapped(text: str) -> str:
    while found := _IN_TEXT.fullmatch(text):
        text = found[1]
    return text


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
