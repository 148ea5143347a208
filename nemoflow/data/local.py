"""Kind `source` made of local files that `nemoflow lock` has pinned: verified, then linked to."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from nemoflow.data.made import Made
from nemoflow.data.sources import file_name
from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, in_threads

_CHUNK = 1 << 20


def check_file(entry: dict, path: Path, count: Callable[[int], None] = lambda _: None) -> None:
    """Verify a local file against its lock entry {"size", "sha256"}; `count` is told of the bytes read.

    Raises NemoflowError naming file and way out when it is missing, unreadable or has changed.
    """
    remedy = "put the locked file back, or pin what is there now with `nemoflow lock RECIPE`"
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise NemoflowError(f"{path}: has {size:,} bytes, locked with {entry['size']:,}; {remedy}")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                count(len(chunk))
    except OSError as error:
        raise NemoflowError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if digest.hexdigest() != entry["sha256"]:
        raise NemoflowError(f"{path}: its content has changed since it was locked; {remedy}")


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], threads: int = 1) -> Made:
    """Link files/00000.FORMAT ... to local files, by absolute paths, after verifying each.

    `payload` is {"files": [{"size", "sha256"}], "format"}; inputs["files"] are the files in the same order. `threads`
    files are read at a time. Returns the measures {"files", "bytes"} and the contents.

    Raises NemoflowError for a missing, unreadable or changed file, and when all are empty.
    """
    entries = payload["files"]
    if not any(entry["size"] for entry in entries):
        raise NemoflowError(f"{inputs['files'][0]}: no byte here nor in the source's other files; the corpus is empty")
    meter = Progress(progress, len(entries), sum(entry["size"] for entry in entries))
    (out / "files").mkdir()

    def link(number: int, entry: dict, path: Path) -> dict:
        check_file(entry, path, meter.add)
        name = file_name(number, payload["format"])
        if payload["format"] == "megatron":
            name = str(Path(file_name(number // 2, "megatron")).with_suffix((".bin", ".idx")[number % 2]))
        (out / name).symlink_to(path.absolute())
        meter.add(files=1)
        return {"name": name, **entry}

    work = list(zip(range(len(entries)), entries, inputs["files"], strict=True))
    contents = in_threads(link, work, threads, meter)
    return Made({"files": len(contents), "bytes": sum(entry["size"] for entry in contents)}, contents)
