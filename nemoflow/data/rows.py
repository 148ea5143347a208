"""Rows of a source: read in any of its formats, counted when broken.

Bad rows are counted by reason, with the place of the first; a share of them above `max_broken` stops the stage. A file
that cannot be read any further is an error at once.

`read` gives whole rows as objects, for chats and the like. `texts` gives batches of the text in one field, for corpora:
in bounded memory, and without a Python object for anything else in the row. Both take about a MB of whole lines at a
time, or as many rows of a row group.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from nemoflow.data.sources import Source, Unit, file_name
from nemoflow.errors import NemoflowError

if TYPE_CHECKING:  # it takes 0.2 s to import: only those who read Parquet or compressed files pay
    import pyarrow as pa
    import pyarrow.parquet as pq

_CHUNK = 1 << 20
"""Bytes of lines, or of text, taken at once: little enough for a processor's cache."""

_LONGEST = 1 << 30
"""Bytes of the longest line or text file. A longer one is damaged, most likely, and would not fit in memory."""

_ROWS = 8192
"""Most rows of a Parquet file taken at once, however short they are."""

SPLITS = ("train", "valid", "test")


def dump(row: dict) -> bytes:
    """One line of a source: compact JSON in UTF-8, keys in the order given."""
    return msgspec.json.encode(row) + b"\n"


class Shards:
    """Writes rows into `count` files of a source in turn: row i goes to file i mod `count`, so all have as many."""

    def __init__(self, out: Path, count: int):
        (out / "files").mkdir()
        self._files = [(out / file_name(i, "jsonl")).open("wb") for i in range(count)]
        self.rows = 0
        self.bytes = 0

    def write(self, line: bytes) -> None:
        """Append one line, which ends in a newline."""
        self._files[self.rows % len(self._files)].write(line)
        self.rows += 1
        self.bytes += len(line)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


