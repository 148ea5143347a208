"""`nemoflow verify [--deep] NAME...`: whether finished artifacts still are what was sealed, and all they come from.

It reads records and files alone, so it works on an archive too: a name is what its link shows, and an artifact's
directory, or a copy of it, will do. Recipes are read only for names that show nothing. The lineage is followed through
the records; what it names and is no longer kept is counted, not missed. Not looked at is what no record holds because
it differs from one run to the next: run.json, launch.json, logs, metrics.jsonl, the model card.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemoflow.canonical import identity
from nemoflow.errors import NemoflowError
from nemoflow.lineage import CLOSURE, RECORDS, Artifact, address, checked, closure, found, store_of
from nemoflow.progress import Progress, human, in_threads
from nemoflow.seal import SCHEMA
from nemoflow.session import Session
from nemoflow.store import contents_of, dump, file_digest, read_json

ALGORITHMS = ("sha256", "blake3")


@dataclass
class Checked:
    """What was found of one artifact. `compared` files had a digest that was computed again, `unknown` ones have none;
    `problems` are sentences that begin with a path."""

    directory: Path
    files: int = 0
    bytes: int = 0
    compared: int = 0
    unknown: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        digests = f", {self.compared} digests compared" if self.compared else ""
        return f"{self.directory}: {self.files} files, {human(self.bytes)}{digests}"


def verify(
    directories: list[Path], deep: bool, say: Callable[[str], None], threads: int = 1
) -> tuple[list[Checked], list[str]]:
    """Check the artifacts in these directories (those of states: at-<N>), and all they come from, each once.

    Every time: records have their form, say the same and have their own identity, inputs are the ones consumed, files
    are there in full length. `deep` also reads every file that has a digest, `threads` at a time.

    Returns what was found, inputs before what consumes them, and the artifacts of the lineage that are not kept here.
    Raises NemoflowError for a directory that holds no finished artifact.
    """
    seen: dict[Path, Checked] = {}
    work: list[tuple[Checked, dict]] = []
    gone: dict[str, None] = {}
    for directory in directories:
        if not any((directory / name).exists() for name in (*RECORDS, CLOSURE)):
            raise NemoflowError(f"{directory}: holds no finished artifact (no {' or '.join(RECORDS)})")
        for artifact, record in _lineage(directory.resolve(), gone, seen):
            work += [(artifact, entry) for entry in _files(artifact, record, deep)]
    if deep:
        known = [(artifact, entry) for artifact, entry in work if any(a in entry for a in ALGORITHMS)]
        meter = Progress(say, len(known), sum(entry["size"] for _, entry in known))
        wrong = in_threads(_digest, [(artifact.directory, entry, meter) for artifact, entry in known], threads, meter)
        for (artifact, _), problem in zip(known, wrong, strict=True):
            artifact.compared += 1
            artifact.problems += [problem] if problem else []
    return list(seen.values()), list(gone)


def run(names: list[str], session: Session, deep: bool, threads: int, as_json: bool = False) -> None:
    """Verify what the names show and print what was found, problems on stderr. Exits with 1 where there are any.

    Raises NemoflowError for a name that is none, or whose artifact is not finished.
    """
    directories = [directory for name in names for directory in found(name, session)]
    artifacts, gone = verify(directories, deep, lambda text: print(text, file=sys.stderr), threads)
    if as_json:
        told = [asdict(artifact) | {"directory": str(artifact.directory)} for artifact in artifacts]
        print(json.dumps({"artifacts": told, "not_kept": gone}, indent=2, ensure_ascii=False))
    else:
        _print(artifacts, gone)
    if any(artifact.problems for artifact in artifacts):
        raise SystemExit(1)


def _print(artifacts: list[Checked], gone: list[str]) -> None:
    for artifact in artifacts:
        for problem in artifact.problems:
            print(f"nemoflow: error: {problem}", file=sys.stderr)
        if not artifact.problems:
            print(f"{artifact}: fine")
    for directory in gone:
        print(f"{directory}: not kept here, so not looked at")
    if unknown := sum(artifact.unknown for artifact in artifacts):
        print(f"{unknown} files without a digest, of which only the sizes were compared; seal/NAME makes digests")


def _lineage(top: Path, gone: dict[str, None], seen: dict[Path, Checked]) -> Iterator[tuple[Checked, dict]]:
    """The artifact in a directory and all it comes from that is here and not `seen`, inputs first, with their records.

    What is wrong with the records goes to the problems. Without recursion: a chain may be long.
    """

    def entered(directory: Path) -> tuple[Checked, dict | None, Iterator[Path]]:
        artifact = Checked(directory)
        under_way[directory] = None
        record = _record(artifact)
        return artifact, record, iter(_inputs(artifact, record, gone) if record else ())

    if top in seen:
        return
    under_way: dict[Path, None] = {}
    stack = [entered(top)]
    while stack:
        artifact, record, inputs = stack[-1]
        upstream = next(inputs, None)
        if upstream is None:
            stack.pop()
            del under_way[artifact.directory]
            seen[artifact.directory] = artifact
            if record:
                yield artifact, record
        elif upstream in under_way:
            artifact.problems.append(
                f"{artifact.directory}: comes from itself, by way of {upstream}; a record is wrong"
            )
        elif upstream not in seen:
            stack.append(entered(upstream))


def _record(artifact: Checked) -> dict | None:
    """The record in a directory; None where it is damaged, or where lineage.json is all there is."""
    directory, records = artifact.directory, {}
    for name in reversed(RECORDS):  # the truth first
        path = directory / name
        if not path.exists():
            continue
        try:
            records[name] = checked(path.read_bytes(), path)
        except NemoflowError as error:
            artifact.problems.append(str(error))
        except OSError as error:
            artifact.problems.append(f"{path}: cannot be read: {error.strerror}")
    try:
        known = closure(directory)
    except NemoflowError as error:
        artifact.problems.append(str(error))
    else:
        artifact.problems += _closure(directory / CLOSURE, known.values(), next(iter(records.values()), None))
    if len(records) == 2 and (directory / RECORDS[0]).read_bytes() != (directory / RECORDS[1]).read_bytes():
        artifact.problems.append(
            f"{directory / RECORDS[0]}: differs from {directory / RECORDS[1]}; delete it if that is right"
        )
    record = next(iter(records.values()), None)
    if record and _identity(record) != record["identity"]:
        artifact.problems.append(
            f"{directory / next(iter(records))}: is said to be {record['identity']}, but its payload has the identity "
            f"{_identity(record)}"
        )
    return record


def _identity(record: dict) -> str | None:
    try:
        return identity(record["payload"])
    except NemoflowError:
        return None


def _closure(path: Path, artifacts: Iterator[Artifact], top: dict | None) -> list[str]:
    """What is wrong with the records in an export's lineage.json: each must be the one that was consumed."""
    digests = {artifact.key: _sha256(artifact.record) for artifact in artifacts}
    problems = []
    for consumer in [*artifacts, *([Artifact(top, None)] if top and digests else [])]:
        for entry in consumer.record["inputs"]:
            digest = digests.get((entry["identity"], entry.get("at")))
            if digest != entry["sha256"]:
                found = "is missing" if digest is None else "is not what was consumed"
                problems.append(f"{path}: the record of {address(entry)} {found} by {consumer.address}; restore it")
    return problems


