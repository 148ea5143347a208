"""Downloads from a stand-in hub over HTTP with the real client: whole files or none, and nothing fetched twice."""

import contextlib
import hashlib
import json
import random
import re
import shutil
import signal
import time

import pytest
from hub_server import Hub, Repository

from nemoflow.data import download
from nemoflow.errors import NemoflowError

PATHS = {f"data/part-{i}.jsonl": size for i, size in enumerate((500_000, 20, 300_000, 0, 1500))}
"""Large and small files, and an empty one."""

MAKE = """
payload = json.loads(Path("payload.json").read_text())
Path("out").mkdir(exist_ok=True)
made = download.make(payload, {}, Path("out"), lambda line: None, threads=%d)
show([made.measures, made.contents])
"""


@pytest.fixture
def hub():
    with Hub() as server:
        content = random.Random(1)
        server.datasets["org/set"].commit({path: content.randbytes(size) for path, size in PATHS.items()})
        yield server


def repository(hub: Hub) -> Repository:
    return hub.datasets["org/set"]


def write_payload(hub: Hub, cwd) -> dict[str, bytes]:
    """What a lock would pin; returns the files by the names they are to get."""
    files = repository(hub).commits[repository(hub).head]
    entries = []
    for path, data in files.items():
        digest = {"sha256": hashlib.sha256(data).hexdigest()}
        if len(data) < 1024:
            digest = {"git_sha1": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        entries.append({"path": path, "size": len(data), **digest})
    where = {"repo": "org/set", "config": "default", "split": "train", "commit": repository(hub).head}
    (cwd / "payload.json").write_text(json.dumps({"hub": where, "files": entries, "format": "jsonl"}))
    return {f"files/{i:05d}.jsonl": data for i, data in enumerate(files.values())}


def there(cwd) -> dict[str, bytes]:
    """All files of the artifact."""
    out = cwd / "out"
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if not p.is_dir()}


