"""The lineage of artifacts as their records tell it: no recipe, no frozen stage and no service is needed.

A record is artifact.json, or sealed.json where that is gone. What an artifact was made from lies in the same store;
else, for an export that was copied away alone, in the lineage.json inside it, which holds the records of all it comes
from: {"artifacts": [RECORD, ...]}, inputs before what consumes them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoflow.canonical import identity
from nemoflow.compare import Key
from nemoflow.errors import NemoflowError
from nemoflow.store import SCHEMA, read_json

if TYPE_CHECKING:  # an export reads lineages in a container, which has nothing that recipes are read with
    from nemoflow.session import Session

RECORDS = ("artifact.json", "sealed.json")
CLOSURE = "lineage.json"
"""In an export: the records of all it comes from."""

_SHAPE: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "label": str,
    "identity": str,
    "payload": dict,
    "inputs": list,
    "contents": list,
    "measures": dict,
}
_BESIDE: dict[str, tuple[type, type | None]] = {"attempts": (list, dict), "cluster": (dict, None), "title": (str, None)}
"""In run.json and launch.json what is read here, where it is there: its type, and that of its entries."""

_PART = re.compile(r"[A-Za-z0-9._-]*[A-Za-z0-9-][A-Za-z0-9._-]*")
"""What a part of an address may be: no way out of the store."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `directory` holds its record; None where an export's lineage.json is all that is known."""

    record: dict
    directory: Path | None

    @property
    def kind(self) -> str:
        return self.record["kind"]

    @property
    def at(self) -> int | None:
        return self.record.get("at")

    @property
    def key(self) -> Key:
        return self.record["identity"], self.at

    @property
    def address(self) -> str:
        """Its place in a store: kind/label-identity, and /at-N for a state."""
        return address(self.record)

    @property
    def own(self) -> Path | None:
        """Where run.json and launch.json are: for a state the trajectory's directory."""
        # A name is a link to the state
        return self.directory.resolve().parent if self.directory and self.at is not None else self.directory

    def inputs(self) -> Iterator[tuple[str, Key]]:
        """(role, artifact) of what it was made from."""
        for entry in self.record["inputs"]:
            yield entry["role"], (entry["identity"], entry.get("at"))

    def beside(self, name: str) -> dict:
        """run.json or launch.json; empty where it is not kept."""
        path = self.own and self.own / name
        found = read_json(path) if path and path.exists() else {}
        for key, (form, each) in _BESIDE.items():
            value = found.get(key, form())
            if not isinstance(value, form) or (each and not all(isinstance(one, each) for one in value)):
                raise NemoflowError(f"{path}: damaged: {key} is not what it should be; restore it, or delete the file")
        return found


@dataclass
class Lineage:
    """Artifacts and all they come from. artifacts: inputs before what consumes them. roots: those that were asked for.
    missing: what records name and is not there: its input entry, and an artifact made from it."""

    artifacts: dict[Key, Artifact] = field(default_factory=dict)
    roots: list[Key] = field(default_factory=list)
    missing: dict[Key, tuple[dict, Artifact]] = field(default_factory=dict)

    def records(self) -> list[dict]:
        return [artifact.record for artifact in self.artifacts.values()]

    def gaps(self) -> list[str]:
        """What is missing, a sentence each."""
        return [
            f"{address(entry)}: is missing, which {consumer.directory or consumer.address} was made from; "
            "its record is needed to say what is behind it"
            for entry, consumer in self.missing.values()
        ]


def address(entry: dict) -> str:
    """The place in a store of what a record or an entry of its inputs says."""
    flat = f"{entry['kind']}/{entry['label']}-{entry['identity']}"
    return f"{flat}/at-{entry['at']}" if entry.get("at") is not None else flat


