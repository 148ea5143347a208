"""`nemoflow gc`: artifacts that nothing reaches, listed, and deleted when told.

Reached is what a name shows (the links of this directory), what a recipe says today with its milestones, what a
RECIPE.stages.json holds, and all that these come from. Of a training that is reached, the states that nothing reaches
go, but never its two newest checkpoints. What a job works on is left alone.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemoflow import slurm, stage_lock, strip
from nemoflow.engines import engine
from nemoflow.errors import NemoflowError, NotLocked
from nemoflow.kinds import KINDS, TRAINED
from nemoflow.progress import human
from nemoflow.recipe import known
from nemoflow.stages import VIEWS, Recipe
from nemoflow.store import Store, read_json
from nemoflow.writer import Writer

TRASH = ".trash-"
"""What is being deleted has a name that begins so: an interrupted deletion leaves nothing that looks whole."""

KEPT = 2
"""The newest checkpoints of a training, which are never deleted: it may go on, and the last one may be damaged."""

_ARTIFACT = re.compile(r".+-(?P<id>[0-9a-f]{12,})")

State = tuple[str, int | None]
"""Identity, and the state of a training."""


@dataclass(frozen=True)
class Garbage:
    """An artifact, a whole training, or one state of a training that is reached otherwise."""

    directory: Path
    identity: str
    at: int | None = None

    @property
    def trajectory(self) -> Path:
        """Where its lock is."""
        return self.directory if self.at is None else self.directory.parent

    def parts(self) -> list[Path]:
        """What is deleted of it, in this order: never a state that is asked for and whose checkpoint is gone."""
        if self.at is None:
            return [self.directory]
        checkpoint = self.directory / "checkpoint"
        held = [checkpoint.resolve()] if checkpoint.exists() else []
        return [self.trajectory / "wanted" / str(self.at), self.directory, *held]

    @property
    def bytes(self) -> int:
        return sum(map(_size, self.parts()))


def reached(store: Store, directories: list[Path]) -> tuple[set[State], list[str]]:
    """All that a name, a recipe or a lock of stages reaches, and the recipes of which nothing is known: unlocked ones.

    directories: where recipes are. Raises NemoflowError for a broken recipe or lock: what it reaches cannot be known.
    """
    roots, unknown = set(_named(store)), []
    for name in known(directories):
        try:
            recipe = Recipe(name, directories, store)
        except NotLocked:
            unknown.append(name)
            continue
        roots |= {(target.stage.identity, target.at) for target in _targets(recipe)}
    for path in sorted(path for directory in directories for path in directory.glob(f"*{stage_lock.SUFFIX}")):
        roots |= {(identity, None) for identity in stage_lock.read(path)[1] if store.stage_file(identity).exists()}
    found: set[State] = set()
    for identity, at in roots:
        try:
            found |= {(stage.identity, n) for stage, n in store.ancestors(identity, at)}
        except NemoflowError as error:
            raise NemoflowError(f"what {identity} comes from cannot be known: {error}") from None
    # A lock of stages holds trainings, whichever states of them there are
    held = {identity for identity, at in roots if at is None and store.load(identity).trained}
    return found | {(i, at) for i in held for at in store.load(i).sealed_states()}, unknown


def _targets(recipe: Recipe) -> Iterator:
    for name in recipe.names():
        kind, _, rest = name.partition("/")
        _, _, stage = rest.partition("@")
        stage, _, at = stage.partition(":")
        yield from recipe.view(kind, stage or None, int(at) if at else None).values()
    for chain in recipe.chains.values():
        for trained in chain:
            for at in trained.wanted:
                for kind in ("hf_export", *(["eval"] if recipe.evals else [])):
                    yield from recipe.view(kind, trained.spec.name, at).values()


def _named(store: Store) -> Iterator[State]:
    """What the links of this directory show."""
    for kind in VIEWS:
        for path in Path(kind).iterdir() if Path(kind).is_dir() else []:
            links = [path] if path.is_symlink() else [p for p in path.iterdir() if p.is_symlink()]
            for link in links:
                shown = Path(os.path.normpath(link.parent / link.readlink()))
                at = shown.name.removeprefix("at-") if shown.name.startswith("at-") else None
                match = _ARTIFACT.fullmatch(shown.parent.name if at else shown.name)
                if match and store.stage_file(match["id"]).exists():
                    yield match["id"], int(at) if at else None


def garbage(store: Store, reachable: set[State]) -> Iterator[Garbage]:
    """What is in the store and not reached, by kind and address."""
    identities = {identity for identity, _ in reachable}
    for kind in KINDS:
        for directory in sorted((store.root / kind).glob("*")):
            if not (match := _ARTIFACT.fullmatch(directory.name)) or not directory.is_dir():
                continue
            identity = match["id"]
            if identity not in identities:
                yield Garbage(directory, identity)
            elif kind in TRAINED:
                stage = store.load(identity)
                complete = engine(stage.payload["engine"]).states(directory / "checkpoints")
                newest = sorted(complete)[-KEPT:]
                for at in stage.sealed_states():
                    if (identity, at) not in reachable and at not in newest:
                        yield Garbage(stage.state(at), identity, at)


def delete(found: list[Garbage], store: Store) -> tuple[list[Garbage], list[tuple[Garbage, str]]]:
    """Delete what no job works on; returns what was deleted, and what was not with the reason.

    Raises Unreachable when jobs may be waiting in Slurm, and it does not answer.
    """
    queue = _queue()
    gone, left = [], []
    for one in found:
        writer = Writer(one.trajectory / "lock")
        if why := _taken(one.identity, writer, queue):
            left.append((one, why))
            continue
        for part in one.parts():
            _delete(part)
        if one.at is None:
            store.stage_file(one.identity).unlink(missing_ok=True)
        else:
            writer.release()
        gone.append(one)
    for pattern in ("*", "*/*", "*/*/checkpoints"):  # of a deletion that was interrupted
        for trash in store.root.glob(f"{pattern}/{TRASH}*"):
            shutil.rmtree(trash)
    return gone, left


def _queue() -> list[slurm.Job]:
    return slurm.mine() if shutil.which("squeue") else []


def _taken(identity: str, writer: Writer, queue: list[slurm.Job]) -> str | None:
    """Who works on a stage, in words; None when nobody does, and the lock has been taken."""
    if job := next((job for job in queue if identity in job.comment), None):
        return f"Slurm job {job.id} is for it"
    try:
        owner = writer.try_to_take()
    except NemoflowError as error:  # nobody here can tell whether its owner lives
        return str(error)
    return f"process {owner['processes'][0]['pid']} on {owner['host']} works on it" if owner else None


def terminal(store: Store, reachable: set[State]) -> list[Garbage]:
    """The last states of trainings that are reached and finished, whose optimizer nothing goes on with.

    Finished: no recipe of today, and no run so far, asks for a later state. Only of Megatron-Bridge's whole models.
    """
    carried, latest = set(), dict[str, int]()
    for identity, at in reachable:
        latest[identity] = max(at or 0, latest.get(identity, 0))
        init = store.load(identity).payload.get("init", {})
        if init.get("carry", "weights") != "weights":
            carried.add((init["from"], init["at"]))
    found = []
    for identity in sorted(latest):
        stage = store.load(identity)
        if not stage.trained or stage.payload["engine"] != "megatron_bridge" or "peft" in stage.payload:
            continue
        at = max(engine(stage.payload["engine"]).states(stage.directory / "checkpoints"), default=None)
        asked = [int(p.name) for p in (stage.directory / "wanted").glob("*") if p.name.isdigit()]
        if at is None or stage.sealed(at) is None or max([latest[identity], *asked]) > at or (identity, at) in carried:
            continue
        found.append(Garbage(stage.state(at), identity, at))
    return found


def strip_optimizers(found: list[Garbage], store: Store) -> tuple[dict[Garbage, int], list[tuple[Garbage, str]]]:
    """Strip these states; returns the bytes that each has freed, and those that were left with the reason.

    Raises NemoflowError for a damaged checkpoint, and a disk that is too small.
    """
    queue = _queue()
    freed, left = {}, []
    for one in found:
        writer = Writer(one.trajectory / "lock")
        if why := _taken(one.identity, writer, queue):
            left.append((one, why))
            continue
        try:
            stage = store.load(one.identity)
            checkpoint = engine(stage.payload["engine"]).states(stage.directory / "checkpoints")[one.at]
            freed[one] = strip.strip(stage, one.at, checkpoint)
        finally:
            writer.release()
    return freed, left


def run_optimizer(store: Store, directories: list[Path], really: bool, as_json: bool) -> None:
    """List finished trainings whose last state holds an optimizer that nothing goes on with, or strip it."""
    reachable, unknown = reached(store, directories)
    found = terminal(store, reachable)
    sizes = {one: _size((one.directory / "checkpoint").resolve()) for one in found}
    freed, left = strip_optimizers(found, store) if really else ({}, [])
    kept = dict(left)
    if as_json:
        rows = [
            {"directory": str(one.directory), "title": title(one), "bytes": sizes[one], "freed": freed.get(one, 0)}
            | ({"why_not": kept[one]} if one in kept else {})
            for one in found
        ]
        print(json.dumps({"terminal": rows, "recipes_not_locked": unknown}, indent=2, ensure_ascii=False))
        return
    for one in found:
        said = f"; left alone: {kept[one]}" if one in kept else f"; {human(freed[one])} freed" if one in freed else ""
        print(f"{human(sizes[one]):>10}  {title(one)}  {one.directory}{said}")
    if unknown:
        print(f"not locked, so that nothing of them is reached: {', '.join(unknown)}")
    if not found:
        print("no finished training has an optimizer left that nothing goes on with")
    elif really:
        print(f"freed {human(sum(freed.values()))}")
    else:
        print(
            "most of each is the optimizer; nemoflow gc --optimizer --delete deletes that, and nothing trains on then"
        )


def _delete(path: Path) -> None:
    """A file, a link or a directory, which is out of sight at once."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    trash = path.with_name(f"{TRASH}{path.name}")
    path.rename(trash)
    shutil.rmtree(trash)