class Broken:
    """Rows that cannot be used: how many by reason, and where the first one is."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}
        self.first = ""

    def add(self, reason: str, place: str) -> None:
        """Count one row; `place` is file:line."""
        self.first = self.first or f"{place}: {reason}"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    @property
    def count(self) -> int:
        """Rows counted so far."""
        return sum(self.reasons.values())

    def measures(self) -> dict[str, int]:
        """Counts by reason, in alphabetical order."""
        return dict(sorted(self.reasons.items()))

    def check(self, rows: int, max_broken: str) -> None:
        """Raise NemoflowError when more than the share `max_broken` (an exact fraction) of `rows` is broken."""
        if self.count > Fraction(max_broken) * rows:
            raise NemoflowError(
                f"{self.first} (the first of {self.count} broken rows in {rows}; max_broken allows {max_broken}). "
                "Repair the data, or raise max_broken to leave such rows out"
            )


class Texts(NamedTuple):
    """Some rows of a file, in order: the text of the usable ones, and why the others have none.

    file: number of the file in its source. rows: of each text, counted from 1. texts: in UTF-8, none empty. dropped:
    (row, reason) of the others.
    """

    file: int
    rows: Sequence[int]
    texts: list[bytes]
    dropped: list[tuple[int, str]]


class _Bad(str):
    """Stands for a row that is no object: the reason."""


def read(source: Source, units: Iterable[Unit], broken: Broken) -> Iterator[tuple[int, int, dict]]:
    """Each usable row of some units as (file, row, object); `row` counts from 1, in lines or in Parquet rows.

    Blank lines are skipped; lines that are not UTF-8, not JSON or not an object are counted in `broken`.

    Raises NemoflowError naming file and row when a file cannot be read.
    """
    decoder = msgspec.json.Decoder()
    if source.format == "megatron":
        raise NemoflowError(f"{source.origin(0)}: holds the ids of a tokenizer and no text; only blends read it")
    for unit in units:
        number, at = unit[0], 0
        try:
            match source.format:
                case "txt":
                    text = _text_file(source.path(number))
                    if isinstance(text, _Bad):
                        broken.add(text, source.place(number, 1))
                    else:
                        yield number, 1, {"text": text}
                case "parquet":
                    for at, row in _parquet_rows(source, *unit):
                        yield number, at, row
                case _:
                    for first, ends, chunk in _chunks(source, number):
                        for at, row in zip(*_objects(first, ends, chunk, decoder), strict=True):
                            if isinstance(row, dict):
                                yield number, at, row
                            else:
                                reason = row if isinstance(row, _Bad) else "not a JSON object"
                                broken.add(reason, source.place(number, at))
        except _damage() as error:
            raise _unreadable(source, number, at, error) from None


def texts(source: Source, units: Iterable[Unit], field: str) -> Iterator[Texts]:
    """The texts in `field` of all rows of some units, in batches of about _CHUNK bytes or one longer text.

    A row is dropped for the reasons of `read` and of `text_of`.

    Raises NemoflowError naming file and row when a file cannot be read, or is Parquet without such a column of text.
    """
    row_type = msgspec.defstruct("Row", [("text", Any, None)], rename={"text": field}, gc=False)
    decoder = msgspec.json.Decoder(row_type)
    if source.format == "megatron":
        raise NemoflowError(f"{source.origin(0)}: holds the ids of a tokenizer and no text; only blends read it")
    for unit in units:
        number, at = unit[0], 0
        try:
            match source.format:
                case "txt":
                    yield _usable(number, [1], [_text_file(source.path(number))], field)
                case "parquet":
                    for first, values in _parquet_texts(source, field, *unit):
                        yield _usable_bytes(number, first, values, field)
                        at = first + len(values) - 1
                case _:
                    for first, ends, chunk in _chunks(source, number):
                        rows, found = _objects(first, ends, chunk, decoder)
                        try:
                            values = [row.text for row in found]
                        except AttributeError:
                            values = [_value(row, field) for row in found]
                        yield _usable(number, rows, values, field)
                        at = first + len(ends) - 1
        except _damage() as error:
            raise _unreadable(source, number, at, error) from None


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; pyarrow's errors only where pyarrow is in use."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, EOFError) if arrow is None else (OSError, EOFError, arrow.ArrowException)


def _unreadable(source: Source, number: int, at: int, error: Exception) -> NemoflowError:
    return NemoflowError(
        f"{source.place(number, at + 1)}: cannot be read as {source.format} ({error}); repair the file, "
        "or leave it out and run `nemoflow lock`"
    )


def _text_file(path: Path) -> str:
    """A file that is one text."""
    if (size := path.stat().st_size) > _LONGEST:
        raise EOFError(f"{size:,} bytes in one text, of which {_LONGEST:,} are allowed")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return _Bad("not UTF-8")


def _chunks(source: Source, number: int) -> Iterator[tuple[int, np.ndarray, memoryview]]:
    """A file's lines some at a time: the number of the first, from 1, where each ends, and the lines as they are.

    The lines are good until the next are asked for: all are read into the same memory.
    """
    at, held, content = 1, 0, np.empty(_CHUNK, np.uint8)
    with _open(source.path(number), source.format) as file:
        while True:
            if held == len(content):
                if held >= _LONGEST:
                    raise EOFError(f"a line of more than {_LONGEST:,} bytes")
                content = np.append(content, np.empty_like(content))
            got = file.readinto(memoryview(content)[held:])
            found = np.flatnonzero(content[held : held + got] == ord("\n")) + held
            held += got
            if not got and held:
                found = np.append(found, held)  # the last line has no end
            if len(found):
                yield at, found, memoryview(content)[: found[-1] + 1][:held]
                at += len(found)
                rest = content[found[-1] + 1 : held].copy()
                content[: len(rest)], held = rest, len(rest)
            if not got:
                return


def _pyarrow() -> ModuleType:
    import pyarrow as pa

    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())  # gives back what it does not need; the default keeps 100 MB
    return pa


def _open(path: Path, format_: str) -> Any:
    """A file of lines, unpacked, to be read by `readinto`."""
    if format_ == "jsonl":
        return path.open("rb", 0)
    pa = _pyarrow()
    return pa.input_stream(str(path), compression={"jsonl.gz": "gzip", "jsonl.zst": "zstd"}[format_])


def _objects(first: int, ends: np.ndarray, chunk: bytes, decoder: msgspec.json.Decoder) -> tuple[Sequence[int], list]:
    """The lines that are not blank: their numbers, and what the decoder makes of each, or _Bad."""
    try:
        found = decoder.decode_lines(chunk)  # takes several objects in a line, and one in several lines, too
        if len(found) == len(ends) and _in_braces(np.frombuffer(chunk, np.uint8), ends):
            return range(first, first + len(found)), found
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    rows = [(row, line) for row, line in enumerate(bytes(chunk).split(b"\n"), first) if line.strip()]
    return [row for row, _ in rows], [_object(line, decoder) for _, line in rows]


def _in_braces(chunk: np.ndarray, ends: np.ndarray) -> bool:
    """Whether all lines begin with { and end with }. Where } is followed by {, an object ends and another begins: so
    there is at least one in each line, and when there are as many as lines, exactly one."""
    last = chunk[ends - 1]
    last = np.where(last == ord("\r"), chunk[ends - 2], last)
    return bool((chunk[np.append(0, ends[:-1] + 1)] == ord("{")).all() and (last == ord("}")).all())


def _object(line: bytes, decoder: msgspec.json.Decoder) -> Any:
    """What is in one line. Python's own decoder has the last word: it takes NaN, and half of a surrogate pair."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return _Bad("not UTF-8")
    except RecursionError:
        return _Bad("nested too deeply")
    except ValueError:
        return _Bad("not JSON")
    return found if isinstance(found, dict) else _Bad("not a JSON object")


def _value(row: Any, field: str) -> Any:
    if isinstance(row, _Bad):
        return row
    return row.get(field) if isinstance(row, dict) else row.text


def _usable(number: int, rows: Sequence[int], values: list, field: str) -> Texts:
    try:
        found = [value.encode() for value in values]
        if all(found) and _Bad not in map(type, values):
            return Texts(number, rows, found, [])
    except (AttributeError, UnicodeEncodeError):
        pass
    kept, found, dropped = [], [], []
    for row, value in zip(rows, values, strict=True):
        try:
            if isinstance(value, _Bad):
                raise ValueError(value)
            found.append(text_of({field: value}, field).encode())
            kept.append(row)
        except ValueError as error:
            dropped.append((row, str(error)))
    return Texts(number, kept, found, dropped)


def _usable_bytes(number: int, first: int, values: list[bytes | None], field: str) -> Texts:
    """The same for values that are UTF-8 already, or None, or not UTF-8 after all (then _Bad)."""
    rows = range(first, first + len(values))
    if all(values) and _Bad not in map(type, values):
        return Texts(number, rows, values, [])
    kept, found, dropped = [], [], []
    for row, value in zip(rows, values, strict=True):
        if value and not isinstance(value, _Bad):
            kept.append(row)
            found.append(value)
        else:
            dropped.append((row, value or (f"no {field!r}" if value is None else f"{field!r} is empty")))
    return Texts(number, kept, found, dropped)


def _row_groups(
    source: Source, number: int, first: int = 0, end: int | None = None
) -> Iterator[tuple["pq.ParquetFile", int, int]]:
    """Row groups of a file: the open file, the row group's number, and that of its first row, from 1."""
    _pyarrow()
    import pyarrow.parquet as pq

    # Parts of a column are read as they are wanted; by default it would be a row group, which may be gigabytes.
    with pq.ParquetFile(source.path(number), buffer_size=_CHUNK, pre_buffer=False) as file:
        count = file.metadata.num_row_groups
        if end is not None and end > count:
            raise NemoflowError(
                f"{source.origin(number)}: has {count} row groups, planned with {end} or more; put the locked file "
                "back, or pin what is there now with `nemoflow lock RECIPE`"
            )
        at = 1 + sum(file.metadata.row_group(i).num_rows for i in range(first))
        for group in range(first, count if end is None else end):
            yield file, group, at
            at += file.metadata.row_group(group).num_rows


def _batches(
    file: "pq.ParquetFile", group: int, size: int, columns: list[str] | None = None
) -> Iterator["pa.RecordBatch"]:
    """Batches of a row group of `size` bytes, as many rows as give about _CHUNK bytes."""
    rows = max(1, min(_ROWS, _CHUNK * file.metadata.row_group(group).num_rows // max(size, 1)))
    return file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _parquet_rows(source: Source, number: int, *groups: int) -> Iterator[tuple[int, dict]]:
    for file, group, at in _row_groups(source, number, *groups):
        for batch in _batches(file, group, file.metadata.row_group(group).total_byte_size):
            for row in batch.to_pylist():
                yield at, row
                at += 1


def _parquet_texts(source: Source, field: str, number: int, *groups: int) -> Iterator[tuple[int, list[bytes | None]]]:
    """Row number of the first, and the values of a column of text."""
    for file, group, at in _row_groups(source, number, *groups):
        names = file.schema_arrow.names
        if field not in names:
            raise NemoflowError(
                f"{source.origin(number)}: no column {field!r}; it has {', '.join(names)}; set the source's text_field"
            )
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(i) for i in range(metadata.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
        for batch in _batches(file, group, size, [field]):
            for values in _values(source, number, batch.column(0), field):
                yield at, values
                at += len(values)


def _values(source: Source, number: int, column: "pa.Array", field: str) -> Iterator[list[bytes | None]]:
    """The values of a column as bytes, about _CHUNK bytes at a time."""
    import pyarrow as pa

    text = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(is_text(text) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise NemoflowError(
            f"{source.origin(number)}: column {field!r} holds {column.type}, which is not text; set the source's "
            "text_field"
        )
    column = column.cast(pa.large_string())
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    content = memoryview(data or b"")
    missing = set(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()) if column.null_count else ()
    try:
        column.validate(full=True)
        valid = True
    except pa.ArrowInvalid:
        valid = False
    begin = 0
    while begin < len(column):
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + _CHUNK, "right")) - 1)
        part = bytes(content[offsets[begin] : offsets[end]])
        cuts = (offsets[begin : end + 1] - offsets[begin]).tolist()
        values: list[bytes | None] = [part[a:b] for a, b in pairwise(cuts)]
        if not valid:
            values = [_decodable(value) for value in values]
        for i in range(begin, end) if missing else ():
            if i in missing:
                values[i - begin] = None
        yield values
        begin = end


def _decodable(value: bytes) -> bytes | _Bad:
    try:
        value.decode()
    except UnicodeDecodeError:
        return _Bad("not UTF-8")
    return value


def text_of(row: dict, field: str) -> str:
    """The non-empty text in `row[field]`.

    Raises ValueError with the reason when it is missing, empty, not a string or not valid Unicode.
    """
    text = row.get(field)
    if text is None:
        raise ValueError(f"no {field!r}")
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is not a string")
    if not text:
        raise ValueError(f"{field!r} is empty")
    return encodable(text, field)


def encodable(text: str, field: str) -> str:
    """`text` itself.

    Raises ValueError when it has a lone surrogate, which JSON can spell (as in "\\ud800") and UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field!r} has a lone surrogate") from None
    return text
