"""Kind `source` made of local files that `nemoflow lock` has pinned: verified, then dealt out into shards."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.data.rows import Shards, dump
from nemoflow.errors import NemoflowError

_CHUNK = 1 << 20


def check_file(entry: dict, path: Path) -> None:
    """Verify a local file against its lock entry {"size", "sha256"}.

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
    except OSError as error:
        raise NemoflowError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if digest.hexdigest() != entry["sha256"]:
        raise NemoflowError(f"{path}: its content has changed since it was locked; {remedy}")


def _text_file(path: Path) -> Iterator[bytes]:
    """One document: the whole file."""
    try:
        yield dump({"text": path.read_text(encoding="utf-8")})
    except UnicodeDecodeError as error:
        raise NemoflowError(f"{path}: byte {error.start}: not UTF-8; convert the file") from None


def _parquet(path: Path, field: str) -> Iterator[bytes]:
    file = pq.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise NemoflowError(f"{path}: no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
    try:
        for batch in file.iter_batches(batch_size=1000, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield dump({_row_key(field): value})
    except TypeError:
        type_ = file.schema_arrow.field(field).type
        raise NemoflowError(f"{path}: column {field!r} holds {type_}, which is neither text nor chats") from None


def _json_lines(path: Path, format_: str, field: str) -> Iterator[bytes]:
    """The lines of a JSON Lines file. Whoever consumes the source judges them; only the field is renamed here."""
    compression = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}[format_]
    with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
        for line in file:
            if not line.strip():
                continue
            line = line.rstrip(b"\r\n") + b"\n"
            yield line if _row_key(field) == field else _renamed(line, field)


def _row_key(field: str) -> str:
    """What `field` is called in the source: readers of documents look for "text", of chats for "messages"."""
    return field if field == "messages" else "text"


def _renamed(line: bytes, field: str) -> bytes:
    try:
        row = json.loads(line.decode())
        return dump({**row, _row_key(field): row.pop(field)})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return line  # broken: for the consumer to count


def _lines(path: Path, format_: str, field: str) -> Iterator[bytes]:
    try:
        match format_:
            case "txt":
                yield from _text_file(path)
            case "parquet":
                yield from _parquet(path, field)
            case _:
                yield from _json_lines(path, format_, field)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise NemoflowError(f"{path}: is no readable {format_} file ({error})") from None


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write the shards of a source of local files, rows dealt out in turn in the order of the files.

    `payload` is {"files": [{"size", "sha256"}], "format", "field", "shards"}; inputs["files"] are the files in
    the same order. Returns {"documents", "bytes"}: rows, and bytes of the shard files.

    Raises NemoflowError for a missing or changed file, an unreadable one, and when all files are empty.
    """
    with Shards(out, payload["shards"]) as shards:
        for entry, path in zip(payload["files"], inputs["files"], strict=True):
            check_file(entry, path)
            for line in _lines(path, payload["format"], payload["field"]):
                shards.write(line)
            progress(f"{path.name}: {shards.rows:,} rows so far")
    if not shards.rows:
        names = ", ".join(map(str, inputs["files"]))
        raise NemoflowError(f"{names}: no rows here; the corpus is empty")
    return {"documents": shards.rows, "bytes": shards.bytes}
