"""Pictures of data: what people look at before they spend GPU hours on it. SVG, the same bytes for the same data."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

STYLE = {
    "svg.hashsalt": "nemoflow",  # names of elements would be random
    "svg.fonttype": "path",  # looks the same where the font is missing
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
COLOURS = ("#76b900", "#5b7fa6", "#c65d3b", "#e0a72e", "#7d5ba6", "#4aa69b", "#999999")


def short(number: float, _: object = None) -> str:
    """1,500,000 as 1.5M; for an axis, too, which gives a place besides."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def blend(names: Sequence[str], shares: Sequence[float], parts: Sequence[dict], path: Path) -> None:
    """Draw a blend: tokens and share per source, how long documents are, and what was dropped.

    `parts` are the measures of merges, in the order of `names`; lengths[k] counts documents of 2**k to 2**(k+1) - 1
    tokens.
    """
    order = sorted(range(len(names)), key=lambda i: (-shares[i], names[i]))
    names, shares, parts = ([column[i] for i in order] for column in (names, shares, parts))
    with mpl.rc_context(STYLE):
        height = max(2.2, 0.24 * len(names) + 0.9)
        figure = plt.figure(figsize=(10, height + 2.8), layout="constrained")
        rows = figure.add_gridspec(2, 1, height_ratios=[height, 2.8])
        top = rows[0].subgridspec(1, 2, width_ratios=[3, 2])
        tokens, share = figure.add_subplot(top[0]), figure.add_subplot(top[1])
        _bars(tokens, names, [m["tokens"] for m in parts], "tokens")
        _bars(share, [""] * len(names), [100 * s for s in shares], "share of the tokens read, %", log=False)
        bottom = rows[1].subgridspec(1, 2, width_ratios=[3, 2])
        _lengths(figure.add_subplot(bottom[0]), parts)
        _dropped(figure.add_subplot(bottom[1]), names, parts)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _bars(axes: plt.Axes, names: Sequence[str], values: Sequence[float], title: str, log: bool | None = None) -> None:
    at = np.arange(len(values))
    axes.barh(at, values, color=COLOURS[0], height=0.7)
    if log is None and max(values) > 100 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(left=min(values) / 3)
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    for y, value in zip(at, values, strict=True):
        axes.annotate(short(value), (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.12)


def _lengths(axes: plt.Axes, parts: Sequence[dict]) -> None:
    """Documents of all sources by length."""
    total = np.sum([m["lengths"] for m in parts], axis=0)
    used = np.flatnonzero(total)
    first, last = int(used[0]), int(used[-1])
    at = np.arange(first, last + 1)
    axes.bar(at, total[first : last + 1], width=0.9, color=COLOURS[1])
    axes.set_xticks(at, [f"{2**k}" if k < 10 else f"{2 ** (k - 10)}k" for k in map(int, at)])
    axes.set_title("documents by length in tokens, from this to twice this")
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _dropped(axes: plt.Axes, names: Sequence[str], parts: Sequence[dict]) -> None:
    """Share of the rows dropped in each source where any is, by reason."""
    axes.set_title("dropped, % of rows")
    with_drops = [(name, m) for name, m in zip(names, parts, strict=True) if m["dropped"]]
    if not with_drops:
        axes.axis("off")
        axes.text(0, 0.8, f"none of {short(sum(m['rows'] for m in parts))} rows", transform=axes.transAxes)
        return
    with_drops.sort(key=lambda item: -sum(item[1]["dropped"].values()) / item[1]["rows"])
    with_drops = with_drops[:8]
    reasons = sorted({reason for _, m in with_drops for reason in m["dropped"]})
    left = np.zeros(len(with_drops))
    for number, reason in enumerate(reasons):
        values = np.array([100 * m["dropped"].get(reason, 0) / m["rows"] for _, m in with_drops])
        colour = COLOURS[(number + 2) % len(COLOURS)]
        axes.barh(range(len(values)), values, height=0.6, left=left, label=reason, color=colour)
        left += values
    axes.set_yticks(range(len(with_drops)), [name for name, _ in with_drops])
    axes.invert_yaxis()
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2)