def read(directory: Path) -> dict | None:
    """The record of the artifact in a directory; None where there is none.

    Raises NemoflowError when it is damaged, of a newer form, or when its two copies differ.
    """
    texts = {}
    for name in RECORDS:
        try:
            texts[name] = (directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise NemoflowError(f"{directory / name}: cannot be read: {error.strerror}") from None
    if not texts:
        return None
    for name, text in texts.items():
        record = checked(text, directory / name)
    if len(set(texts.values())) > 1:
        first = directory / RECORDS[0]
        raise NemoflowError(f"{first}: differs from sealed.json beside it; delete it if sealed.json is right")
    return _own(record, directory / name)


def checked(text: bytes | Any, where: Path | str) -> dict:
    """A record that has the form it should have. `text`: JSON, or what is in it."""
    try:
        record = json.loads(text) if isinstance(text, bytes) else text
    except (ValueError, RecursionError) as error:
        raise NemoflowError(f"{where}: damaged: {error}; restore it") from None
    if not isinstance(record, dict):
        raise NemoflowError(f"{where}: damaged: no JSON object; restore it")
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise NemoflowError(f"{where}: schema: {schema}: this nemoflow reads up to {SCHEMA}; use a newer one")
    wrong = "schema" if not isinstance(schema, int) else None
    wrong = wrong or next((key for key, kind in _SHAPE.items() if not isinstance(record.get(key), kind)), None)
    if wrong is None:
        for number, entry in enumerate([record, *record["inputs"]]):
            at = entry.get("at") if isinstance(entry, dict) else "?"
            keys = ("kind", "label", "identity", *(("role", "sha256") if number else ()))
            if not (at is None or isinstance(at, int)) or not all(isinstance(entry.get(key), str) for key in keys):
                wrong = f"inputs[{number - 1}]" if number else "at"
            elif not all(_PART.fullmatch(entry[key]) for key in ("kind", "label", "identity")):
                wrong = f"inputs[{number - 1}]" if number else "its address"
    if wrong is None and not all(map(_is_file, record["contents"])):
        wrong = "contents"
    if wrong is None and record["payload"].get("kind") != record["kind"]:
        wrong = "payload.kind"
    if wrong:
        raise NemoflowError(f"{where}: damaged: {wrong} is missing or not what it should be; restore it")
    return record


def _is_file(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    return isinstance(entry.get("size"), int) and all(isinstance(entry.get(a, ""), str) for a in ("sha256", "blake3"))


def _own(record: dict, where: Path | str) -> dict:
    """A record whose payload has the identity that it says. Raises NemoflowError."""
    try:
        said = identity(record["payload"])
    except NemoflowError as error:
        said = str(error)
    if said != record["identity"]:
        raise NemoflowError(
            f"{where}: damaged: is said to be {record['identity']}, but its payload has the identity {said}; restore it"
        )
    return record


def closure(directory: Path) -> dict[Key, Artifact]:
    """The records in the lineage.json of an export's directory; empty where there is none."""
    path = directory / CLOSURE
    if not path.exists():
        return {}
    entries = read_json(path).get("artifacts")
    if not isinstance(entries, list):
        raise NemoflowError(f"{path}: damaged: artifacts is missing; restore it")
    places = (f"{path}: artifacts[{number}]" for number in range(len(entries)))
    found = (Artifact(_own(checked(e, place), place), None) for e, place in zip(entries, places, strict=True))
    return {artifact.key: artifact for artifact in found}


def load(*directories: Path) -> Lineage:
    """The artifacts in these directories, and all they come from.

    What is missing is told by the lineage, not raised. Raises NemoflowError for a directory without a record, for
    damaged and newer ones, and for artifacts that come from themselves.
    """
    lineage, known = Lineage(), dict[Key, Artifact]()
    for directory in directories:
        record = read(directory)
        if record is not None:
            top = [Artifact(record, directory)]
        elif found := closure(directory):
            known |= found
            consumed = {key for artifact in found.values() for _, key in artifact.inputs()}
            top = [artifact for artifact in found.values() if artifact.key not in consumed]
        else:
            raise NemoflowError(f"{directory}: holds no finished artifact (no {' or '.join(RECORDS)})")
        for artifact in top:
            _visit(artifact, lineage, known)
            if artifact.key not in lineage.roots:
                lineage.roots.append(artifact.key)
    return lineage


def _visit(top: Artifact, lineage: Lineage, known: dict[Key, Artifact]) -> None:
    """Add an artifact and all it comes from. Without recursion: a chain may be long."""
    path = {top.key: top}
    stack = [(top, iter(_inputs(top, lineage, known)))]
    while stack:
        artifact, inputs = stack[-1]
        upstream = next(inputs, None)
        if upstream is None:
            stack.pop()
            del path[artifact.key]
            lineage.artifacts.setdefault(artifact.key, artifact)
        elif upstream.key in path:
            circle = [*list(path.values())[list(path).index(upstream.key) :], upstream]
            raise NemoflowError(
                f"{upstream.directory or upstream.address}: comes from itself: "
                f"{' <- '.join(one.address for one in circle)}; one of these records is wrong"
            )
        elif upstream.key not in lineage.artifacts:
            path[upstream.key] = upstream
            stack.append((upstream, iter(_inputs(upstream, lineage, known))))


def _inputs(consumer: Artifact, lineage: Lineage, known: dict[Key, Artifact]) -> Iterable[Artifact]:
    """What an artifact was made from; notes what is missing."""
    for number, (_, key) in enumerate(consumer.inputs()):
        entry = consumer.record["inputs"][number]
        if key in lineage.artifacts:
            yield lineage.artifacts[key]
            continue
        if consumer.directory:
            directory = store_of(consumer) / address(entry)
            record = read(directory)
            if record is not None:
                if (record["identity"], record.get("at")) != key:
                    raise NemoflowError(f"{directory}: its record is of {address(record)}; restore it")
                yield Artifact(record, directory)
                continue
            if key not in known:
                known |= closure(consumer.directory)
        if key in known:
            yield known[key]
        else:
            lineage.missing.setdefault(key, (entry, consumer))


def store_of(artifact: Artifact) -> Path:
    """The store that holds an artifact's directory."""
    parents = artifact.directory.resolve().parents  # a name is a link, and so may its directory be
    return parents[min(1 if artifact.at is None else 2, len(parents) - 1)]  # a copy may lie anywhere


def found(name: str, session: "Session | None") -> list[Path]:
    """The directories behind what a person wrote: a name, an artifact, a training, a store, or a copy of any of these.

    `session` resolves the names that show nothing; without it they are refused. The directories of a resolved name need
    not exist. Raises NemoflowError for what is none of these.
    """
    path = Path(name)
    if _holds(path):
        return [path]
    if below := _below(path) or list(every(path)):
        return below
    if session is None or not session.resolve([name]):
        from nemoflow.stages import VIEWS

        raise NemoflowError(f"{name}: write KIND/RECIPE[@STAGE][:N], KIND one of {', '.join(VIEWS)}, or a directory")
    return [target.directory for target in session.names[_normal(name, session)].values()]


def every(store: Path) -> Iterator[Path]:
    """The directories of all finished artifacts of a store, by kind and name, states by iteration."""
    for kind in sorted(p for p in _directories(store) if not p.name.startswith(".")):
        for directory in sorted(_directories(kind)):
            yield from [directory] if _holds(directory) else _below(directory)


def _below(directory: Path) -> list[Path]:
    """The finished artifacts right below a directory: the states of a training, or what a name of several shows."""
    return sorted(filter(_holds, _directories(directory)), key=_number)


def _directories(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _normal(name: str, session: "Session") -> str:
    return next(n for n in reversed(session.names) if Path(n) == Path(name))


def _holds(directory: Path) -> bool:
    return any((directory / name).exists() for name in (*RECORDS, CLOSURE))


def _number(directory: Path) -> tuple[int, str]:
    """States by their iteration."""
    digits = directory.name.removeprefix("at-")
    return (int(digits) if digits.isdigit() else 0, directory.name)
