"""Long trainings in slots: whether a training that ended before its time goes on by itself, in the next slot.

A slot is one start of a Slurm job; its attempt stands in run.json with the iteration it started from and the one it
saved last. A slot that made progress goes on, two in a row without stop, and there is a cap. What a person has to mend
never goes on by itself. Everything here follows from run.json, launch.json and the checkpoints.
"""

from datetime import UTC, datetime

from nemoflow.engines import engine
from nemoflow.store import Stage, dump, read_json
from nemoflow.store import write_atomically as write

OPEN = ("unfinished", "ended", "died", "hung")
"""Outcomes of attempts after which the same work can go on."""

GOES_ON = "; goes on in another slot"
"""How a job says so."""

CAP = 50
"""Slots, where launch.json does not say."""


def reached(stage: Stage) -> int:
    """The newest complete checkpoint's iteration; the training's start where there is none."""
    init = stage.payload.get("init", {})
    start = init.get("at", 0) if init.get("carry") == "all" else 0
    return max(engine(stage.payload["engine"]).states(stage.directory / "checkpoints"), default=start)


def close(stage: Stage, attempts: list[dict], outcome: str = "died", reason: str = "was killed") -> bool:
    """Say of the last attempt what it could not say itself, when it was killed; whether there was anything to say."""
    if not attempts or "outcome" in attempts[-1]:
        return False
    attempts[-1] |= {"outcome": outcome, "reason": reason} | _until_its_log_ends(stage, attempts[-1])
    if "from" in attempts[-1]:
        attempts[-1]["reached"] = reached(stage)
    return True


def _until_its_log_ends(stage: Stage, attempt: dict) -> dict:
    """When an attempt that was killed ended: as far as is known, when it last wrote to its log."""
    log = stage.directory / f"attempts/{attempt.get('number')}.log"
    if not log.exists() or "started" not in attempt:
        return {}
    begun = datetime.fromisoformat(attempt["started"])
    end = max(begun, datetime.fromtimestamp(log.stat().st_mtime, UTC))
    return {"ended": end.isoformat(timespec="seconds"), "seconds": round((end - begun).total_seconds(), 1)}


def why_not(attempts: list[dict], job: int, cap: int) -> str | None:
    """Why Slurm job `job`, to which the last attempt belongs, does not go on in another slot; None when it does."""
    own = [a for a in attempts if a.get("job", {}).get("id") == job]
    if not own or own[-1].get("outcome") not in OPEN:
        return own[-1].get("reason", "it was not a slot of this job") if own else "it wrote no record"
    idle = [a for a in own[-2:] if a.get("reached", 0) <= a.get("from", 0)]
    if len(idle) == 2:
        at = own[-1].get("reached", 0)
        return f"two slots in a row saved nothing beyond iteration {at}; the last one: {own[-1]['reason']}"
    if len(own) >= cap:
        return f"it has had {len(own)} slots, which is the stage's cap (resources.slots); the same command goes on"
    return None


def ended(stage: Stage, at: int, job: int, state: str) -> str | None:
    """Why a job that Slurm ended in `state` does not go on in another slot; None when it does.

    For the controller, once the job is over: nobody else writes run.json then.
    """
    if stage.sealed(at) is not None:
        return "it is finished"
    path = stage.directory / "run.json"
    if not path.exists():
        return "it wrote no record"
    run = read_json(path)
    if close(stage, run["attempts"], reason=f"Slurm ended it: {state.lower().replace('_', ' ')}"):
        write(path, dump(run))
    launch = stage.directory / "launch.json"
    resources = read_json(launch).get("resources", {}) if launch.exists() else {}
    return why_not(run["attempts"], job, resources.get("slots", CAP))
