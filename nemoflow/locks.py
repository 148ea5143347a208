"""Lock files: what a recipe's local sources and tokenizer were when they were pinned.

`nemoflow lock RECIPE` writes RECIPE.lock.json beside the recipe, to be committed. Building the graph then needs no
bulk hashing: sizes are compared, and only a file whose time stamp changed since it was last hashed is hashed again.
"""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from nemoflow import recipe as grammar
from nemoflow.errors import NemoflowError
from nemoflow.store import Store, dump, file_digest, read_json, write_atomically


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
            write_atomically(self.path, dump(self._known))


class Pinned(BaseModel):
    """A file as it was when it was pinned; size in bytes."""

    path: str
    size: int
    sha256: str


class Entry(BaseModel):
    """What a pattern of a recipe matched."""

    pattern: str
    files: list[Pinned]


class Lock(BaseModel):
    """A lock file: "sources.NAME" or "tokenizer" -> what it was."""

    version: Literal[1] = Field(1, alias="schema")
    entries: dict[str, Entry]


def lock_file(recipe: Path) -> Path:
    """The lock file of a recipe's file."""
    return recipe.with_name(f"{recipe.stem}.lock.json")


def _wanted(spec: grammar.Recipe) -> dict[str, str]:
    """What a recipe needs locked: "sources.NAME" or "tokenizer" -> path or glob."""
    wanted = {f"sources.{n}": s.files for n, s in spec.sources.items() if isinstance(s, grammar.Files)}
    if isinstance(spec.tokenizer, grammar.LocalTokenizer):
        wanted["tokenizer"] = spec.tokenizer.files
    return wanted


def write(name: str, directories: list[Path], store: Store, show: Callable[[str], None]) -> Path | None:
    """Pin what recipe `name` reads from this machine; returns the lock file, None when nothing needs one.

    Raises NemoflowError for a pattern that matches nothing. The lock is written whole or not at all.
    """
    file, spec = grammar.load(name, directories)
    wanted = _wanted(spec)
    if not wanted:
        return None
    cache, entries = StatCache(store), dict[str, Entry]()
    for key, pattern in wanted.items():
        root = Path(pattern)
        # glob.glob and not Path.glob: the pattern may be absolute
        paths = [str(p) for p in root.iterdir()] if root.is_dir() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        paths = sorted(p for p in paths if Path(p).is_file())
        if not paths:
            raise NemoflowError(f"{file}: {key}: no file matches {pattern!r} (from {Path.cwd()})")
        pinned = []
        for number, path in enumerate(paths, 1):
            show(f"{key}: {number}/{len(paths)} {path}")
            pinned.append(Pinned(path=path, size=Path(path).stat().st_size, sha256=cache.digest(Path(path))))
        entries[key] = Entry(files=pinned, pattern=pattern)
    cache.save()
    write_atomically(lock_file(file), dump(Lock(entries=entries).model_dump(by_alias=True)))
    return lock_file(file)


class Locks:
    """What is pinned for a recipe: its own lock file, then those of the recipes it extends."""

    def __init__(self, name: str, directories: list[Path], store: Store):
        self.name, self._cache = name, StatCache(store)
        self.paths: dict[str, list[str]] = {}
        """Entry -> today's paths of its files: where, not what; outside every identity."""
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for lock in map(lock_file, grammar.chain(name, directories)):
            if lock.exists():
                for key, entry in self._read(lock).entries.items():
                    self._entries.setdefault(key, (lock, entry))

    def _read(self, lock: Path) -> Lock:
        try:
            return Lock.model_validate_json(lock.read_bytes())
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise NemoflowError(f"{lock}: damaged: {reason}; restore it, or run `nemoflow lock {self.name}`") from None

    def files(self, key: str, pattern: str, recipe: Path) -> list[dict]:
        """Size and digest of each pinned file, in order.

        Raises NemoflowError when `key` is not locked, was locked for another pattern, or a file changed since.
        """
        advice = f"run `nemoflow lock {self.name}`"
        if key not in self._entries:
            raise NemoflowError(f"{recipe}: {key}: {pattern!r} is not locked; {advice}")
        lock, entry = self._entries[key]
        if entry.pattern != pattern:
            raise NemoflowError(f"{recipe}: {key}: {pattern!r}, but {lock} pins {entry.pattern!r}; {advice}")
        for pinned in entry.files:
            path = Path(pinned.path)
            if not path.exists():
                continue  # only who must read it needs it: the job that does says so
            if path.stat().st_size != pinned.size or self._cache.digest(path, True) not in (None, pinned.sha256):
                raise NemoflowError(
                    f"{path}: changed since it was pinned in {lock}; restore it, or {advice} to train on what it is now"
                )
        self._cache.save()
        self.paths[key] = [pinned.path for pinned in entry.files]
        return [{"size": pinned.size, "sha256": pinned.sha256} for pinned in entry.files]