def begun(cwd) -> bool:
    """Whether any byte is on the disk; files come and go meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_size for path in (cwd / "out").rglob("*.jsonl*"))
    return False


def make(hub: Hub, cwd, threads: int = 2, **more) -> list | str:
    (shown,) = hub.run(MAKE % threads, cwd, **more)
    return shown


def test_files_come_in_order_with_contents_that_need_no_second_look(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    measures, contents = make(hub, tmp_path)
    assert measures == {"files": 5, "bytes": sum(PATHS.values())}
    assert contents == [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in wanted.items()
    ]
    assert there(tmp_path) == wanted


def test_a_pinned_commit_is_fetched_also_after_main_moved(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    repository(hub).commit(dict.fromkeys(PATHS, b"new" * 1000))
    make(hub, tmp_path)
    assert there(tmp_path) == wanted


def test_broken_connections_cost_only_what_was_not_sent(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    hub.knobs["data/part-0.jsonl"].drop = [123_456, 0, 200_000]
    make(hub, tmp_path)
    assert there(tmp_path) == wanted
    assert hub.served["data/part-0.jsonl"] == PATHS["data/part-0.jsonl"]
    large = [entry for entry in hub.log if entry[1].startswith("/large/") and "part-0" in entry[1]]
    assert [asked for _, _, _, asked, _ in large] == [
        f"bytes={start}-499999" for start in (0, 123_456, 123_456, 323_456)
    ]


def test_a_server_without_ranges_sends_more_but_nothing_else(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    hub.knobs["data/part-0.jsonl"].drop = [123_456]
    hub.knobs["data/part-0.jsonl"].no_ranges = True
    make(hub, tmp_path)
    assert there(tmp_path) == wanted
    assert hub.served["data/part-0.jsonl"] == 123_456 + PATHS["data/part-0.jsonl"]


def test_an_overloaded_hub_is_asked_again(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    hub.knobs["data/part-2.jsonl"].status = [503]
    make(hub, tmp_path)
    assert there(tmp_path) == wanted


def test_a_file_that_came_corrupted_is_fetched_once_more(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    hub.knobs["data/part-2.jsonl"].corrupt = [True]  # known by its sha256
    hub.knobs["data/part-1.jsonl"].corrupt = [True]  # by its git blob
    make(hub, tmp_path)
    assert there(tmp_path) == wanted
    assert hub.served["data/part-2.jsonl"] == 2 * PATHS["data/part-2.jsonl"]


def test_a_file_that_always_comes_corrupted_is_an_error_and_the_others_are_kept(hub, tmp_path):
    wanted = write_payload(hub, tmp_path)
    hub.knobs["data/part-4.jsonl"].always_corrupt = True
    error = make(hub, tmp_path, threads=1)
    assert re.search(r"hf://org/set@\w{12}/data/part-4.jsonl: came twice with other bytes than were pinned; ", error)
    assert there(tmp_path) == {name: data for name, data in wanted.items() if name != "files/00004.jsonl"}
    hub.knobs.clear()
    hub.served.clear()
    make(hub, tmp_path)
    assert there(tmp_path) == wanted
    assert dict(hub.served) == {"data/part-4.jsonl": PATHS["data/part-4.jsonl"]}


@pytest.mark.parametrize("begun", [b"other bytes", b"\0" * 600_000])
def test_a_beginning_that_is_wrong_costs_the_whole_file_and_nothing_else(hub, tmp_path, begun):
    wanted = write_payload(hub, tmp_path)
    (tmp_path / "out/files").mkdir(parents=True)
    (tmp_path / "out/files/.00000.jsonl.part").write_bytes(begun)
    make(hub, tmp_path)
    assert there(tmp_path) == wanted
    kept = len(begun) if len(begun) < 500_000 else 500_000
    assert hub.served["data/part-0.jsonl"] == 500_000 + 500_000 - kept


@pytest.mark.parametrize("offline", [True, False])
def test_errors_of_the_hub_end_the_job_with_one_line(hub, tmp_path, offline):
    write_payload(hub, tmp_path)
    repository(hub).gated = True
    error = make(hub, tmp_path, **({"HF_HUB_OFFLINE": "1"} if offline else {"token": "hf_known"}))
    assert ("HF_HUB_OFFLINE is set" if offline else "is gated: accept its terms on") in error
    assert "\n" not in error
    assert not any(there(tmp_path).values())


@pytest.mark.parametrize("moment", [1, 150_000, 400_000, 700_000])
def test_a_killed_job_goes_on_where_it_was(hub, tmp_path, moment):
    """Killed when so many bytes have been sent."""
    wanted = write_payload(hub, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "payload.json", tmp_path / "elsewhere")
    undisturbed = make(hub, tmp_path / "elsewhere")
    hub.served.clear()
    hub.knobs["*"].seconds_per_chunk = 0.05
    process = hub.start(PROGRAM, tmp_path)
    while sum(hub.served.values()) < moment or not begun(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sum(map(len, there(tmp_path).values()))
    assert 0 < kept < sum(PATHS.values())
    (tmp_path / "out/files/99999.jsonl").write_bytes(b"of another attempt")
    hub.knobs.clear()
    time.sleep(0.3)  # what was under way to the dead process is counted now
    hub.served.clear()
    assert make(hub, tmp_path) == undisturbed
    assert there(tmp_path) == wanted
    assert sum(hub.served.values()) == sum(PATHS.values()) - kept


PROGRAM = """
import json
from pathlib import Path
from nemoflow.data import download
Path("out").mkdir(exist_ok=True)
download.make(json.loads(Path("payload.json").read_text()), {}, Path("out"), print, threads=2)
"""


def test_what_does_not_fit_on_the_disk_is_refused_before_it_begins(tmp_path):
    files = [{"path": "a", "size": 10**18, "sha256": "0" * 64}, {"path": "b", "size": 1, "sha256": "0" * 64}]
    payload = {"hub": {"repo": "org/set", "commit": "0" * 40}, "files": files, "format": "jsonl"}
    with pytest.raises(NemoflowError, match=r"files: 1000000.0 TB are still to come and .* are free; make room"):
        download.make(payload, {}, tmp_path, print)
