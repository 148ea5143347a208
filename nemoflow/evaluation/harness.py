"""lm-evaluation-harness on a local model and local data. Importing this takes seconds.

The harness's command line finds tasks by reading all fourteen thousand of its files, and ends with a report about the
machine; here one task is built from its own file, and what is measured does not depend on where.
"""

import contextlib
import dataclasses
import difflib
import itertools
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lm_eval import evaluator
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks._yaml_loader import load_yaml

from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import Source, open_source
from nemoflow.errors import NemoflowError
from nemoflow.evaluation import BATCH, tasks

BOOTSTRAP = 10_000
"""Resamples from which the errors of other metrics than means are estimated: to within 1% of themselves."""

_FETCHING = ("dataset_path", "dataset_name", "dataset_kwargs")
_STRUCTURE = ("tag", "group", "task_list")


def rows(source: Source) -> datasets.Dataset:
    """The rows of a source's files, in order, with their columns and types.

    Raises NemoflowError for files that cannot be read, and for rows that are no objects or differ in their types.
    """
    if source.format == "parquet":
        tables = []
        for number in range(source.count):
            try:
                tables.append(pq.read_table(source.path(number)))
            except (OSError, pa.ArrowException) as error:
                raise NemoflowError(f"{source.origin(number)}: cannot be read as parquet ({error})") from None
        try:
            return datasets.Dataset(pa.concat_tables(tables, promote_options="default"))
        except pa.ArrowException as error:
            raise NemoflowError(f"{source.origin(0)}: its files differ in their columns: {_line(error)}") from None
    broken = Broken()
    found = [row for _, _, row in read(source, source.units(), broken)]
    broken.check(len(found) + broken.count, "0")
    columns = dict.fromkeys(key for row in found for key in row)
    try:
        return datasets.Dataset.from_dict({key: [row.get(key) for row in found] for key in columns})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise NemoflowError(f"{source.origin(0)}: a column has values of several types: {_line(error)}") from None


