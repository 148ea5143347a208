"""Kind `source` that is a model: the files of a Hugging Face checkpoint under their own names, downloaded or linked.

A file stands under its name only when it is whole and its digest is right, so an interrupted attempt is gone on with.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from nemoflow import hub
from nemoflow.data.local import check_file
from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, human, in_threads
from nemoflow.store import file_digest


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], threads: int = 4) -> Made:
    """Put the model's files into `out`, `threads` at a time.

    payload     {"model": {"repo", "commit"}, or {} for local files,
                "files": [{"path", "size", "sha256" or "git_sha1"}]}
    inputs      {"files": local files in the same order}, for local ones

    Returns the measures {"files", "bytes", "license" where the model's card names one} and the contents.

    Raises NemoflowError for a file that is missing or other than it was pinned, and for a disk too small.
    """
    entries, model = payload["files"], payload["model"]
    meter = Progress(progress, len(entries), sum(entry["size"] for entry in entries))
    missing = sum(entry["size"] for entry in entries if not (out / entry["path"]).exists()) if model else 0
    if missing > (free := shutil.disk_usage(out).free):
        raise NemoflowError(f"{out}: {human(missing)} are still to come and {human(free)} are free; make room")

    def place(number: int, entry: dict) -> dict:
        target = out / entry["path"]
        if not model:
            check_file(entry, inputs["files"][number], meter.add)
            target.unlink(missing_ok=True)
            target.symlink_to(inputs["files"][number].absolute())
            sha256 = entry["sha256"]
        elif target.exists():
            meter.add(entry["size"], kept=True)
            sha256 = entry.get("sha256") or file_digest(target)
        else:
            sha256 = hub.download(model["repo"], model["commit"], entry, target, meter.add, kind="model")
        meter.add(files=1)
        return {"name": entry["path"], "size": entry["size"], "sha256": sha256}

    contents = in_threads(place, list(enumerate(entries)), threads, meter)
    license_ = hub.license_of(model["repo"], model["commit"], "model") if model else None
    measures = {"files": len(contents), "bytes": sum(entry["size"] for entry in contents)}
    return Made(measures | ({"license": license_} if license_ else {}), contents)
