"""Kind `source`: numbered files of one format, and how the programs that consume them see them.

    files/00000.parquet, files/00001.parquet, ...    as downloaded, as generated, or links to local files

Or a model's files under their own names, which import stages read (model.py).

A *unit* is what is read at once: a whole file `(file,)`, or row groups of a Parquet file `(file, first, end)`, `end`
excluded. Readers name a row by its origin: the path or address it came from, not the store's numbered file.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError

RESUMES = True  # a download does; the others begin anew

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "megatron")
"""Formats of raw files. Of `megatron`, text that others tokenized, each file is a .bin with the .idx beside it."""

Unit = tuple[int] | tuple[int, int, int]


def file_name(number: int, format_: str) -> str:
    """Name of a source's file within its artifact: files/00000.jsonl."""
    return f"files/{number:05d}.{'bin' if format_ == 'megatron' else format_}"


@dataclass(frozen=True)
class Source:
    """A finished source artifact.

    directory: of the artifact. payload: what defines it. count: its files. format: of every file, one of FORMATS.
    """

    directory: Path
    payload: dict
    count: int
    format: str

    def path(self, number: int) -> Path:
        """File `number` in the store."""
        return self.directory / file_name(number, self.format)

    def origin(self, number: int) -> str:
        """Where file `number` came from, as people know it: a local path, hf://datasets/..., or the generated file."""
        if "hub" in self.payload:
            hub = self.payload["hub"]
            return f"hf://datasets/{hub['repo']}@{hub['commit'][:12]}/{self.payload['files'][number]['path']}"
        path = self.path(number)
        return str(path.readlink()) if path.is_symlink() else str(path)

    def place(self, number: int, row: int) -> str:
        """Where a row is, for messages: origin:line, or for Parquet origin: row N. Both count from 1."""
        return f"{self.origin(number)}: row {row}" if self.format == "parquet" else f"{self.origin(number)}:{row}"

    def units(self) -> list[Unit]:
        """Every file as a unit."""
        return [(number,) for number in range(self.count)]


def open_source(directory: Path) -> Source:
    """The source in a finished artifact's directory.

    Raises NemoflowError when it is not finished or cannot be read.
    """
    try:
        payload = json.loads((directory / "sealed.json").read_text(encoding="utf-8"))["payload"]
    except (OSError, ValueError, KeyError) as error:
        raise NemoflowError(f"{directory}/sealed.json: cannot be read ({error}); the source is incomplete") from None
    if "generator" in payload:
        return Source(directory, payload, payload["shards"], "jsonl")
    return Source(directory, payload, len(readable(payload["files"], payload["format"])), payload["format"])


def readable(files: list, format_: str) -> list:
    """Of a source's files those that are read as such: all, but of Megatron's pairs the .bin, which come first."""
    return files[::2] if format_ == "megatron" else files


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], threads: int) -> dict | Made:
    """Download, link or generate the source's files: see the modules download, local and generate."""
    from nemoflow.data import download, generate, local, model  # each of these brings what only it needs

    if "model" in payload:
        return model.make(payload, inputs, out, progress, threads=threads)
    if "hub" in payload:
        return download.make(payload, inputs, out, progress, threads=threads)
    _empty(out)
    try:
        if "files" in payload:
            return local.make(payload, inputs, out, progress, threads=threads)
        return generate.make(payload, out, progress)
    except BaseException:
        _empty(out)  # it may be what filled the disk
        raise


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
