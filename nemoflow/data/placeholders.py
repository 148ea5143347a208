"""Placeholder rows of published RL data, completed from the datasets they point into.

A placeholder's licence keeps the question elsewhere: its `dataset` says where, `_hf_placeholder` has the `row` there,
counted from 0, and a `question_template` that says how the prompt is put together. How it is done follows the script
published with NVIDIA's blends (fill_placeholders.py of the Nemotron 3 RL blends), to the byte.
"""

import json
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import Source
from nemoflow.errors import NemoflowError

DAPO_WRAPPING = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
)
"""What every prompt of BytedTsinghua-SIA/DAPO-Math-17k begins and ends with."""


def dapo_question(question: str, template: Any) -> tuple[str, str]:
    """(question, prompt) of a placeholder row: the source's wrapping gives way to the template's.

    template: {"prefix", "suffix"}; one of them is empty. Both results are the same text. As the published script does
    it: the blank lines around the bare question stay, but a prompt that ends in the question ends without one.

    Raises ValueError with the reason.
    """
    prefix, suffix = (template.get("prefix"), template.get("suffix")) if isinstance(template, dict) else ("", "")
    if not isinstance(prefix or suffix, str) or not (prefix or suffix):
        raise ValueError('question_template is not {"prefix": ...} or {"suffix": ...}')
    before, after = DAPO_WRAPPING
    start, end = question.find(before), question.rfind(after)
    if start < 0 or end < start + len(before):
        raise ValueError("the source's question has not DAPO's wrapping, which gives way to the template")
    bare = question[start + len(before) : end]
    prompt = (prefix + bare).removesuffix("\n\n") if prefix else bare + suffix
    return prompt, prompt


def skywork_question(question: str, template: Any) -> tuple[str, str]:
    """(question, prompt) of a placeholder row: the prompt is the template with the question in place of {question}.

    template: {"template": text}. Raises ValueError with the reason.
    """
    text = template.get("template") if isinstance(template, dict) else None
    if not isinstance(text, str) or "{question}" not in text:
        raise ValueError('question_template is not {"template": "... {question} ..."}')
    return question, text.replace("{question}", question)


TEMPLATES: dict[str, Callable[[str, Any], tuple[str, str]]] = {"dapo": dapo_question, "skywork": skywork_question}

_FIELDS = ("prompt", "reward_model")
"""Columns of a placeholder's source: prompt[0].content is the question, reward_model.ground_truth the answer."""


def _answer(text: str) -> str:
    """The expected answer in a ground truth: the first of a JSON list, or the text itself."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            answers = json.loads(text)
        except ValueError:
            return text  # an interval, say
        first = answers[0] if answers else ""
        return first if isinstance(first, str) else json.dumps(first)
    return text


class Unresolvable(Exception):
    """A placeholder that cannot be completed; the text says why."""


class Placeholders:
    """Completes placeholder rows from their sources, of which it keeps the rows that are pointed at."""

    def __init__(self, wanted: dict[str, set[int]], templates: dict[str, str], sources: dict[str, Source]):
        """All by `dataset` of the placeholder rows. wanted: the rows pointed at. templates: names in TEMPLATES."""
        self._templates = templates
        self._sources = sources
        self._rows = {key: _rows_at(source, sorted(wanted.get(key, ()))) for key, source in sources.items()}

    def resolve(self, row: dict) -> dict:
        """The row with question, expected_answer and responses_create_params.input, and without _hf_placeholder.

        Raises Unresolvable.
        """
        key, placeholder = row.get("dataset"), row["_hf_placeholder"]
        if not isinstance(key, str) or key not in self._sources:
            known = ", ".join(sorted(self._sources)) or "none"
            raise Unresolvable(f"dataset {key!r} is not among the placeholders of this data ({known})")
        number = number_of(placeholder)
        if number is None:
            raise Unresolvable("_hf_placeholder.row is not a row's number")
        found, count = self._rows[key]
        if number not in found:
            raise Unresolvable(f"_hf_placeholder.row is {number}, but {key} has {count} rows, from 0")
        where = f"row {number} of {key}"
        try:
            question, answer = found[number]["prompt"][0]["content"], found[number]["reward_model"]["ground_truth"]
        except (KeyError, IndexError, TypeError):
            raise Unresolvable(f"{where} has no prompt[0].content or no reward_model.ground_truth") from None
        if not isinstance(question, str) or not isinstance(answer, str):
            raise Unresolvable(f"{where}: prompt[0].content or reward_model.ground_truth is not a text")
        try:
            question, prompt = TEMPLATES[self._templates[key]](question, placeholder.get("question_template"))
        except ValueError as error:
            raise Unresolvable(f"{error} (template {self._templates[key]}, {where})") from None
        parameters = row.get("responses_create_params")
        completed = {
            "question": question,
            "expected_answer": _answer(answer),
            "responses_create_params": (parameters if isinstance(parameters, dict) else {})
            | {"input": [{"role": "user", "content": prompt}]},
        }
        return {k: v for k, v in row.items() if k != "_hf_placeholder"} | completed


def number_of(placeholder: Any) -> int | None:
    """The row a placeholder points at, counted from 0."""
    number = placeholder.get("row") if isinstance(placeholder, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None


def _rows_at(source: Source, numbers: list[int]) -> tuple[dict[int, dict], int]:
    """The rows of a source with these numbers (ascending, from 0 through all files), and how many rows it has.

    Of Parquet files, only the row groups and columns that matter are read.
    """
    if source.format != "parquet":
        return _lines_at(source, set(numbers))
    found, start = {}, 0
    for file in range(source.count):
        try:
            with pq.ParquetFile(source.path(file)) as rows:
                if missing := [field for field in _FIELDS if field not in rows.schema_arrow.names]:
                    has = ", ".join(rows.schema_arrow.names)
                    raise NemoflowError(f"{source.origin(file)}: no column {missing[0]!r}; there are {has}")
                for group in range(rows.num_row_groups):
                    end = start + rows.metadata.row_group(group).num_rows
                    if _between(numbers, start, end):
                        for batch in rows.iter_batches(1024, row_groups=[group], columns=list(_FIELDS)):
                            inside = _between(numbers, start, start + batch.num_rows)
                            taken = batch.take(pa.array([n - start for n in inside], pa.int64()))
                            found.update(zip(inside, taken.to_pylist(), strict=True))
                            start += batch.num_rows
                    start = end
        except (OSError, pa.ArrowException) as error:
            problem = f"{source.origin(file)}: cannot be read as parquet ({error}); repair the file"
            raise NemoflowError(problem) from None
    return found, start


def _lines_at(source: Source, numbers: set[int]) -> tuple[dict[int, dict], int]:
    broken, found, count = Broken(), {}, 0
    for _, _, row in read(source, source.units(), broken):
        if count in numbers:
            found[count] = {field: row.get(field) for field in _FIELDS}
        count += 1
    if broken.count:
        raise NemoflowError(f"{broken.first}: the rows of this source are found by their number; repair the file")
    return found, count


def _between(numbers: list[int], start: int, end: int) -> list[int]:
    return numbers[bisect_left(numbers, start) : bisect_left(numbers, end)]
