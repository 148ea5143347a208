"""What a report tells, read from records alone: artifact.json, and beside it run.json, launch.json, metrics.jsonl."""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from nemoflow import kinds, lineage, session, summary, training
from nemoflow.errors import NemoflowError
from nemoflow.lineage import graph
from nemoflow.progress import seconds
from nemoflow.report import draw

ANSWERS = 60
"""At most so many answers of each task are shown."""

TEXT = 1200
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class Training:
    """A training that a report tells of, as far as the state it is about.

    metrics: iteration -> measurements. sources: name -> tokens it was trained on; empty where they are not counted.
    planned: GPU-hours at most, spent: GPU-hours; None where no GPU was asked for.
    """

    title: str
    kind: str
    record: dict
    metrics: dict[int, dict]
    sources: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    hours: float = 0
    planned: float | None = None
    spent: float | None = None


def write(name: Path, links: dict[str, str]) -> None:
    """Make the name `name` of `links` (name -> artifact, relative to the name) and what is drawn of them.

    Raises NemoflowError for damaged records.
    """

    def fill(directory: Path) -> None:
        nodes = graph.kept(lineage.load(*(directory / link for link in links)))
        trainings = list(found(nodes))
        draw.all_of(trainings, directory)
        (directory / "stages.html").write_text(stages(trainings), encoding="utf-8")
        if asked := [node for node in nodes if node.kind == "eval" and node.record]:
            (directory / "scores.html").write_text(scores(asked), encoding="utf-8")
            if text := generations(asked):
                (directory / "generations.html").write_text(text, encoding="utf-8")

    session.show(name, links, fill)


def found(nodes: list[graph.Node]) -> Iterator[Training]:
    """The trainings among artifacts, in their order."""
    by_key = {node.key: node for node in nodes}
    for node in nodes:
        if node.kind not in kinds.TRAINED or node.record is None:
            continue
        path = node.own / "metrics.jsonl"
        try:
            metrics = training.metrics(path)
        except (ValueError, KeyError) as error:
            raise NemoflowError(f"{path}: is damaged: {error}; restore it") from None
        init = node.payload.get("init", {})
        start = init["at"] if init.get("carry") == "all" else 0
        runs = graph.beside(node.own / "run.json").get("attempts", [])
        on_cpus = any(run.get("device") == "CPU" for run in runs)
        yield Training(
            node.title or f"{node.kind} {node.label} to {node.at}",
            node.kind,
            node.record,
            {n: metrics[n] for n in sorted(metrics) if start <= n <= node.at},
            _sources(node, by_key),
            len(runs),
            sum(run.get("seconds", 0) for run in runs) / 3600,
            None if on_cpus else _planned(graph.beside(node.own / "launch.json")),
            summary.gpu_hours(runs, node.at),
        )


def _planned(launch: dict) -> float | None:
    """GPU-hours that a training may take at most, as its plan says (costs.cost)."""
    asked = launch.get("resources")
    if not asked or launch.get("cluster", {}).get("launcher", "here") == "here":
        return None
    return asked["nodes"] * asked["gpus_per_node"] * asked["slots"] * seconds(asked["time"]) / 3600


def _sources(node: graph.Node, by_key: dict[str, graph.Node]) -> dict[str, float]:
    """Tokens that a training read of each source: what it was trained on by the shares of its data."""
    total = summary.tokens(node.record)
    data = by_key.get(dict(node.inputs).get("data", ""))
    if data is not None and data.kind == "index":
        data = by_key.get(dict(data.inputs).get("data", ""))
    if data is None or data.record is None or total is None:
        return {}
    measures = data.record["measures"]
    if data.kind == "blend":
        return {part["source"]: float(total * Fraction(part["share"])) for part in measures["parts"]}
    if data.kind == "chats":
        labels = [entry["label"] for entry in data.record["inputs"] if entry["role"] == "sources"]
        counted = [source["train"]["tokens"] for source in measures["sources"]]
        whole = sum(counted)
        return {label: total * count / whole for label, count in zip(labels, counted, strict=True) if whole}
    return {}


# -- tables --------------------------------------------------------------------------------------------------------

_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<style>
body {{ font: 14px system-ui, DejaVu Sans, sans-serif; color: #1d2530; margin: 12px }}
table {{ border-collapse: collapse; margin-bottom: 24px }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid #dde2e8 }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.right {{ color: #4c7a00 }}
.wrong {{ color: #a8431f }}
</style>
{body}
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    cells = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = [f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows]
    heading = f"<h2>{html.escape(title)}</h2>\n" if title else ""
    return f"{heading}<table>\n<tr>{cells}</tr>\n" + "\n".join(lines) + "\n</table>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f'<span class="{"right" if value else "wrong"}">{"right" if value else "wrong"}</span>'
    if value is None:
        return ""
    return html.escape(
        f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else value
    )


def stages(trainings: list[Training]) -> str:
    """The table of trainings."""
    heads = ("training", "iterations", "tokens", "result", "attempts", "hours", "GPU-hours, at most", "GPU-hours spent")
    rows = [
        (
            one.title,
            one.record["measures"].get("iterations"),
            summary.tokens(one.record),
            summary.result(one.record),
            one.attempts,
            one.hours,
            one.planned,
            one.spent,
        )
        for one in trainings
    ]
    return _PAGE.format(body=_table(heads, rows))


def scores(asked: list[graph.Node]) -> str:
    """The table of every metric of evaluations."""
    rows = []
    for node in asked:
        measures = node.record["measures"]
        for metric, score in measures["metrics"].items():
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
            rows.append((node.payload["task"]["name"], metric, f"{score['value']:.3f}{error}", measures["samples"]))
    return _PAGE.format(body=_table(("task", "metric", "score", "questions"), rows))


def generations(asked: list[graph.Node]) -> str:
    """Questions of evaluations with the model's answers, the first ANSWERS of each; empty where none are kept."""
    tables = []
    for node in asked:
        path, task = node.directory / "samples.jsonl", node.payload["task"]["name"]
        if not path.exists():
            continue
        try:
            with path.open(encoding="utf-8") as file:
                rows = [_answer(json.loads(line), node.record["measures"]["metric"]) for line in file]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise NemoflowError(f"{path}: is damaged: {type(error).__name__}: {error}; restore it") from None
        title = f"{task}: {min(ANSWERS, len(rows)):,} of {len(rows):,} questions"
        tables.append(_table(("asked", "the model's answer", "expected", ""), rows[:ANSWERS], title))
    return _PAGE.format(body="\n".join(tables)) if tables else ""


def _answer(sample: dict, metric: str) -> tuple[str, str, str, bool | None]:
    """A line of samples.jsonl (lm-eval's form): question, answer, what was expected, and whether that is right.

    Where the model was asked for likelihoods, its answer is the likeliest of the choices.
    """
    asked = sample["arguments"][0][0]
    first = sample["resps"][0][0]
    if isinstance(first, str):
        said = first
    else:
        likely = max(range(len(sample["resps"])), key=lambda i: float(sample["resps"][i][0][0]))
        said = sample["arguments"][likely][1]
    score = sample.get(metric.partition(",")[0])
    right = bool(score) if score in (0, 1) else None
    return _shortened(asked), _shortened(said), _shortened(str(sample["target"])), right


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}… {len(text):,} characters"
