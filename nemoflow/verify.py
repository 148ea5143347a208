"""`nemoflow verify [--deep] NAME...`: whether finished artifacts still are what was sealed, and all they come from.

It reads records and files alone, so it works on an archive too: a name is what its link shows, and an artifact's
directory will do. Recipes are read only for names that show nothing. The lineage is followed through the records; what
it names and is no longer kept is counted, not missed.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemoflow.canonical import identity
from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, human, in_threads
from nemoflow.session import Session
from nemoflow.stages import VIEWS
from nemoflow.store import file_digest, read_json

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

    Every time: records say the same and have their own identity, inputs are the ones consumed, files are there in full
    length. `deep` also reads every file that has a digest, `threads` at a time.

    Returns what was found, inputs before what consumes them, and the artifacts of the lineage that are not kept here.
    Raises NemoflowError for a directory that holds no finished artifact.
    """
    found: dict[Path, Checked] = {}
    work: list[tuple[Checked, dict]] = []
    gone: dict[str, None] = {}
    for directory in directories:
        if not (directory / "sealed.json").exists():
            raise NemoflowError(f"{directory}: is no finished artifact (no sealed.json)")
        for one, record in _lineage(directory.resolve(), gone, set(found)):
            checked = found[one] = Checked(one)
            if record is None:
                checked.problems.append(f"{one / 'sealed.json'}: damaged; restore it")
            else:
                work += [(checked, entry) for entry in _records(checked, record, deep)]
    if deep:
        known = [(checked, entry) for checked, entry in work if any(a in entry for a in ALGORITHMS)]
        meter = Progress(say, len(known), sum(entry["size"] for _, entry in known))
        wrong = in_threads(_digest, [(checked.directory, entry, meter) for checked, entry in known], threads, meter)
        for (checked, _), problem in zip(known, wrong, strict=True):
            checked.compared += 1
            checked.problems += [problem] if problem else []
    return list(found.values()), list(gone)


def run(names: list[str], session: Session, deep: bool, threads: int) -> None:
    """Verify what the names show and print what was found, problems on stderr. Exits with 1 where there are any.

    Raises NemoflowError for a name that is none, or whose artifact is not finished.
    """
    directories = [directory for name in names for directory in _shown(name, session)]
    found, gone = verify(directories, deep, lambda text: print(text, file=sys.stderr), threads)
    for checked in found:
        for problem in checked.problems:
            print(f"nemoflow: error: {problem}", file=sys.stderr)
        if not checked.problems:
            print(f"{checked}: fine")
    for directory in gone:
        print(f"{directory}: not kept here, so not looked at")
    if unknown := sum(checked.unknown for checked in found):
        print(f"{unknown} files without a digest, of which only the sizes were compared; seal/NAME makes digests")
    if any(checked.problems for checked in found):
        raise SystemExit(1)


def _shown(name: str, session: Session) -> list[Path]:
    """The artifacts' directories behind a name."""
    path = Path(name)
    if links := [p for p in (path, *(sorted(path.iterdir()) if path.is_dir() else [])) if (p / "sealed.json").exists()]:
        return links[:1] if links[0] == path else links
    if not session.resolve([name]):
        raise NemoflowError(f"{name}: write KIND/RECIPE[@STAGE][:N], KIND one of {', '.join(VIEWS)}, or a directory")
    return [target.directory for view in session.names.values() for target in view.values()]


def _lineage(directory: Path, gone: dict[str, None], seen: set[Path]) -> Iterator[tuple[Path, dict | None]]:
    """The artifact and all it comes from that is here, inputs first, with their records; None for a damaged one."""
    if directory in seen:
        return
    seen.add(directory)
    try:
        record = read_json(directory / "sealed.json")
        inputs = [_directory(directory, record, entry) for entry in record["inputs"]]
    except (NemoflowError, KeyError, TypeError):
        yield directory, None
        return
    for upstream in inputs:
        if (upstream / "sealed.json").exists():
            yield from _lineage(upstream, gone, seen)
        else:
            gone[str(upstream)] = None
    yield directory, record


def _directory(consumer: Path, record: dict, entry: dict) -> Path:
    """Where an input lies: in the store that holds its consumer."""
    store = consumer.parents[2 if "at" in record else 1]
    directory = store / entry["kind"] / f"{entry['label']}-{entry['identity']}"
    return directory / f"at-{entry['at']}" if "at" in entry else directory


def _records(checked: Checked, record: dict, deep: bool) -> list[dict]:
    """Check the records and the files' sizes; returns the files that are there in full, with the digests known."""
    directory, problems = checked.directory, checked.problems
    sealed, graph = directory / "sealed.json", directory / "artifact.json"
    if graph.exists() and graph.read_bytes() != sealed.read_bytes():
        problems.append(f"{graph}: differs from sealed.json beside it; delete it if sealed.json is right")
    own = directory.parent if "at" in record else directory
    computed = identity(record["payload"])
    if not computed == record["identity"] == own.name.rpartition("-")[2]:
        problems.append(f"{sealed}: is said to be {record['identity']}, but its payload has the identity {computed}")
    for entry in record["inputs"]:
        upstream = _directory(directory, record, entry) / "sealed.json"
        if upstream.exists() and file_digest(upstream) != entry["sha256"]:
            problems.append(f"{upstream}: is not what {directory} was made from; one of the two was made again")
    digests = _digests(checked)
    there = []
    for entry in record["contents"]:
        path = directory / entry["name"]
        size = path.stat().st_size if path.exists() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            anew = "" if "at" in record else f", or delete {directory} to have it made anew"
            problems.append(f"{path}: {found}, sealed with {entry['size']}; restore it{anew}")
            continue
        checked.files += 1
        checked.bytes += size
        there.append(entry | digests.get(entry["name"], {}))
        checked.unknown += deep and not any(a in there[-1] for a in ALGORITHMS)
    return there


def _digests(checked: Checked) -> dict[str, dict]:
    """What `seal` made for a state: name -> {"sha256"}; empty where there is none, or where it is of another seal."""
    path = checked.directory / "digests.json"
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if found["sealed"] != file_digest(checked.directory / "sealed.json"):
            raise NemoflowError(f"{path}: was made of another sealed.json; delete it and ask for seal/NAME again")
        return {entry["name"]: {"sha256": entry["sha256"]} for entry in found["files"]}
    except NemoflowError as error:
        checked.problems.append(str(error))
    except (KeyError, TypeError):
        checked.problems.append(f"{path}: damaged; delete it and ask for seal/NAME again")
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
