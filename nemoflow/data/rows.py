"""Rows of a source: read in any of its formats, counted when broken, split by content.

Bad rows are counted by reason, with the place of the first; a share of them above `max_broken` stops the stage.
"""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.data.sources import Source, Unit, file_name
from nemoflow.errors import NemoflowError

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


def read(source: Source, units: Iterable[Unit], broken: Broken) -> Iterator[tuple[int, int, dict]]:
    """Each usable row of some units as (file, row, object); `row` counts from 1, in lines or in Parquet rows.

    Blank lines are skipped; lines that are not UTF-8, not JSON or not an object are counted in `broken`.

    Raises NemoflowError naming file and row when a file cannot be read.
    """
    for unit in units:
        number = unit[0]
        at = 0
        try:
            match source.format:
                case "txt":
                    yield number, 1, {"text": source.path(number).read_text(encoding="utf-8")}
                case "parquet":
                    for at, row in _parquet(source.path(number), *unit[1:]):
                        yield number, at, row
                case _:
                    for at, line in enumerate(_lines(source.path(number), source.format), 1):
                        if not line.strip():
                            continue
                        try:
                            row = msgspec.json.decode(line)
                        except msgspec.DecodeError:
                            broken.add("not JSON", source.place(number, at))
                            continue
                        except UnicodeDecodeError:
                            broken.add("not UTF-8", source.place(number, at))
                            continue
                        except RecursionError:
                            broken.add("nested too deeply", source.place(number, at))
                            continue
                        if isinstance(row, dict):
                            yield number, at, row
                        else:
                            broken.add("not a JSON object", source.place(number, at))
        except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
            raise NemoflowError(
                f"{source.place(number, at + 1)}: cannot be read as {source.format} ({error}); repair the file, "
                "or leave it out and run `nemoflow lock`"
            ) from None


def _lines(path: Path, format_: str) -> Iterator[bytes]:
    compression = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}[format_]
    with io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20) as lines:
        yield from lines


def _parquet(path: Path, first: int = 0, end: int | None = None) -> Iterator[tuple[int, dict]]:
    with pq.ParquetFile(path) as file:
        end = file.metadata.num_row_groups if end is None else end
        at = sum(file.metadata.row_group(i).num_rows for i in range(first))
        for batch in file.iter_batches(batch_size=1000, row_groups=list(range(first, end))):
            for row in batch.to_pylist():
                at += 1
                yield at, row


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


class Split:
    """Assigns documents to train, valid and test by their content alone: equal documents are never on both sides.

    The first 64 bits of the SHA-256 of the content, read as a fraction of 2**64, lie below `valid`, else below
    `valid + test`, else above. `valid` and `test` are exact fractions such as "1/50".
    """

    def __init__(self, valid: str, test: str = "0"):
        self._valid = math.ceil(Fraction(valid) * 2**64)
        self._test = math.ceil((Fraction(valid) + Fraction(test)) * 2**64)

    def of(self, content: bytes) -> str:
        """The split of this content: "train", "valid" or "test"."""
        point = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        if point < self._valid:
            return "valid"
        return "test" if point < self._test else "train"
