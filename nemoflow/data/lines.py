"""Rows of RL and preference data as JSON, line by line, and which of them are held out.

Rows of JSON Lines are given byte for byte. A row of a Parquet file becomes JSON: a struct an object, a list an array,
NaN null. Fields and columns that are null are left out: Arrow fills in what a row did not have, and readers take a null
for a value. Types that JSON has not, times and bytes say, are refused.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import Source
from nemoflow.errors import NemoflowError


def lines(source: Source, broken: Broken, columns: set[str] | None = None) -> Iterator[tuple[str, bytes, dict]]:
    """Each row of a source as (place, its JSON without the line's end, object).

    columns: of a Parquet file, the only ones that are wanted. Lines that are no JSON object are counted in `broken`.

    Raises NemoflowError naming file and row when a file cannot be read, or has values that JSON has not.
    """
    if source.format in ("parquet", "txt", "megatron"):
        _check_columns(source, columns)
        for number, at, row in read(source, source.units(), broken):
            row = without_nulls(row if columns is None else {k: v for k, v in row.items() if k in columns})
            yield source.place(number, at), msgspec.json.encode(row), row
        return
    for number in range(source.count):
        at = 0
        try:
            with _open(source.path(number), source.format) as file:
                for at, line in enumerate(file, 1):
                    line = line.rstrip(b"\r\n")
                    if not line.strip():
                        continue
                    place = source.place(number, at)
                    try:
                        row = msgspec.json.decode(line)
                    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                        broken.add("not JSON", place)
                        continue
                    if isinstance(row, dict):
                        yield place, line, row
                    else:
                        broken.add("not a JSON object", place)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise NemoflowError(
                f"{source.place(number, at + 1)}: cannot be read as {source.format} ({error}); repair the file, or "
                "leave it out and run `nemoflow lock`"
            ) from None


def _open(path: Path, format_: str) -> io.BufferedReader:
    compression = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}[format_]
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _check_columns(source: Source, columns: set[str] | None) -> None:
    """Raise NemoflowError when a Parquet file has values that JSON has not."""
    for number in range(source.count if source.format == "parquet" else 0):
        try:
            schema = pq.read_schema(source.path(number))
        except (OSError, pa.ArrowException) as error:
            raise NemoflowError(
                f"{source.origin(number)}: cannot be read as parquet ({error}); repair the file"
            ) from None
        for column in schema:
            wanted = columns is None or column.name in columns
            if wanted and (found := _not_json(column.type)) is not None:
                raise NemoflowError(
                    f"{source.origin(number)}: column {column.name!r} has values of type {found}, which JSON has not; "
                    "write them as text, or leave the column out"
                )


def _not_json(type_: pa.DataType) -> pa.DataType | None:
    """The first type within `type_` that has no form of its own in JSON; None when all have."""
    if pa.types.is_struct(type_):
        return next((found for field in type_ if (found := _not_json(field.type)) is not None), None)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_dictionary(type_):
        return _not_json(type_.value_type)
    plain = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
    )
    return None if any(is_(type_) for is_ in plain) else type_


def without_nulls(value: Any) -> Any:
    """`value` without the null fields of its objects; a list keeps its nulls, whose places mean something."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def smallest(hashes: np.ndarray, share: str) -> np.ndarray:
    """What is held out: the smallest ones among some 64-bit hashes, the exact fraction `share` of the distinct ones.

    Their number is rounded up and leaves at least one, so with two distinct hashes and a share above 0 there is one.
    """
    distinct = np.unique(hashes)
    wanted = Fraction(share) * len(distinct)
    return distinct[: max(0, min(-(-wanted.numerator // wanted.denominator), len(distinct) - 1))]
