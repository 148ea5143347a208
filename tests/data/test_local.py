import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemoflow.data import generate
from nemoflow.errors import NemoflowError

TEXTS = ["one\ntwo", "drei – vier", "\U0001f600", "five", "six"]


def make(out, files, format_, field="text", shards=2, entries=None):
    entries = entries or [
        {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files
    ]
    payload = {"files": entries, "format": format_, "field": field, "shards": shards}
    return generate.make(payload, {"files": files}, out, print)


def texts(out, field="text"):
    shards = [shard.read_text().splitlines() for shard in sorted(out.iterdir())]
    dealt = [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]
    return [json.loads(line)[field] for line in dealt]


def jsonl(field="text", ending="\n"):
    return "".join(json.dumps({field: text, "more": 1}) + ending for text in TEXTS).encode()


def zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("format_", "data"),
    [
        ("jsonl", jsonl()),
        ("jsonl", jsonl(ending="\r\n") + b"\n\n"),
        ("jsonl", jsonl().rstrip(b"\n")),
        ("jsonl.gz", gzip.compress(jsonl())),
        ("jsonl.zst", zst(jsonl())),
    ],
)
def test_json_lines(tmp_path, out, format_, data):
    file = tmp_path / "raw"
    file.write_bytes(data)
    assert make(out, [file], format_)["documents"] == 5
    assert texts(out) == TEXTS
    assert json.loads((out / "shard-00000.jsonl").read_text().splitlines()[0])["more"] == 1


def test_the_field_is_called_text_in_the_source_and_unusable_rows_stay(tmp_path, out):
    file = tmp_path / "raw.jsonl"
    file.write_bytes(b'{"body": "new", "text": "old"}\nnot json\n{"other": 1}\n')
    make(out, [file], "jsonl", field="body", shards=1)
    lines = (out / "shard-00000.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0])["text"] == "new"
    assert lines[1:] == [b"not json", b'{"other": 1}']


def test_parquet(tmp_path, out):
    file = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"body": TEXTS, "n": range(5)}), file, row_group_size=2)
    assert make(out, [file], "parquet", field="body", shards=3)["documents"] == 5
    assert texts(out) == TEXTS


def test_parquet_of_chats(tmp_path, out):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"messages": [chat]}), file)
    make(out, [file], "parquet", field="messages", shards=1)
    assert texts(out, "messages") == [chat]


def test_text_files_are_documents(tmp_path, out):
    files = [tmp_path / f"{i}.txt" for i in range(5)]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text, encoding="utf-8")
    make(out, files, "txt")
    assert texts(out) == TEXTS


def test_a_changed_missing_or_other_file_is_named_with_the_way_out(tmp_path, out):
    file = tmp_path / "raw.jsonl"
    file.write_bytes(jsonl())
    entry = {"size": file.stat().st_size, "sha256": hashlib.sha256(jsonl()).hexdigest()}
    file.write_bytes(jsonl() + b"\n")
    with pytest.raises(NemoflowError, match=r"raw\.jsonl: has \d+ bytes, locked with \d+.*nemoflow lock"):
        make(out, [file], "jsonl", entries=[entry])
    file.write_bytes(jsonl().replace(b"five", b"FIVE"))
    with pytest.raises(NemoflowError, match=r"raw\.jsonl: its content has changed.*nemoflow lock"):
        make(out, [file], "jsonl", entries=[entry])
    file.unlink()
    with pytest.raises(NemoflowError, match=r"raw\.jsonl: cannot be read \(No such file.*nemoflow lock"):
        make(out, [file], "jsonl", entries=[entry])


@pytest.mark.parametrize(
    ("format_", "data", "message"),
    [
        ("jsonl", b"\n\n", "the corpus is empty"),
        ("jsonl.gz", gzip.compress(jsonl())[:-20], "is no readable jsonl.gz file"),
        ("jsonl.gz", jsonl(), "is no readable jsonl.gz file"),
        ("jsonl.zst", zst(jsonl())[:-8], "is no readable jsonl.zst file"),
        ("parquet", b"PAR1 or not", "is no readable parquet file"),
        ("txt", b"abc\xff", "byte 3: not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path, out, format_, data, message):
    file = tmp_path / "raw"
    file.write_bytes(data)
    with pytest.raises(NemoflowError, match=message) as error:
        make(out, [file], format_)
    assert str(file) in str(error.value)


def test_parquet_without_the_column_or_with_bytes_in_it(tmp_path, out):
    file = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"a": [b"x"], "b": ["y"]}), file)
    with pytest.raises(NemoflowError, match="no column 'text'; it has a, b"):
        make(out, [file], "parquet")
    with pytest.raises(NemoflowError, match="column 'a' holds binary"):
        make(out, [file], "parquet", field="a")
