"""The store: where artifacts and frozen stages live, and how they are written.

<store>/.stages/<identity>.json                   a stage's payload, written once by the main process
<store>/<kind>/<label>-<identity>/                an artifact, or for trained kinds a trajectory
<store>/<kind>/<label>-<identity>/at-<N>/         a trajectory's state N
    sealed.json     the truth: written once, by the holder of the writer's lock
    artifact.json   its copy for the graph; exists exactly when the artifact is complete
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemoflow import kinds
from nemoflow.canonical import canonical, identity_of
from nemoflow.errors import NemoflowError
from nemoflow.latency import appears

SCHEMA = 1
"""Version of artifact.json's form."""

STRIPPED = "stripped.json"
"""In a checkpoint whose optimizer `nemoflow gc --optimizer` has left out: the files that are there now."""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def dump(value: dict) -> str:
    """JSON for people and diffs: sorted keys, indented, ends with a newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict:
    """The JSON object in a file the workflow wrote. Raises NemoflowError when it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise NemoflowError(f"{path}: damaged: {error}; it is written by nemoflow, restore it or delete it") from None
    return found


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file's bytes, in hex; `algorithm` is "sha256" or "blake3"."""
    if algorithm == "blake3":
        from blake3 import blake3  # not needed by the main process
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake3 if algorithm == "blake3" else algorithm).hexdigest()


def contents_of(directory: Path, record: dict) -> list[dict]:
    """The files that an artifact or state consists of: as sealed, or of one that was stripped those that are left.

    Raises NemoflowError where what was stripped is of another seal.
    """
    path = directory / "checkpoint" / STRIPPED
    if not path.exists():
        return record["contents"]
    found = read_json(path)
    if found.get("sealed") != hashlib.sha256(dump(record).encode()).hexdigest():
        raise NemoflowError(f"{path}: is of another sealed.json than {directory}'s; restore one of the two")
    return found["contents"]


@dataclass(frozen=True)
class Stage:
    """A frozen stage of a store; `at` is the state meant, for trained kinds."""

    store: "Store"
    identity: str
    payload: dict

    @property
    def kind(self) -> str:
        return self.payload["kind"]

    @property
    def trained(self) -> bool:
        return self.kind in kinds.TRAINED

    @cached_property
    def label(self) -> str:
        return kinds.KINDS[self.kind].label(self.payload, lambda i: self.store.load(i).payload)

    @property
    def directory(self) -> Path:
        """The artifact's directory, or the trajectory's."""
        return self.store.root / self.kind / f"{self.label}-{self.identity}"

    def state(self, at: int | None) -> Path:
        """The directory that holds sealed.json: the artifact's, or that of the trajectory's state `at`."""
        return self.directory / f"at-{at}" if self.trained else self.directory

    def reads(self) -> list[tuple["Stage", int | None]]:
        """The artifacts whose files a job of this stage reads: its inputs, and what an index or blend points into."""
        found = []
        for ref in kinds.inputs(self.payload):
            stage = self.store.load(ref.identity)
            found.append((stage, ref.at))
            if stage.kind in ("index", "blend"):
                found += [(s, at) for s, at in stage.reads() if s.kind in ("blend", "merge")]
        return found

    def sealed(self, at: int | None = None) -> dict | None:
        """The record of the finished artifact or state; None while it is not finished."""
        path = self.state(at) / "sealed.json"
        return read_json(path) if path.exists() else None

    def sealed_states(self) -> list[int]:
        """Iterations of a trajectory that are sealed, ascending."""
        found = (p.parent.name.removeprefix("at-") for p in self.directory.glob("at-*/sealed.json"))
        return sorted(int(n) for n in found if n.isdigit())


