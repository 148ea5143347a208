"""Digests of a trained state's files, for who wants to check it later: digests.json beside sealed.json.

Checkpoints are terabytes, so training only records names and sizes. This reads every file once, several at a time, on
a machine without a GPU. Nothing consumes the digests: an artifact is finished without them.
"""

from collections.abc import Callable
from pathlib import Path

from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, in_threads
from nemoflow.store import contents_of, dump, file_digest, read_json, write_atomically

SCHEMA = 1
"""Version of digests.json's form."""


def make(directory: Path, say: Callable[[str], None], threads: int = 1) -> Path:
    """Write digests.json into a state's directory, at-<N>; returns its path.

    {"schema", "sealed": sha256 of sealed.json, "files": [{"name", "size" in bytes, "sha256"}]}

    Raises NemoflowError for a state that is not finished, and for a file that is missing or has another size.
    """
    sealed = directory / "sealed.json"
    if not sealed.exists():
        raise NemoflowError(f"{directory}: is not finished (no sealed.json); there is nothing to make digests of")
    contents = contents_of(directory, read_json(sealed))
    meter = Progress(say, len(contents), sum(entry["size"] for entry in contents))

    def digest(entry: dict) -> dict:
        path = directory / entry["name"]
        size = path.stat().st_size if path.exists() else None
        if size != entry["size"]:
            there = "is missing" if size is None else f"has {size} bytes"
            raise NemoflowError(f"{path}: {there}, sealed with {entry['size']}; restore it, or choose another state")
        found = {"name": entry["name"], "size": size, "sha256": file_digest(path)}
        meter.add(size, files=1)
        return found

    files = in_threads(digest, [(entry,) for entry in contents], threads, meter)
    target = directory / "digests.json"
    write_atomically(target, dump({"schema": SCHEMA, "sealed": file_digest(sealed), "files": files}))
    return target
