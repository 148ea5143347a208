"""The report of a training: pictures and tables of an export, its evaluations and all they come from."""

from typing import NamedTuple


class Picture(NamedTuple):
    """A file of a report. Where its data is missing, so is the file."""

    category: str
    title: str


PICTURES = {
    "stages": Picture("Stages", "stages, results and hours"),
    "loss": Picture("Curves", "loss"),
    "reward": Picture("Curves", "reward"),
    "throughput": Picture("Curves", "throughput"),
    "tokens": Picture("Data", "tokens by source"),
    "hours": Picture("Costs", "GPU-hours planned and spent"),
    "scores": Picture("Results", "scores of the export"),
    "generations": Picture("Results", "what the export answers"),
}
"""Name of a file without its ending -> what it is."""

TABLES = ("stages", "scores", "generations")
"""Those that are HTML; the others are SVG."""

FILES = tuple(f"{name}.{'html' if name in TABLES else 'svg'}" for name in PICTURES)
"""All files of a report, beside its links."""
