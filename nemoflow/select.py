"""Kind `select`: the one of several states of a training that goes on, by what they measured.

    checkpoint      a link to the chosen state's checkpoint

The rule (which states, which measure, highest or lowest) is the identity of this artifact and so of what goes on from
it, and no part of the training's: another rule trains nothing again.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError


def make(
    payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], records: dict[str, list[dict]]
) -> Made:
    """Choose among inputs["states"], directories with a link `checkpoint` each, whose sealed records are in `records`.

    Returns the measures {"at": the chosen iteration, "metric", "best", "values": iteration -> value}, and the files of
    the chosen checkpoint as its own. Of equal states the earliest is chosen.

    Raises NemoflowError for a state that was not measured so, or whose value is no finite number.
    """
    metric, best = payload["metric"], payload["best"]
    states = {
        of["at"]: (directory, record)
        for of, directory, record in zip(payload["of"], inputs["states"], records["states"], strict=True)
    }
    values = {at: _value(record["measures"], metric, directory) for at, (directory, record) in sorted(states.items())}
    chosen = (max if best == "highest" else min)(values, key=values.__getitem__)
    progress(f"iteration {chosen} has the {best} {metric} of {len(values)}: {values[chosen]:.4g}")
    directory, record = states[chosen]
    # What is in `out` is moved into its parent, the artifact's directory, from where the link has to lead
    (out / "checkpoint").symlink_to(os.path.relpath(directory / "checkpoint", out.parent))
    measures = {"at": chosen, "metric": metric, "best": best, "values": {str(at): v for at, v in values.items()}}
    return Made(measures, record["contents"])


def _value(measures: dict, metric: str, state: Path) -> float:
    known = _flat(measures)
    if metric not in known:
        raise NemoflowError(
            f"{state}: has no {metric!r}, which the stage of kind select chooses by; it measured "
            f"{', '.join(sorted(known))}"
        )
    if not math.isfinite(known[metric]):
        raise NemoflowError(f"{state}: {metric} is {known[metric]}, which cannot be compared; leave this state out")
    return known[metric]


def _flat(measures: dict, prefix: str = "") -> dict[str, float]:
    """Dotted name -> number."""
    found: dict[str, float] = {}
    for key, value in measures.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
