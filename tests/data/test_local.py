"""Local files as a source: verified and linked to, never copied."""

import hashlib

import pytest

from nemoflow.data import local
from nemoflow.data.sources import Source
from nemoflow.errors import NemoflowError


def entry(data: bytes) -> dict:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def make(out, files, entries, threads=2, progress=print):
    return local.make({"files": entries, "format": "jsonl"}, {"files": files}, out, progress, threads=threads)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The directory paths are relative to, and an empty artifact."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def test_files_are_linked_in_order_by_absolute_paths(place):
    data = [b'{"text": "%d"}\n' % i for i in range(12)]
    files = [place.joinpath("raw", f"{chr(110 - i)}.jsonl").relative_to(place) for i in range(12)]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    entries = [entry(content) for content in data]
    made = make(place / "out", files, entries)
    assert made.measures == {"files": 12, "bytes": sum(map(len, data))}
    assert made.contents == [{"name": f"files/{i:05d}.jsonl", **e} for i, e in enumerate(entries)]
    source = Source(place / "out", {"files": entries, "format": "jsonl"}, 12, "jsonl")
    assert [source.path(i).read_bytes() for i in range(12)] == data
    assert [source.origin(i) for i in range(12)] == [str(place / file) for file in files]
    assert source.place(3, 7) == f"{place}/raw/k.jsonl:7"


def test_a_changed_missing_or_other_file_is_named_with_the_way_out(place):
    data = b'{"text": "five"}\n'
    file = place / "raw/a.jsonl"

    def refused(message: str) -> None:
        with pytest.raises(NemoflowError, match=rf"raw/a.jsonl: {message}.* put the locked file back, or .* lock R"):
            make(place / "out", [file], [entry(data)])
        (place / "out/files").rmdir()

    file.write_bytes(data + b"\n")
    refused("has 18 bytes, locked with 17;")
    file.write_bytes(data.replace(b"five", b"FIVE"))
    refused("its content has changed since it was locked;")
    file.unlink()
    refused(r"cannot be read \(No such file or directory\);")
    file.mkdir()
    refused("has [0-9,]+ bytes, locked with 17;")


def test_progress_says_how_much_how_fast_and_how_long(place, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    data = bytes(2 * local._CHUNK)
    files = [place / "raw" / f"{i}.jsonl" for i in range(4)]
    for file in files:
        file.write_bytes(data)
    lines = []
    make(place / "out", files, [entry(data)] * 4, threads=1, progress=lines.append)
    assert lines[0] == "1/4 files, 3.1 MB of 8.4 MB, 0.3 MB/s, 20 s left"
    assert len(lines) == 3