class Store:
    """A directory of artifacts and frozen stages."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._loaded: dict[str, Stage] = {}
        self._texts: dict[str, str] = {}  # canonical: finding it takes a while for a source of ten thousand files
        self._frozen: set[str] = set()

    def stage_file(self, identity: str) -> Path:
        return self.root / ".stages" / f"{identity}.json"

    def add(self, payload: dict) -> str:
        """Make a payload known to this object under its identity, writing nothing; `freeze` writes it."""
        text = canonical(payload)
        key = identity_of(text)
        if self._texts.setdefault(key, text) != text:
            raise NemoflowError(f"two different stages share the identity {key}: {self._texts[key]} and {text}")
        if key not in self._loaded:
            self._loaded[key] = Stage(self, key, json.loads(text))
        return key

    def load(self, key: str) -> Stage:
        """The stage with this identity, as added or frozen. Raises NemoflowError when unknown or damaged."""
        if key not in self._loaded:
            path = self.stage_file(key)
            if not appears(path.exists, path):
                raise NemoflowError(f"{path}: no such stage; stages are frozen when a name is asked of Snakemake")
            payload = read_json(path)
            text = canonical(payload)
            if identity_of(text) != key:
                raise NemoflowError(f"{path}: damaged: its content has the identity {identity_of(text)}")
            self._loaded[key], self._texts[key] = Stage(self, key, payload), text
        return self._loaded[key]

    def freeze(self, key: str) -> Stage:
        """Write the stage and all it refers to, each once; never change one. Raises NemoflowError on a collision."""
        stage = self.load(key)
        if key in self._frozen:
            return stage
        for ref in kinds.inputs(stage.payload):
            self.freeze(ref.identity)
        path, text = self.stage_file(key), self._texts[key] + "\n"
        if not path.exists():
            write_atomically(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise NemoflowError(f"{path}: holds another stage than the one with this identity: {text.strip()}")
        self._frozen.add(key)
        return stage

    def ancestors(self, key: str, at: int | None = None) -> Iterator[tuple[Stage, int | None]]:
        """Every artifact that (key, at) comes from, each once, inputs before what consumes them; itself last."""
        seen: set[tuple[str, int | None]] = set()

        def visit(stage: Stage, at: int | None) -> Iterator[tuple[Stage, int | None]]:
            if (stage.identity, at) in seen:
                return
            seen.add((stage.identity, at))
            for ref in kinds.inputs(stage.payload):
                yield from visit(self.load(ref.identity), ref.at)
            yield stage, at

        yield from visit(self.load(key), at)


def record(stage: Stage, at: int | None, measures: dict, contents: list[dict]) -> dict:
    """What sealed.json and artifact.json say of a finished artifact: deterministic, nothing of hosts, dates or names.

    `contents` lists what the artifact consists of: name, size in bytes and, where hashed, sha256 or blake3.
    """
    consumed = []
    for ref in kinds.inputs(stage.payload):
        upstream = stage.store.load(ref.identity)
        entry = {"role": ref.role, "kind": upstream.kind, "label": upstream.label, "identity": ref.identity}
        sealed = upstream.state(ref.at) / "sealed.json"
        consumed.append(entry | ({"at": ref.at} if ref.at is not None else {}) | {"sha256": file_digest(sealed)})
    return {
        "schema": SCHEMA,
        "kind": stage.kind,
        "label": stage.label,
        "identity": stage.identity,
        **({"at": at} if at is not None else {}),
        "payload": stage.payload,
        "inputs": consumed,
        "contents": contents,
        "measures": measures,
    }


def seal(stage: Stage, at: int | None, measures: dict, contents: list[dict]) -> None:
    """Write sealed.json, read-only, and then artifact.json. Only the holder of the writer's lock may call this."""
    directory = stage.state(at)
    write_atomically(directory / "sealed.json", dump(record(stage, at, measures, contents)))
    (directory / "sealed.json").chmod(0o444)
    publish(directory)


def publish(directory: Path) -> None:
    """Write artifact.json from sealed.json: the graph's copy, which Snakemake may have deleted.

    Raises NemoflowError when an artifact.json stands there and says something else.
    """
    text = (directory / "sealed.json").read_text(encoding="utf-8")
    target = directory / "artifact.json"
    if not target.exists():
        write_atomically(target, text)
    elif target.read_text(encoding="utf-8") != text:
        raise NemoflowError(
            f"{target}: differs from sealed.json beside it; delete artifact.json if sealed.json is right"
        )


def remove_stale_temporaries(directory: Path) -> None:
    """Delete what an interrupted `write_atomically` left. Only the holder of the writer's lock may call this."""
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()
