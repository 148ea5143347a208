import json
from pathlib import Path

import pytest
from data_set import build


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """The artifacts of data_set.build, for reading."""
    return build(tmp_path_factory.mktemp("made"))


@pytest.fixture
def write_source(tmp_path):
    """A function that writes rows (objects, or bytes as they are) as a source of one file and returns its path."""

    def write(rows, name: str = "source") -> Path:
        source = tmp_path / name
        (source / "files").mkdir(parents=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (source / "files/00000.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        payload = {"kind": "source", "generator": "test", "shards": 1}
        (source / "sealed.json").write_text(json.dumps({"payload": payload, "measures": {"documents": len(lines)}}))
        return source

    return write


@pytest.fixture
def out(tmp_path) -> Path:
    """An empty directory to write an artifact in."""
    path = tmp_path / "out"
    path.mkdir()
    return path
