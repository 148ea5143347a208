"""`nemoflow show NAME`: what an artifact is, from what, with what, what it measured, attempts and their cost."""

import json
from pathlib import Path
from typing import Any

from nemoflow import summary
from nemoflow.compare import Side, settings
from nemoflow.errors import NemoflowError
from nemoflow.launch import CHECKOUT
from nemoflow.lineage import Artifact, address, found, load
from nemoflow.lineage.trace import made_with, origin
from nemoflow.progress import human
from nemoflow.recipe import chain
from nemoflow.session import Session

LONG = 100
"""Characters of a value that are shown."""


def run(names: list[str], session: Session, as_json: bool) -> None:
    """Print what stands behind names or directories; below, for people, the chain of the names.

    Of a name that is not finished the chain says how far it is. Raises NemoflowError for damaged records, and for what
    is no name.
    """
    tops = []
    for name in names:
        for directory in _directories(name, session):
            if as_json or (directory / "sealed.json").exists() or (directory / "lineage.json").exists():
                lineage = load(directory)
                tops.append(lineage.artifacts[lineage.roots[0]])
            else:
                print(f"{name}: is not finished: {directory}\n")
    if as_json:
        print(json.dumps([described(artifact) for artifact in tops], indent=2, ensure_ascii=False))
        return
    for artifact in tops:
        print(f"{text(artifact)}\n")
    if session.names:
        print(session.summary())


def _directories(name: str, session: Session) -> list[Path]:
    """What today's recipe says a name shows; where there is no such recipe, what its link shows."""
    try:
        if session.resolve([name]):
            (view,) = [view for text, view in session.names.items() if Path(text) == Path(name)]
            return [target.directory for target in view.values()]
    except NemoflowError:
        if not Path(name).exists():
            raise
    return found(name, None)


def described(artifact: Artifact) -> dict:
    """All that is known of an artifact: its record, its directory, launch.json and its attempts, as far as kept."""
    attempts = _attempts(artifact)
    return {
        "title": title(artifact),
        "directory": str(artifact.directory) if artifact.directory else None,
        "record": artifact.record,
        "launch": artifact.beside("launch.json"),
        "attempts": attempts,
        "gpu_hours": summary.gpu_hours(attempts, artifact.at),
    }


def text(artifact: Artifact) -> str:
    """For people."""
    record, attempts = artifact.record, _attempts(artifact)
    contents = record["contents"]
    head = [title(artifact), f"  {artifact.directory or artifact.address}"]
    head += [f"  {len(contents):,} files, {human(sum(entry.get('size', 0) for entry in contents))}"] if contents else []
    inputs = [(entry["role"], address(entry)) for entry in record["inputs"]]
    side = Side(artifact.key, "", record["payload"], list(artifact.inputs()))
    roles = {f"<{entry['role']}>" for entry in record["inputs"]}
    said = {k: v for k, v in settings(side).items() if k != "kind" and not (isinstance(v, str) and v in roles)}
    parts = [
        "\n".join(head),
        _section("from", inputs),
        _section("with", [(k, _short(v)) for k, v in said.items()]),
        _section("measured", [(k, _short(v)) for k, v in record["measures"].items()]),
        _section("made with", [(k, ", ".join(v)) for k, v in made_with(artifact).items()]),
        _attempts_text(attempts, artifact.at),
    ]
    return "\n".join(filter(None, parts))


def reproduce(name: str, session: Session) -> str:
    """The commands that make what a name shows once more, on another machine: checkout, environment, target.

    Raises NemoflowError for what is no name of a recipe, for unfinished artifacts, and where no record says by which
    code they were made.
    """
    if not session.resolve([name]):
        raise NemoflowError(f"{name}: write KIND/RECIPE[@STAGE][:N]; a directory does not say which recipe made it")
    (view,) = [view for text, view in session.names.items() if Path(text) == Path(name)]
    lineage = load(*(target.directory for target in view.values()))
    code = [c for key in lineage.roots for c in made_with(lineage.artifacts[key]).get("code", [])]
    if not code:
        raise NemoflowError(f"{name}: its run.json names no commit: it was made outside of a checkout, or is a copy")
    commit, _, changed = code[-1].partition(" ")
    others = {c for a in lineage.artifacts.values() for c in made_with(a).get("code", [])} - {code[-1]}
    clusters = [a.beside("launch.json").get("cluster", {}) for a in lineage.artifacts.values()]
    on_slurm = any(cluster.get("launcher") == "slurm" for cluster in clusters)
    (recipe,) = session.recipes.values()
    files = chain(recipe.name, session.directories)
    own = [file for path in files for file in (path, path.with_name(f"{path.stem}.lock.json"))]
    here = [a.address for a in lineage.artifacts.values() if "files" in a.record["payload"] and not origin(a)]
    copied = [str(p.absolute()) for p in own if p.exists()]
    lines = [
        f"# {name} is {', '.join(lineage.artifacts[key].address for key in lineage.roots)}",
        *(["# the code had changes, which are not in this commit"] if changed else []),
        *([f"# what it comes from was made by {', '.join(sorted(c[:12] for c in others))} too"] if others else []),
        *([f"# it needs the raw files of {', '.join(here)}; nemoflow trace {name} --files"] if here else []),
        f"git clone {CHECKOUT} reproduced && cd reproduced && git checkout --quiet {commit}",
        f"cp {' '.join(copied)} config/recipes/",
        "make install",
        f".venv/bin/snakemake {'--profile slurm ' if on_slurm else ''}{name}",
        f".venv/bin/nemoflow show {name}",
    ]
    return "\n".join(lines)


def title(artifact: Artifact) -> str:
    """What people call it: the name that the recipe gave it when it was made, else its kind and label."""
    name = artifact.beside("launch.json").get("title") or f"{artifact.kind} {artifact.record['label']}"
    return name + (f" to {artifact.at}" if artifact.at is not None else "")


def _attempts(artifact: Artifact) -> list[dict]:
    """Those that went into it: of a state the ones that began before it."""
    attempts = artifact.beside("run.json").get("attempts", [])
    return [a for a in attempts if artifact.at is None or a.get("from", 0) < artifact.at or len(attempts) == 1]


def _attempts_text(attempts: list[dict], at: int | None) -> str:
    rows = [("attempt", "began", "outcome", "iterations", "seconds", "on", "log")]
    for attempt in attempts:
        job = attempt.get("job")
        where = ",".join(attempt.get("nodes", [])) or attempt.get("host", "")
        where += f" (Slurm job {job['id']}{f'.{job["restarts"]}' if job.get('restarts') else ''})" if job else ""
        span = f"{attempt['from']} -> {attempt.get('reached', '?')}" if "from" in attempt else ""
        rows.append(
            (
                str(attempt.get("number", "")),
                attempt.get("started", "")[:16].replace("T", " "),
                attempt.get("outcome", "running, or killed"),
                span,
                f"{attempt['seconds']:,.0f}" if "seconds" in attempt else "",
                where,
                f"attempts/{attempt.get('number')}.log",
            )
        )
    if not attempts:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    hours = summary.gpu_hours(attempts, at)
    cost = [f"{summary.hardware(attempts)}, {hours:,.1f} GPU-hours"] if hours is not None else []
    return "\n".join(f"  {line}" for line in [*lines, *cost])


def _section(name: str, rows: list[tuple[str, Any]]) -> str:
    width = max((len(key) for key, _ in rows), default=0)
    return "\n".join([f"  {name}", *(f"    {key:<{width}}  {value}" for key, value in rows)]) if rows else ""


def _short(value: Any) -> str:
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found if len(found) <= LONG else f"{found[: LONG - 3]}..."