def load_task(payload: dict, sources: Mapping[str, Path]) -> ConfigurableTask:
    """The task of a payload, on the rows of `sources` (split -> source artifact).

    Raises NemoflowError where the data does not suit it, or its file has settings that lm-eval does not know.
    """
    datasets.disable_progress_bars()
    name, text = payload["task"]["name"], payload["task"].get("text")
    settings = tasks.parse(text, name) if text else load_yaml(tasks.find(name))
    examples = tasks.shots(settings, payload["fewshot"])
    wanted = tasks.splits(settings, examples)
    opened = {split: open_source(directory) for split, directory in sources.items()}
    data = {split: rows(source) for split, source in opened.items()}
    for split, table in data.items():
        if not len(table):
            raise NemoflowError(f"data.{split}: {opened[split].origin(0)}: has no rows")
    settings = {key: value for key, value in settings.items() if key not in (*_FETCHING, *_STRUCTURE)}
    for key in ("training_split", "validation_split", "fewshot_split"):
        if settings.get(key) not in data:
            settings[key] = None
    if (own := settings.get("fewshot_config")) and own.get("split") not in (None, *data):
        settings["fewshot_config"] = {key: value for key, value in own.items() if key != "split"}
    settings["num_fewshot"] = examples
    known = {field.name for field in dataclasses.fields(TaskConfig)}
    for key in settings.keys() - known:
        close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        raise NemoflowError(
            f"task {name}: {key}: no setting of lm-eval's{f'; did you mean {close[0]}?' if close else ''}"
        )

    class Local(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = data

    asked = next(split for split, use in wanted.items() if use == "questions")
    with _suited(name, asked, data[asked].column_names):
        task = Local(config=settings)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return task


def check_questions(task: ConfigurableTask, limit: int | None) -> int:
    """Put every question that will be asked into words once, and its answer; returns how many there are.

    Raises NemoflowError naming the row that lacks something.
    """
    docs = task.eval_docs  # made anew by the task's own functions whenever it is asked for
    count = min(limit or len(docs), len(docs))
    split = task.config.test_split or task.config.validation_split
    for number, doc in enumerate(itertools.islice(docs, count)):
        with _suited(task.config.task, where := f"{split}, row {number + 1}", list(doc)):
            said = [task.doc_to_text(doc), task.doc_to_target(doc)]
            if task.config.doc_to_choice is not None:
                said.append(task.doc_to_choice(doc))
        # A row that lacks a column has null there, which a template writes as None
        empty = [column for column, value in doc.items() if value is None and _used(task, column)]
        if empty and any(text is None or "None" in str(text) for text in said):
            raise _unsuitable(task.config.task, where, list(doc), f"{empty[0]} is null")
    return count


def _used(task: ConfigurableTask, column: str) -> bool:
    """Whether a task's templates have the name of a column."""
    templates = (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice)
    return any(re.search(rf"\b{re.escape(column)}\b", text) for text in templates if isinstance(text, str))


@contextlib.contextmanager
def _suited(name: str, where: str, columns: list[str]) -> Iterator[None]:
    """Turns what a task's templates and functions raise on unsuitable rows into one line."""
    try:
        yield
    except (jinja2.UndefinedError, KeyError) as error:
        what = f"no column {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise _unsuitable(name, where, columns, what) from error
    except Exception as error:
        raise _unsuitable(name, where, columns, f"{type(error).__name__}: {_line(error)}") from error


def _unsuitable(name: str, where: str, columns: list[str], what: str) -> NemoflowError:
    listed = ", ".join(columns)
    return NemoflowError(f"task {name} does not suit its data ({where}): {what}; the columns are {listed}")


def load_model(directory: Path, launch: dict) -> Any:
    """The export in `directory`, in its own dtype, on the backend that `launch` names.

    Raises NemoflowError when the backend cannot load it.
    """
    backend = launch.get("backend", "hf")
    more = {"device": "cuda" if torch.cuda.is_available() else "cpu"} if backend == "hf" else {}
    given = {"batch_size": launch.get("batch_size", BATCH), **more, **launch.get("arguments", {})}
    try:
        return get_model(backend)(pretrained=str(directory), dtype="auto", **given)
    except Exception as error:
        raise NemoflowError(
            f"{directory}: backend {backend} cannot load it: {type(error).__name__}: {_line(error)}"
        ) from error


def evaluate(task: ConfigurableTask, model: Any, payload: dict) -> dict[str, Any]:
    """Ask the questions: {"results": for results.json, "samples": rows of samples.jsonl, "measures"}.

    Raises NemoflowError for a metric that is no number.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    name = task.config.task
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with torch.no_grad():
        found = evaluator.evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=payload["limit"],
            bootstrap_iters=BOOTSTRAP,
            apply_chat_template=payload["chat"],
            fewshot_as_multiturn=True,
        )
    kept = {key: value for key, value in found["results"][name].items() if "," in key}
    measures = {"samples": found["n-samples"][name]["effective"], **_measures(kept, name)}
    settings = {key: value for key, value in found["configs"][name].items() if key != "metadata"}
    results = {
        "task": name,
        "version": found["versions"][name],
        "results": kept,
        "settings": settings,
        "higher_is_better": found["higher_is_better"][name],
        "n-samples": found["n-samples"][name],
        "harness": payload["harness"],
    }
    return {"results": results, "samples": found["samples"][name], "measures": measures}


def _measures(found: dict[str, Any], name: str) -> dict[str, Any]:
    """lm-eval's "METRIC,FILTER" and "METRIC_stderr,FILTER" as {"metric", "metrics": {name: {"value", "stderr"}}}.

    A filter is named where there are several.
    """
    several = len({key.partition(",")[2] for key in found}) > 1
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in found.items():
        metric, _, filter_ = key.partition(",")
        if metric.endswith("_stderr"):
            continue
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise NemoflowError(f"task {name}: {metric} is {value}, which is no number; see samples of the task's data")
        error = found.get(f"{metric}_stderr,{filter_}")
        usable = isinstance(error, (int, float, np.number)) and math.isfinite(error)
        metrics[key if several else metric] = {"value": float(value), "stderr": float(error) if usable else None}
    if not metrics:
        raise NemoflowError(f"task {name}: has no metrics; its metric_list is empty")
    return {"metric": next(iter(metrics)), "metrics": metrics}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
