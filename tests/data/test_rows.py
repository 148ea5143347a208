import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoflow.data import rows
from nemoflow.data.rows import Broken, encodable, read, texts
from nemoflow.data.sources import Source, open_source
from nemoflow.errors import NemoflowError


def source_of(directory: Path, format_: str, *files: bytes) -> Source:
    (directory / "files").mkdir(parents=True)
    for number, content in enumerate(files):
        (directory / f"files/{number:05d}.{format_}").write_bytes(content)
    payload = {"kind": "source", "files": [{"size": len(content)} for content in files], "format": format_}
    (directory / "sealed.json").write_text(json.dumps({"payload": payload}))
    return open_source(directory)


def packed(content: bytes, format_: str) -> bytes:
    if format_ == "jsonl.zst":
        return pa.compress(content, codec="zstd", asbytes=True)
    return gzip.compress(content) if format_ == "jsonl.gz" else content


def parquet(directory: Path, table: pa.Table, **options) -> bytes:
    pq.write_table(table, directory / "table.parquet", **options)
    return (directory / "table.parquet").read_bytes()


def flat(source: Source, field: str = "text", units=None):
    """(texts by (file, row), reasons by (file, row))"""
    found, dropped = {}, {}
    for batch in texts(source, units or source.units(), field):
        assert len(batch.rows) == len(batch.texts)
        found |= {(batch.file, row): text.decode() for row, text in zip(batch.rows, batch.texts, strict=True)}
        dropped |= {(batch.file, row): reason for row, reason in batch.dropped}
    assert list(found) == sorted(found)
    return found, dropped


LINES = {
    b'{"text": "a"}': "a",
    b'{"id": 1, "text": "b\\nc \\ud83d\\ude00 \\u00e9 \xc3\xa9", "more": [{}]}': "b\nc \U0001f600 é é",
    b'{"text": "x", "score": NaN, "size": 1e999, "y": -Infinity}': "x",
    b' {"text": "r"} \r': "r",
    b'{"text": ""}': ValueError("'text' is empty"),
    b'{"text": 3}': ValueError("'text' is not a string"),
    b'{"text": ["a"]}': ValueError("'text' is not a string"),
    b'{"text": null}': ValueError("no 'text'"),
    b'{"body": "x"}': ValueError("no 'text'"),
    b'{"text": "\\ud800"}': ValueError("'text' has a lone surrogate"),
    b"{": ValueError("not JSON"),
    b'{"text": "cut o': ValueError("not JSON"),
    b'{"text": "a"} {"text": "b"}': ValueError("not JSON"),
    b'{"text": "\xff"}': ValueError("not UTF-8"),
    b'{"text": "\xed\xa0\x80"}': ValueError("not UTF-8"),
    b"[1]": ValueError("not a JSON object"),
    b'"text"': ValueError("not a JSON object"),
    b"[" * 200_000: ValueError("nested too deeply"),
    b"": None,
    b" \t\r": None,
}


def expected(lines: list[bytes], number: int = 0):
    found = {(number, row): LINES[line] for row, line in enumerate(lines, 1)}
    return (
        {place: text for place, text in found.items() if isinstance(text, str)},
        {place: str(text) for place, text in found.items() if isinstance(text, ValueError)},
    )


