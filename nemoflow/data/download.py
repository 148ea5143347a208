"""Kind `source` from the hub: the files `nemoflow lock` has pinned, fetched, verified, and kept between attempts.

A file stands under its own name only when it is whole and its digest is right, so what an interrupted attempt left
under these names is not read again; what it left half done is gone on with.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from nemoflow import hub
from nemoflow.data.made import Made
from nemoflow.data.sources import file_name
from nemoflow.errors import NemoflowError
from nemoflow.progress import Progress, human, in_threads
from nemoflow.store import file_digest

RESUMES = True


def make(payload: dict, _: dict, out: Path, progress: Callable[[str], None], threads: int = 4) -> Made:
    """Download files/00000.FORMAT ..., `threads` at a time, in the order of the payload.

    `payload` is {"hub": {"repo", "config", "split", "commit"}, "files": [{"path", "size", "sha256" or "git_sha1"}],
    "format"}. `out` may hold what earlier attempts got. Returns the measures {"files", "bytes", "license" where the
    dataset's card names one} and the contents.

    Raises NemoflowError when the hub does not give a file, or gives other bytes than were pinned, and when the disk is
    too small for what is missing.
    """
    entries, directory = payload["files"], out / "files"
    targets = [out / file_name(number, payload["format"]) for number in range(len(entries))]
    directory.mkdir(exist_ok=True)
    known = {path.name for target in targets for path in (target, hub.part(target))}
    for path in directory.iterdir():
        if path.name not in known:
            path.unlink()
    _check_space(entries, targets)
    meter = Progress(progress, len(entries), sum(entry["size"] for entry in entries))

    def fetch_file(entry: dict, target: Path) -> dict:
        if target.exists():
            meter.add(entry["size"], kept=True)
            sha256 = entry.get("sha256") or file_digest(target)
        else:
            sha256 = hub.download(payload["hub"]["repo"], payload["hub"]["commit"], entry, target, meter.add)
        meter.add(files=1)
        return {"name": f"files/{target.name}", "size": entry["size"], "sha256": sha256}

    contents = in_threads(fetch_file, list(zip(entries, targets, strict=True)), threads, meter)
    license_ = hub.license_of(payload["hub"]["repo"], payload["hub"]["commit"])
    measures = {"files": len(contents), "bytes": sum(entry["size"] for entry in contents)}
    return Made(measures | ({"license": license_} if license_ else {}), contents)


def _check_space(entries: list[dict], targets: list[Path]) -> None:
    """Refuse to begin what cannot end."""
    missing = 0
    for entry, target in zip(entries, targets, strict=True):
        if not target.exists():
            begun = hub.part(target)
            missing += entry["size"] - (begun.stat().st_size if begun.exists() else 0)
    free = shutil.disk_usage(targets[0].parent).free
    if missing > free:
        raise NemoflowError(
            f"{targets[0].parent}: {human(missing)} are still to come and {human(free)} are free; make room, or keep "
            "the store on a larger disk"
        )


def fetch(payload: dict, out: Path, progress: Callable[[str], None]) -> None:
    """Download a tokenizer's files into `out`, under their own names.

    `payload` is {"hub": {"repo", "commit"}, "files": [{"path", "size", "sha256" or "git_sha1"}]}.

    Raises NemoflowError as `make` does.
    """
    meter = Progress(progress, len(payload["files"]), sum(entry["size"] for entry in payload["files"]))
    for entry in payload["files"]:
        repo, commit = payload["hub"]["repo"], payload["hub"]["commit"]
        hub.download(repo, commit, entry, out / entry["path"], meter.add, kind="model")
        meter.add(files=1)
