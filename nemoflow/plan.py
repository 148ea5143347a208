"""The plan: what each job would do, make, train anew, resume or only seal, and what it would cost; before any runs."""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nemoflow import costs
from nemoflow.errors import NemoflowError
from nemoflow.session import Session
from nemoflow.stages import VIEWS


@dataclass(frozen=True)
class Job:
    """A job to come: the artifact, the state of a training, or that state's digests."""

    identity: str
    at: int | None = None
    digests: bool = False


@dataclass(frozen=True)
class Line:
    """A job in words. command: of the processes that a training starts; None for other jobs."""

    title: str
    directory: str
    does: str
    epochs: str = ""
    command: str | None = None
    cost: costs.Cost | None = None


def needed(session: Session) -> list[Job]:
    """The jobs that Snakemake would run for the names that `session` has resolved: of every artifact that is not there,
    and that nothing finished stands before."""
    found: dict[Job, None] = {}
    stack = []
    for view in session.names.values():
        for target in view.values():
            digests = target.file == "digests.json"
            if digests and not Path(target.artifact).exists():
                found[Job(target.stage.identity, target.at, True)] = None
            stack.append(Job(target.stage.identity, target.at))
    while stack:
        job = stack.pop()
        artifact = session.store.load(job.identity).state(job.at) / "artifact.json"
        if job not in found and not artifact.exists():
            found[job] = None
            stack += [Job(upstream.stage.identity, upstream.at) for upstream in session.upstream(job.identity, job.at)]
    return list(found)


def lines(session: Session, jobs: Iterable[Job]) -> list[Line]:
    """The jobs in words, in the order of the chain. Raises NemoflowError for what is impossible."""
    order = session.order()
    found = []
    for job in sorted(jobs, key=lambda job: (order.get((job.identity, job.at), len(order)), job.digests)):
        title, directory = session.title(job.identity, job.at), str(session.store.load(job.identity).state(job.at))
        if job.digests:
            found.append(Line(f"digests of {title}", directory, "new"))
            continue
        does, epochs = session.plan(job.identity, job.at), session.epochs(job.identity, job.at)
        cost = session.cost(job.identity, job.at)
        found.append(Line(title, directory, does, epochs, session.command(job.identity), cost))
    return found


def total(found: list[Line]) -> costs.Cost | None:
    """Of all jobs; None where none of them takes GPUs of a cluster."""
    known = [line.cost for line in found if line.cost]
    return costs.total(known) if known else None


def text(found: list[Line], commands: bool = False) -> str:
    """For people; with the `commands` of trainings."""
    said = []
    for line in found:
        said.append(f"  {line.title}: {line.does}")
        said += [f"      $ {line.command}"] if commands and line.command else []
        said += textwrap.wrap(line.epochs, 110, initial_indent="      ", subsequent_indent=" " * 14)
    cost = total(found)
    return "\n".join(["Plan:", *said, *([f"  in all {cost}"] if cost else [])])


def run(names: list[str], session: Session, as_json: bool) -> None:
    """Print the plan of names. Raises NemoflowError for what is none, and for what is impossible."""
    for name in names:
        if not session.resolve([name]):
            raise NemoflowError(f"{name}: write KIND/RECIPE[@STAGE][:N], KIND one of {', '.join(VIEWS)}")
    jobs = needed(session)
    session.check_raw_files({job.identity for job in jobs})
    found = lines(session, jobs)
    if as_json:
        cost = total(found)
        print(json.dumps({"jobs": [asdict(line) for line in found], "cost": cost and asdict(cost)}, indent=2))
    elif found:
        print(text(found))
        if unchecked := session.check_cluster({job.identity for job in jobs}):
            print(f"  {unchecked}")
    else:
        print("Nothing to be done: all of it is there.")
