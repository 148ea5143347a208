"""Lock files: what a recipe's sources and tokenizer were when they were pinned, and how sources are cut into shards.

`nemoflow lock RECIPE` writes RECIPE.lock.json beside the recipe, to be committed. Building the graph then needs no
network and no bulk hashing: sizes of local files are compared, and only one whose time stamp changed since it was last
hashed is hashed again.

A lock has a line per file and per shard, so that its changes can be read:

    ["data/part-0.parquet",734003200,"sha256:9f86...","1000/5242880 1000/5241101 ..."]    and rows/bytes of row groups
    [[0,0,96]]                                                                            its units: nemoflow.data.plan
"""

import glob
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemoflow import hub
from nemoflow import recipe as grammar
from nemoflow.data.plan import Plan, shards
from nemoflow.data.sources import readable
from nemoflow.errors import NemoflowError, NotLocked
from nemoflow.progress import Progress, human, in_threads
from nemoflow.store import Store, file_digest, read_json, write_atomically
from nemoflow.store import dump as dump_json

SCHEMA = 2
"""Version of the lock file's form."""

SUFFIXES = {
    "jsonl.gz": (".jsonl.gz", ".json.gz"),
    "jsonl.zst": (".jsonl.zst", ".json.zst"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "txt": (".txt",),
    "megatron": (".bin",),
}
"""Format -> what its files' names end with."""

BYTES_PER_TOKEN = 4.4
"""UTF-8 bytes of English web text per token of a vocabulary of 131,072. Code and other languages have fewer."""
COMPRESSION = {"parquet": 3, "jsonl.gz": 3, "jsonl.zst": 3, "megatron": 1.1}
"""Bytes of text per byte of file, roughly, where files are compressed, or hold ids. Good for plans only."""

_THREADS = 16
"""Footers asked for at a time; most of the time is waiting for the network."""


class StatCache:
    """Digests of local files by (path, size, time of change), kept in the store."""

    def __init__(self, store: Store):
        self.path = store.root / ".digests.json"
        self._known: dict[str, list] = read_json(self.path) if self.path.exists() else {}
        self._changed = False

    def digest(self, path: Path, known_only: bool = False) -> str | None:
        """The file's SHA-256, read again only when its size or time stamp changed.

        With `known_only` a file that was never hashed here is not read either: None.
        """
        key, stat = str(path.absolute()), path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if key in self._known and self._known[key][:2] == stamp:
            return self._known[key][2]
        if known_only and key not in self._known:
            return None
        self._known[key] = [*stamp, file_digest(path)]
        self._changed = True
        return self._known[key][2]

    def save(self) -> None:
        if self._changed:
            write_atomically(self.path, dump_json(self._known))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Asked(_Strict):
    """What the recipe said when it was locked; saying something else needs a new lock."""

    files: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    format: str | None = None
    shard_size: int | None = None


Row = tuple[str, int, str] | tuple[str, int, str, str]
"""A file: path, size in bytes, digest as ALGORITHM:HEX, and for a divided Parquet file its row groups."""


class Entry(_Strict):
    """What it was: for the hub the commit and the name of the configuration, the format, the files and the plan."""

    asked: Asked
    commit: str | None = None
    config: str | None = None
    format: str | None = None
    files: list[Row]
    plan: Plan = []

    @property
    def bytes(self) -> int:
        return sum(row[1] for row in self.files)


class Lock(_Strict):
    """A lock file: "sources.NAME", "models.STAGE" or "tokenizer" -> what it was."""

    version: Literal[2] = Field(SCHEMA, alias="schema")
    entries: dict[str, Entry]


@dataclass(frozen=True)
class LockedSource:
    """A pinned source as the graph wants it.

    payload: settings of its artifact. paths: of its files here; none for a dataset on the hub. plan: its shards.
    bytes: of its raw files. estimated_tokens: from these and BYTES_PER_TOKEN, good for plans only.
    """

    payload: dict
    paths: list[str]
    plan: Plan
    bytes: int
    estimated_tokens: int


def lock_file(recipe: Path) -> Path:
    """The lock file of a recipe's file."""
    return recipe.with_name(f"{recipe.stem}.lock.json")


def estimated_tokens(size: int, format_: str) -> int:
    """Tokens that raw files of `size` bytes will come to, roughly."""
    return int(size * COMPRESSION.get(format_, 1) / BYTES_PER_TOKEN)


def format_of(paths: Iterable[str]) -> str:
    """The one format of files, by their names. Raises NemoflowError for an unknown one and for several."""
    found: dict[str, str] = {}
    for path in paths:
        format_ = next((f for f, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)
        if format_ is None:
            raise NemoflowError(f"{path}: no format goes by this name; set `format`, one of {', '.join(SUFFIXES)}")
        found.setdefault(format_, path)
    if len(found) > 1:
        examples = " and ".join(f"{format_} ({path})" for format_, path in found.items())
        raise NemoflowError(f"its files have several formats, {examples}; make them sources of their own")
    return next(iter(found))


# -- writing -----------------------------------------------------------------------------------------------------------


def _wanted(spec: grammar.Recipe) -> dict[str, Any]:
    """What a recipe needs locked: "sources.NAME", "models.STAGE" or "tokenizer" -> what it says of it."""
    wanted: dict[str, Any] = {f"sources.{n}": s for n, s in spec.sources.items() if isinstance(s, grammar.Files)}
    if isinstance(spec.tokenizer, grammar.LocalTokenizer):
        wanted["tokenizer"] = spec.tokenizer
    wanted |= {f"models.{s.name}": _files_of(s) for s in spec.stages if isinstance(s, grammar.Import)}
    return wanted


def _files_of(spec: grammar.Import) -> grammar.LocalTokenizer:
    """What an import stage says of its model, in the words of the other things that are locked."""
    return grammar.LocalTokenizer(files=spec.model, revision=spec.revision)


def _asked(spec: Any) -> Asked:
    """What `spec` asks for; a pattern of local files has no revision and the like."""
    keys = ("files", "config", "split", "revision", "format", "shard_size")
    asked = {key: value for key in keys if (value := getattr(spec, key, None)) is not None}
    if not spec.files.startswith(hub.SCHEME):
        for key in ("config", "revision"):
            if key in asked:
                raise NemoflowError(f"{key}: {asked[key]!r}: only hf://ORGANISATION/NAME has one, not {spec.files!r}")
        if asked.pop("split", "train") != "train":
            raise NemoflowError(f"split: {spec.split!r}: only hf://ORGANISATION/NAME has one, not {spec.files!r}")
    return Asked(**asked)


def write(
    name: str, directories: list[Path], store: Store, show: Callable[[str], None], only: list[str] | None = None
) -> Path | None:
    """Pin what recipe `name` reads from this machine and from the hub; returns the lock file, None when none is needed.

    only: names of sources (or "tokenizer") to pin anew; what else the recipe's lock file holds stays. By default all.
    show: gets lines of progress.

    Raises NemoflowError for an unknown name in `only`, a pattern that matches nothing, and what the hub has not or
    does not give. The lock is written whole or not at all.
    """
    file, spec = grammar.load(name, directories)
    wanted = _wanted(spec)
    kept: dict[str, Entry] = {}
    if only is not None:
        keys = {n: f"sources.{n}" if f"sources.{n}" in wanted else n for n in only}
        for unknown in (n for n, key in keys.items() if key not in wanted):
            known = ", ".join(key.removeprefix("sources.") for key in wanted)
            raise NemoflowError(f"{file}: {unknown!r} is nothing that is locked; there are {known}")
        if lock_file(file).exists():
            kept = {k: e for k, e in _read(lock_file(file), name).entries.items() if k in wanted}
        wanted = {key: wanted[key] for key in keys.values()}
    if not wanted:
        return None
    writer = _Writer(store)
    entries = kept | {key: writer.entry(file, key, spec, show) for key, spec in wanted.items()}
    writer.cache.save()
    write_atomically(lock_file(file), dump(entries))
    return lock_file(file)


class _Writer:
    """Finds out what entries pin: each address once, each branch at one commit."""

    def __init__(self, store: Store):
        self.cache = StatCache(store)
        self._entries: dict[str, Entry] = {}
        self._commits: dict[tuple, str] = {}

    def entry(self, file: Path, key: str, spec: Any, show: Callable[[str], None]) -> Entry:
        def say(text: str) -> None:
            show(f"{key}: {text}")

        try:
            asked = _asked(spec)
            what = "model" if key.startswith("models.") else "dataset" if asked.shard_size else "tokenizer"
            known = f"{what} {asked.model_dump_json()}"
            if known not in self._entries:
                self._entries[known] = self._resolve(asked, what, say)
            entry = self._entries[known]
        except NemoflowError as error:
            raise NemoflowError(f"{file}: {key}: {error}") from None
        cut = f", {len(entry.plan):,} shards" if entry.plan else ""
        commit = f", commit {entry.commit[:12]}" if entry.commit else ""
        say(f"{len(entry.files):,} files, {human(entry.bytes)}{cut}{commit}")
        return entry

    def _resolve(self, asked: Asked, what: str, say: Callable[[str], None]) -> Entry:
        remote = asked.files.startswith(hub.SCHEME)
        entry = (self._remote if remote else self._local)(asked, what, say)
        if what == "dataset":
            names = [row[0] for row in entry.files if not row[0].endswith(".idx")]
            entry.format = asked.format or format_of(names)
            if entry.format == "megatron":
                if remote:
                    raise NemoflowError(f"{asked.files}: format megatron is read from local files only")
                _check_pairs(entry.files)
            self._cut(entry, say)
        return entry

    def _local(self, asked: Asked, what: str, say: Callable[[str], None]) -> Entry:
        pattern = asked.files
        root = Path(pattern)
        megatron = hub.iteration(root) if what == "model" and root.is_dir() else None
        root = megatron or root
        # glob.glob and not Path.glob: the pattern may be absolute
        paths = [str(p) for p in root.iterdir()] if root.is_dir() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        paths = sorted(p for p in paths if Path(p).is_file())
        if what == "dataset" and any(p.endswith(".bin") for p in paths):  # whoever asks for *.bin means the .idx too
            beside = {str(Path(p).with_suffix(".idx")) for p in paths if p.endswith(".bin")}
            paths = sorted({*paths, *(p for p in beside if Path(p).is_file())})
        if what == "model" and not megatron:
            paths = [p for p in paths if hub.is_model_file(Path(p).name)]
            hub.check_model([Path(p).name for p in paths], pattern)
        if not paths:
            raise NemoflowError(f"no file matches {pattern!r} (from {Path.cwd()})")
        sizes = [Path(p).stat().st_size for p in paths]
        progress = Progress(say, len(paths), sum(sizes))

        def row(path: str, size: int) -> Row:
            digest = self.cache.digest(Path(path))
            progress.add(size, files=1)
            return (path, size, f"sha256:{digest}")

        threads = min(8, os.cpu_count() or 1)
        files = in_threads(row, list(zip(paths, sizes, strict=True)), threads, progress)
        return Entry(asked=asked, files=files)

    def _remote(self, asked: Asked, what: str, say: Callable[[str], None]) -> Entry:
        repo, kind = hub.repository(asked.files), "dataset" if what == "dataset" else "model"
        say(", ".join(filter(None, (asked.files, asked.config, asked.split, asked.revision))))
        branch = (kind, repo, asked.revision)
        if branch not in self._commits:
            self._commits[branch] = hub.commit(repo, asked.revision, kind)
        commit = self._commits[branch]
        match what:
            case "dataset":
                found = hub.resolve(repo, asked.config, asked.split, commit)
            case "model":
                found = hub.resolve_model(repo, commit)
            case _:
                found = hub.resolve_tokenizer(repo, commit)
        rows: list[Row] = []
        for file in found.files:
            algorithm = "sha256" if "sha256" in file else "git_sha1"
            rows.append((file["path"], file["size"], f"{algorithm}:{file[algorithm]}"))
        return Entry(asked=asked, commit=commit, config=found.config or None, files=rows)

    def _cut(self, entry: Entry, say: Callable[[str], None]) -> None:
        """Plan the shards; footers are read of those Parquet files only that are to be divided."""
        asked = entry.asked
        large = [n for n, row in enumerate(entry.files) if entry.format == "parquet" and row[1] > asked.shard_size]
        if large:
            say(f"{len(entry.files):,} files, {human(entry.bytes)}; reading {len(large):,} Parquet footers")
        progress = Progress(lambda line: say(f"Parquet footers: {line}"), len(large), 0)

        def footer(number: int) -> list[tuple[int, int]]:
            path, bytes_, _ = entry.files[number]
            if entry.commit is None:
                found = hub.footer(path, path)
            else:
                found = hub.row_groups(hub.repository(asked.files), entry.commit, {"path": path, "size": bytes_})
            progress.add(files=1)
            return found

        groups = dict(zip(large, in_threads(footer, [(n,) for n in large], _THREADS, progress), strict=True))
        for number, found in groups.items():
            entry.files[number] = (*entry.files[number], " ".join(f"{rows}/{bytes_}" for rows, bytes_ in found))
        entry.plan = shards([row[1] for row in readable(entry.files, entry.format)], groups, asked.shard_size)


def _check_pairs(files: list[Row]) -> None:
    """Raise NemoflowError unless the files are .bin, each followed by its .idx."""
    names = [Path(row[0]) for row in files]
    for name in names:
        other = name.with_suffix({".bin": ".idx", ".idx": ".bin"}.get(name.suffix, name.suffix))
        if other == name:
            raise NemoflowError(f"{name}: is neither .bin nor .idx, of which format megatron consists")
        if other not in names:
            raise NemoflowError(f"{name}: has no {other.name} beside it; Megatron's data is a .bin and an .idx")


def dump(entries: dict[str, Entry]) -> str:
    """The text of a lock file: sorted by name, a line per file and shard."""
    parts = []
    for key, entry in sorted(entries.items()):
        fields = [
            f'"asked": {json.dumps(entry.asked.model_dump(exclude_none=True), ensure_ascii=False)}',
            *(
                f'"{k}": {json.dumps(v)}'
                for k in ("commit", "config", "format")
                if (v := getattr(entry, k)) is not None
            ),
            f'"files": {_lines(entry.files)}',
            *([f'"plan": {_lines(entry.plan)}'] if entry.plan else []),
        ]
        parts.append(f"  {json.dumps(key)}: {{\n   " + ",\n   ".join(fields) + "\n  }")
    return f'{{\n "schema": {SCHEMA},\n "entries": {{\n' + ",\n".join(parts) + "\n }\n}\n"


def _lines(values: list) -> str:
    lines = (json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values)
    return "[\n    " + ",\n    ".join(lines) + "\n   ]"


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(lock: Path, name: str) -> Lock:
    try:
        return Lock.model_validate_json(lock.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][:1] == ("schema",):
            raise NemoflowError(f"{lock}: is of another version of nemoflow; run `nemoflow lock {name}`") from None
        where = "".join(f"{step}: " for step in first["loc"][:3])
        raise NemoflowError(
            f"{lock}: damaged: {where}{first['msg']}; restore it, or run `nemoflow lock {name}`"
        ) from None


class Locks:
    """What is pinned for a recipe: its own lock file, then those of the recipes it extends."""

    def __init__(self, name: str, directories: list[Path], store: Store):
        self.name, self._cache = name, StatCache(store)
        self._advice = f"run `nemoflow lock {name}`"
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for lock in map(lock_file, grammar.chain(name, directories)):
            if lock.exists():
                for key, entry in _read(lock, name).entries.items():
                    self._entries.setdefault(key, (lock, entry))

    def source(self, key: str, spec: grammar.Files, recipe: Path) -> LockedSource:
        """What is pinned of the source `key` ("sources.NAME"), of which `recipe` says `spec`.

        Raises NemoflowError when it is not locked, was locked as something else, or a local file changed since.
        """
        lock, entry = self._entry(key, spec, recipe)
        if entry.commit is None:
            paths, payload = self._unchanged(lock, entry), {}
        else:
            repo = hub.repository(spec.files)
            paths = []
            payload = {
                "hub": {"repo": repo, "config": entry.config, "split": entry.asked.split, "commit": entry.commit}
            }
        payload |= {"files": _files(entry), "format": entry.format}
        return LockedSource(payload, paths, entry.plan, entry.bytes, estimated_tokens(entry.bytes, entry.format))

    def tokenizer(self, spec: grammar.LocalTokenizer, recipe: Path) -> tuple[dict, list[str]]:
        """Settings of the pinned tokenizer's artifact, and the paths of its files here; none when it is on the hub.

        Raises NemoflowError as `source` does.
        """
        lock, entry = self._entry("tokenizer", spec, recipe)
        if entry.commit is None:
            return {"files": _files(entry)}, self._unchanged(lock, entry)
        return {"hub": {"repo": hub.repository(spec.files), "commit": entry.commit}, "files": _files(entry)}, []

    def model(self, spec: grammar.Import, recipe: Path) -> tuple[dict, list[str]]:
        """Settings of the source that is an import stage's model, and the paths of its files here; none on the hub.

        Raises NemoflowError as `source` does.
        """
        wanted = _files_of(spec)
        lock, entry = self._entry(f"models.{spec.name}", wanted, recipe)
        files = [{"path": Path(row[0]).name} | file for row, file in zip(entry.files, _files(entry), strict=True)]
        if entry.commit is None:
            return {"model": {}, "files": files}, self._unchanged(lock, entry)
        return {"model": {"repo": hub.repository(wanted.files), "commit": entry.commit}, "files": files}, []

    def _entry(self, key: str, spec: Any, recipe: Path) -> tuple[Path, Entry]:
        try:
            asked = _asked(spec)
        except NemoflowError as error:
            raise NemoflowError(f"{recipe}: {key}.{error}") from None
        if key not in self._entries:
            raise NotLocked(f"{recipe}: {key}: {asked.files!r} is not locked; {self._advice}")
        lock, entry = self._entries[key]
        for setting in Asked.model_fields:
            today, pinned = getattr(asked, setting), getattr(entry.asked, setting)
            if today != pinned:
                raise NemoflowError(f"{recipe}: {key}.{setting}: {today!r}, but {lock} pins {pinned!r}; {self._advice}")
        return lock, entry

    def _unchanged(self, lock: Path, entry: Entry) -> list[str]:
        """The paths of the entry's local files, none of which looks changed."""
        for path, size, digest, *_ in entry.files:
            file = Path(path)
            if not file.exists():
                continue  # only who must read it needs it: the job that does says so
            if file.stat().st_size != size or self._cache.digest(file, True) not in (None, digest.partition(":")[2]):
                raise NemoflowError(
                    f"{path}: changed since it was pinned in {lock}; restore it, or {self._advice} to train on what it "
                    "is now"
                )
        self._cache.save()
        return [row[0] for row in entry.files]


def _files(entry: Entry) -> list[dict]:
    """The files as payloads have them: size and digest, and for the hub the path there."""
    found = []
    for path, size, digest, *_ in entry.files:
        algorithm, _, value = digest.partition(":")
        found.append(({"path": path} if entry.commit else {}) | {"size": size, algorithm: value})
    return found