@pytest.mark.parametrize("format_", ["jsonl", "jsonl.gz", "jsonl.zst"])
@settings(deadline=None, max_examples=40)
@given(
    files=st.lists(st.lists(st.sampled_from(list(LINES)), max_size=30), min_size=1, max_size=3),
    chunk=st.sampled_from([2, 20, 100, 1 << 20]),
    ended=st.booleans(),
)
def test_texts_of_lines(tmp_path_factory, format_, files, chunk, ended):
    directory = tmp_path_factory.mktemp("source") / "s"
    contents = [b"\n".join(lines) + (b"\n" if ended and lines else b"") for lines in files]
    source = source_of(directory, format_, *(packed(content, format_) for content in contents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        found, dropped = flat(source)
        broken = Broken()
        objects = {(number, row): found for number, row, found in read(source, source.units(), broken)}
    good, bad = {}, {}
    for number, lines in enumerate(files):
        some, others = expected(lines, number)
        good |= some
        bad |= others
    assert found == good
    assert dropped == bad
    in_objects = {place: reason for place, reason in bad.items() if "text" in reason}
    assert {place: row["text"] for place, row in objects.items() if place not in in_objects} == good
    assert objects.keys() == good.keys() | in_objects.keys()
    assert broken.count == len(bad) - len(in_objects)


def test_broken_lines_are_counted_by_reason_with_the_place_of_the_first(write_source):
    source = open_source(
        write_source([{"text": "a"}, b"", b"{", b'{"text": "\xff"}', b"[1]", b"[" * 200_000, {"text": "b"}])
    )
    broken = Broken()
    found = list(read(source, source.units(), broken))
    assert found == [(0, 1, {"text": "a"}), (0, 7, {"text": "b"})]
    assert broken.measures() == {"nested too deeply": 1, "not JSON": 1, "not UTF-8": 1, "not a JSON object": 1}
    assert broken.first == f"{source.path(0)}:3: not JSON"


def test_max_broken_is_a_share_and_inclusive():
    broken = Broken()
    broken.add("not JSON", "f:9")
    broken.check(1000, "1/1000")
    with pytest.raises(
        NemoflowError, match=r"f:9: not JSON \(the first of 1 broken rows in 999; max_broken allows 1/1000"
    ):
        broken.check(999, "1/1000")


TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.none() | st.sampled_from(["", "a", "é\n", "x" * 300]) | st.text(max_size=9), max_size=60),
    group=st.integers(1, 40),
    chunk=st.sampled_from([1, 50, 1 << 20]),
    cut=st.integers(0, 60),
)
def test_texts_of_parquet(tmp_path_factory, type_, values, group, chunk, cut):
    directory = tmp_path_factory.mktemp("source")
    table = pa.table(
        {"id": range(len(values)), "body": pa.array(values, type_), "nested": [{"body": "no"}] * len(values)}
    )
    source = source_of(directory / "s", "parquet", parquet(directory, table, row_group_size=group))
    groups = math.ceil(len(values) / group) or pq.ParquetFile(source.path(0)).num_row_groups
    middle = min(cut, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        found, dropped = flat(source, "body")
        parts = [flat(source, "body", [unit]) for unit in ((0, 0, middle), (0, middle, groups))]
        objects = {(number, row): found["body"] for number, row, found in read(source, source.units(), Broken())}
    assert found == {(0, row): value for row, value in enumerate(values, 1) if value}
    assert dropped == {
        (0, row): "no 'body'" if value is None else "'body' is empty"
        for row, value in enumerate(values, 1)
        if not value
    }
    assert found == parts[0][0] | parts[1][0]
    assert dropped == parts[0][1] | parts[1][1]
    assert objects == {(0, row): value for row, value in enumerate(values, 1)}


def test_parquet_text_that_is_not_utf8_is_dropped_alone(tmp_path):
    column = pa.array([b"a", b"\xff", None, b"\xed\xa0\x80", b"\xc3\xa9"], pa.binary()).view(pa.string())
    source = source_of(tmp_path / "s", "parquet", parquet(tmp_path, pa.table({"text": column})))
    found, dropped = flat(source)
    assert found == {(0, 1): "a", (0, 5): "é"}
    assert dropped == {(0, 2): "not UTF-8", (0, 3): "no 'text'", (0, 4): "not UTF-8"}


def test_parquet_batches_are_bounded(tmp_path, monkeypatch):
    values = ["short"] * 5000 + ["long" * 1000] * 500
    source = source_of(tmp_path / "s", "parquet", parquet(tmp_path, pa.table({"text": values})))
    monkeypatch.setattr(rows, "_CHUNK", 50_000)
    sizes = [sum(map(len, batch.texts)) for batch in texts(source, source.units(), "text")]
    assert sum(sizes) == sum(map(len, values))
    assert max(sizes) <= 54_000
    assert len(sizes) < 100


def test_text_files_are_one_document_each(tmp_path):
    source = source_of(tmp_path / "s", "txt", "é\n\nb\n".encode(), b"", b"\xff", b"last")
    found, dropped = flat(source)
    assert found == {(0, 1): "é\n\nb\n", (3, 1): "last"}
    assert dropped == {(1, 1): "'text' is empty", (2, 1): "not UTF-8"}
    broken = Broken()
    assert [(n, row["text"]) for n, _, row in read(source, source.units(), broken)] == [
        (0, "é\n\nb\n"),
        (1, ""),
        (3, "last"),
    ]
    assert broken.first == f"{source.path(2)}:1: not UTF-8"


def both(source: Source, message: str) -> None:
    """Both readers raise the same error."""
    with pytest.raises(NemoflowError, match=message):
        list(texts(source, source.units(), "text"))
    with pytest.raises(NemoflowError, match=message):
        list(read(source, source.units(), Broken()))


@pytest.mark.parametrize("format_", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_compressed_file_names_the_line(tmp_path, format_):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(200_000))
    source = source_of(tmp_path / "s", format_, packed(lines, format_)[:-1000])
    both(source, rf"files/00000\.{format_}:\d+: cannot be read as {format_} \(.+\); repair the file, or leave it out")


def test_a_truncated_parquet_file(tmp_path):
    content = parquet(tmp_path, pa.table({"text": ["a"] * 100}))
    both(source_of(tmp_path / "s", "parquet", content[:-20]), r"00000\.parquet: row 1: cannot be read as parquet \(")
    both(source_of(tmp_path / "t", "parquet", b""), r"00000\.parquet: row 1: cannot be read as parquet \(")


def test_a_parquet_file_damaged_in_the_middle_names_the_row_after_the_last_whole_batch(tmp_path):
    table = pa.table({"text": [f"text {i}" * 20 for i in range(300)]})
    content = bytearray(
        parquet(tmp_path, table, row_group_size=100, compression="zstd", use_dictionary=False, write_page_checksum=True)
    )
    begin = pq.ParquetFile(tmp_path / "table.parquet").metadata.row_group(1).column(0).data_page_offset
    content[begin + 30 : begin + 200] = bytes(170)
    both(source_of(tmp_path / "s", "parquet", bytes(content)), r"00000\.parquet: row 101: cannot be read as parquet \(")


def test_a_missing_column_and_one_that_is_no_text(tmp_path):
    source = source_of(tmp_path / "s", "parquet", parquet(tmp_path, pa.table({"id": [1], "body": ["a"]})))
    with pytest.raises(
        NemoflowError, match=r"00000\.parquet: no column 'text'; it has id, body; set the source's text"
    ):
        flat(source)
    with pytest.raises(NemoflowError, match=r"00000\.parquet: column 'id' holds int64, which is not text"):
        flat(source, "id")


def test_a_file_with_fewer_row_groups_than_planned(tmp_path):
    source = source_of(tmp_path / "s", "parquet", parquet(tmp_path, pa.table({"text": ["a"] * 4}), row_group_size=2))
    assert list(flat(source, units=[(0, 1, 2)])[0]) == [(0, 3), (0, 4)]
    with pytest.raises(NemoflowError, match=r"00000\.parquet: has 2 row groups, planned with 3 or more"):
        flat(source, units=[(0, 1, 3)])


@pytest.mark.parametrize("format_", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_a_missing_file_is_named(tmp_path, format_):
    source = source_of(tmp_path / "s", format_, b"")
    source.path(0).unlink()
    both(source, rf"files/00000\.{format_}: ?(row )?1: cannot be read as {format_} \(.*No such file")


def test_a_line_or_text_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_LONGEST", 1000)
    monkeypatch.setattr(rows, "_CHUNK", 100)
    good = json.dumps({"text": "a" * 500}).encode() + b"\n"
    source = source_of(tmp_path / "s", "jsonl", good * 3 + b"x" * 3000)
    both(source, r"00000\.jsonl:4: cannot be read as jsonl \(a line of more than 1,000 bytes\)")
    both(
        source_of(tmp_path / "t", "txt", b"x" * 1001), r"00000\.txt:1: cannot be read as txt \(1,001 bytes in one text"
    )


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        encodable("\ud800", "text")
    assert encodable("\U0001f600", "text") == "\U0001f600"