def _sha256(record: dict) -> str:
    """Of the record as it is sealed."""
    return hashlib.sha256(dump(record).encode()).hexdigest()


def _inputs(artifact: Checked, record: dict, gone: dict[str, None]) -> Iterator[Path]:
    """The directories of an artifact's inputs that are here; notes what is not, and what was made again."""
    store = store_of(Artifact(record, artifact.directory))
    for entry in record["inputs"]:
        upstream = store / address(entry)
        file = _file(upstream)
        if file is None:
            gone[str(upstream)] = None
            continue
        if file_digest(file) != entry["sha256"]:
            artifact.problems.append(
                f"{file}: is not what {artifact.directory} was made from; one of the two was made again"
            )
        yield upstream


def _file(directory: Path) -> Path | None:
    """The record in a directory, the truth rather than its copy."""
    return next((directory / name for name in reversed(RECORDS) if (directory / name).exists()), None)


def _files(artifact: Checked, record: dict, deep: bool) -> list[dict]:
    """Check the sizes of an artifact's files; returns those that are there in full, with the digests known."""
    try:
        contents = contents_of(artifact.directory, record)
    except NemoflowError as error:
        artifact.problems.append(str(error))
        return []
    digests = _digests(artifact, contents)
    there = []
    for entry in contents:
        path = artifact.directory / entry["name"]
        size = path.stat().st_size if path.exists() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            anew = "" if "at" in record else f", or delete {artifact.directory} to have it made anew"
            artifact.problems.append(f"{path}: {found}, sealed with {entry['size']}; restore it{anew}")
            continue
        artifact.files += 1
        artifact.bytes += size
        there.append(entry | digests.get(entry["name"], {}))
        artifact.unknown += deep and not any(a in there[-1] for a in ALGORITHMS)
    return there


def _digests(artifact: Checked, contents: list[dict]) -> dict[str, dict]:
    """What `seal` made for a state: name -> {"sha256"}; empty where there is none, or where it is of another seal."""
    path = artifact.directory / "digests.json"
    if not path.exists():
        return {}
    again = "delete it and ask for seal/NAME again"
    try:
        found = read_json(path)
        listed = [{"name": entry["name"], "size": entry["size"]} for entry in found["files"]]
        if found["sealed"] != file_digest(_file(artifact.directory)):
            raise NemoflowError(f"{path}: was made of another sealed.json; {again}")
        if listed != [{"name": entry["name"], "size": entry["size"]} for entry in contents]:
            raise NemoflowError(f"{path}: lists other files than were sealed; {again}")
        if found["schema"] != SCHEMA or dump(found) != path.read_text(encoding="utf-8"):
            raise NemoflowError(f"{path}: is not as it was written; {again}")
        return {entry["name"]: {"sha256": entry["sha256"]} for entry in found["files"]}
    except NemoflowError as error:
        artifact.problems.append(str(error))
    except (KeyError, TypeError):
        artifact.problems.append(f"{path}: damaged; {again}")
    return {}


def _digest(directory: Path, entry: dict, meter: Progress) -> str | None:
    """What is wrong with a file's bytes, if anything."""
    path = directory / entry["name"]
    algorithm = next(a for a in ALGORITHMS if a in entry)
    try:
        digest = file_digest(path, algorithm)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    meter.add(entry["size"], files=1)
    return None if digest == entry[algorithm] else f"{path}: has other bytes than it was sealed with; restore it"
