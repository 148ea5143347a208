"""The pictures of a report, as SVG."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

from nemoflow.data.picture import COLOURS, STYLE, short

if TYPE_CHECKING:
    from nemoflow.report.made import Training

POINTS = 2000
"""At most so many points of a curve are drawn; of longer ones means of neighbours."""

COLUMNS = 2
"""Of small pictures side by side."""


def all_of(trainings: list["Training"], out: Path) -> None:
    """Draw what there is data for: loss, reward, throughput, tokens and hours."""
    with mpl.rc_context(STYLE):
        rewarded = [one for one in trainings if _series(one, "reward")[0].size]
        lost = [one for one in trainings if one not in rewarded and _series(one, "loss")[0].size]
        _small(lost, _loss, out / "loss.svg")
        _small(rewarded, _reward, out / "reward.svg")
        _small([one for one in trainings if _rates(one)[1].size], _throughput, out / "throughput.svg")
        _small([one for one in trainings if one.sources], _tokens, out / "tokens.svg", 0.35)
        if costly := [one for one in trainings if one.spent or one.planned]:
            _hours(costly, out / "hours.svg")


def _small(trainings: list["Training"], fill: Callable, out: Path, each: float = 0) -> None:
    """A small picture of each training. `each`: inches of height for each source of the training that has most."""
    if not trainings:
        return
    rows = -(-len(trainings) // COLUMNS)
    height = max(2.6, 1.1 + each * max(len(one.sources) for one in trainings)) if each else 2.9
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(11, height * rows), layout="constrained", squeeze=False)
    for one, place in zip(trainings, axes.flat, strict=False):
        place.set_title(one.title)
        fill(place, one)
    for place in axes.flat[len(trainings) :]:
        place.axis("off")
    _save(figure, out)


def _save(figure: plt.Figure, out: Path) -> None:
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _series(one: "Training", name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a metric, where it was measured; thinned to means of equally many points."""
    pairs = [(n, entry[name]) for n, entry in one.metrics.items() if entry.get(name) is not None]
    return _thin(np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float))


def _thin(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(at) <= POINTS:
        return at, values
    parts = np.array_split(np.arange(len(at)), POINTS)
    return np.array([at[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _loss(axes: plt.Axes, one: "Training") -> None:
    axes.plot(*_series(one, "loss"), color=COLOURS[1], linewidth=1, label="loss")
    if (valid := _series(one, "valid_loss"))[0].size:
        axes.plot(*valid, color=COLOURS[2], marker="o", markersize=4, label="validation loss")
    axes.set_xlabel("iteration")
    axes.legend(frameon=False)


def _reward(axes: plt.Axes, one: "Training") -> None:
    at, reward = _series(one, "reward")
    _, spread = _series(one, "reward_std")
    if len(spread) == len(reward):
        axes.fill_between(at, reward - spread, reward + spread, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(at, reward, color=COLOURS[0], linewidth=1.4, label="mean reward of a step")
    axes.set_xlabel("iteration")
    axes.legend(frameon=False)


def _rates(one: "Training") -> tuple[np.ndarray, np.ndarray, str]:
    """Iterations, speed, and its unit: tokens a second, or steps a minute where no tokens are counted."""
    timed = [(n, entry) for n, entry in one.metrics.items() if entry.get("seconds")]
    if timed and all("tokens" in entry for _, entry in timed):
        # `tokens` counts from the beginning; the first step has none before it to compare with
        pairs = [
            (n, (entry["tokens"] - before["tokens"]) / entry["seconds"]) for (_, before), (n, entry) in pairwise(timed)
        ]
        unit = "tokens per second"
    else:
        pairs, unit = [(n, 60 / entry["seconds"]) for n, entry in timed], "steps per minute"
    return *_thin(np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)), unit


def _throughput(axes: plt.Axes, one: "Training") -> None:
    at, speed, unit = _rates(one)
    axes.plot(at, speed, color=COLOURS[5], linewidth=1)
    axes.axhline(float(np.median(speed)), color=COLOURS[6], linewidth=0.8, linestyle="--")
    axes.annotate(
        f"median {short(float(np.median(speed)))}",
        (1, float(np.median(speed))),
        (0, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)


def _tokens(axes: plt.Axes, one: "Training") -> None:
    ordered = sorted(one.sources.items(), key=lambda item: -item[1])
    axes.barh(range(len(ordered)), [tokens for _, tokens in ordered], height=0.7, color=COLOURS[0])
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    for place, (_, tokens) in enumerate(ordered):
        _note(axes, tokens, place)
    axes.set_xlabel("tokens trained on")
    axes.margins(x=0.15)


def _note(axes: plt.Axes, value: float, place: float) -> None:
    """Its number at the end of a bar."""
    axes.annotate(short(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)


def _hours(trainings: list["Training"], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.6 * len(trainings)), layout="constrained")
    for shift, name, label, colour in (
        (-0.2, "planned", "planned, at most", COLOURS[6]),
        (0.2, "spent", "spent", COLOURS[0]),
    ):
        values = [getattr(one, name) or 0 for one in trainings]
        axes.barh([place + shift for place in range(len(trainings))], values, height=0.38, color=colour, label=label)
        for place, value in enumerate(values):
            axes.annotate(
                short(value), (value, place + shift), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(trainings)), [one.title for one in trainings])
    axes.invert_yaxis()
    axes.set_xlabel("GPU-hours")
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(x=0.1)
    axes.legend(frameon=False)
    _save(figure, out)
