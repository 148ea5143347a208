"""Rows of a source artifact: JSON Lines in shard-00000.jsonl, shard-00001.jsonl, ..., one JSON object a line.

Bad rows are counted by reason, with the place of the first; a share of them above `max_broken` stops the stage.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from nemoflow.errors import NemoflowError

SPLITS = ("train", "valid", "test")


def shard_name(number: int) -> str:
    """File name of the shard with this number: shard-00000.jsonl."""
    return f"shard-{number:05d}.jsonl"


def shards_of(source: Path) -> list[Path]:
    """The shard files of a source artifact, in order.

    Raises NemoflowError when there is none.
    """
    found = sorted(source.glob("shard-*.jsonl"))
    if not found:
        raise NemoflowError(f"{source}: no shard-*.jsonl here; the source is incomplete, make it again")
    return found


def dump(row: dict) -> bytes:
    """One line of a source: compact JSON in UTF-8, keys in the order given."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class Shards:
    """Writes rows into `count` shard files in turn: row i goes to shard i mod `count`, so shards are equal in rows."""

    def __init__(self, out: Path, count: int):
        self._files = [(out / shard_name(i)).open("wb") for i in range(count)]
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


def read(path: Path, broken: Broken) -> Iterator[tuple[str, bytes, dict]]:
    """Each usable row of one shard as (place, line, row); `place` is file:line. Blank lines are skipped.

    Lines that are not UTF-8, not JSON or not an object are counted in `broken`.

    Raises NemoflowError when the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError:
                    broken.add("not UTF-8", place)
                    continue
                except ValueError:
                    broken.add("not JSON", place)
                    continue
                except RecursionError:
                    broken.add("nested too deeply", place)
                    continue
                if isinstance(row, dict):
                    yield place, line, row
                else:
                    broken.add("not a JSON object", place)
    except OSError as error:
        raise NemoflowError(f"{path}: cannot be read ({error.strerror})") from None


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