def _size(path: Path) -> int:
    """Bytes of a file or of all in a directory; what links lead to is not counted."""
    if path.is_dir() and not path.is_symlink():
        return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir() or p.is_symlink())
    return path.lstat().st_size if path.is_symlink() or path.exists() else 0


def title(one: Garbage) -> str:
    """What people call it: the recipe's name for it when it was made."""
    launch = one.trajectory / "launch.json"
    name = read_json(launch).get("title") if launch.exists() else None
    return (name or one.trajectory.parent.name) + (f" to {one.at}" if one.at is not None else "")


def run(store: Store, directories: list[Path], really: bool, as_json: bool) -> None:
    """List what nothing reaches, or delete it. Raises NemoflowError where what is reached cannot be known."""
    reachable, unknown = reached(store, directories)
    found = list(garbage(store, reachable))
    sizes = {one: one.bytes for one in found}
    titles = {one: title(one) for one in found}
    gone, left = delete(found, store) if really else ([], [])
    if as_json:
        rows = [{"directory": str(one.directory), "title": titles[one], "bytes": sizes[one]} for one in found]
        kept = {one.directory: why for one, why in left}
        for row, one in zip(rows, found, strict=True):
            row |= {"deleted": one in gone} | ({"why_not": kept[one.directory]} if one.directory in kept else {})
        print(json.dumps({"unreached": rows, "recipes_not_locked": unknown}, indent=2, ensure_ascii=False))
        return
    for one in found:
        why = next((f"; left alone: {why}" for other, why in left if other == one), "")
        print(f"{human(sizes[one]):>10}  {titles[one]}  {one.directory}{why}")
    if unknown:
        print(f"not locked, so that nothing of them is reached: {', '.join(unknown)}")
    total = human(sum(sizes[one] for one in (gone if really else found)))
    count = len(gone) if really else len(found)
    what = f"{count} artifacts and states, {total}"
    if not found:
        print("everything is reached by a name, a recipe or a lock")
    else:
        print(f"deleted {what}" if really else f"{what}, that nothing reaches; nemoflow gc --delete deletes them")
