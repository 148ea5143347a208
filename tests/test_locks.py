"""Lock files: what sources were when they were pinned, and what is said when they are something else now."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graph import write_demo
from hub_server import Hub

from nemoflow import locks
from nemoflow import recipe as grammar
from nemoflow.data.plan import shards
from nemoflow.errors import NemoflowError
from nemoflow.locks import LockedSource, Locks, StatCache
from nemoflow.progress import human
from nemoflow.store import Store

RECIPES = [Path("config/recipes")]
RECIPE = RECIPES[0] / "demo.yaml"
LOCK = RECIPES[0] / "demo.lock.json"
WORDS = '{files: "raw/*.jsonl", format: jsonl}'


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)


def lock(only: list[str] | None = None, name: str = "demo") -> dict:
    file = locks.write(name, RECIPES, Store("artifacts"), lambda _: None, only)
    return json.loads(file.read_text())["entries"]


def pinned(source: str = "words", name: str = "demo") -> LockedSource:
    file, spec = grammar.load(name, RECIPES)
    return Locks(name, RECIPES, Store("artifacts")).source(f"sources.{source}", spec.sources[source], file)


def edit(old: str, new: str) -> None:
    text = RECIPE.read_text()
    assert old in text
    RECIPE.write_text(text.replace(old, new))


def parquet(rows: int, group: int, name: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.table({name: [f"{name} {i} " * 30 for i in range(rows)]}), sink, row_group_size=group, compression="none"
    )
    return sink.getvalue()


# -- local files -------------------------------------------------------------------------------------------------------


def test_a_lock_says_sizes_and_digests_in_order():
    entries = lock()
    assert set(entries) == {"sources.words", "sources.lines"}
    words = entries["sources.words"]
    assert words["asked"] == {"files": "raw/*.jsonl", "format": "jsonl", "shard_size": 512 * 2**20}
    assert [row[0] for row in words["files"]] == ["raw/0.jsonl", "raw/1.jsonl"]
    for path, size, digest in words["files"]:
        content = Path(path).read_bytes()
        assert (size, digest) == (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    found = pinned()
    assert found.payload == {
        "files": [{"size": size, "sha256": digest[7:]} for _, size, digest in words["files"]],
        "format": "jsonl",
    }
    assert found.paths == ["raw/0.jsonl", "raw/1.jsonl"]
    assert found.plan == [[[0], [1]]] == words["plan"]
    assert found.bytes == sum(size for _, size, _ in words["files"])
    assert found.estimated_tokens == int(found.bytes / 4.4)


def test_locking_twice_writes_the_same_bytes():
    lock()
    before = LOCK.read_bytes()
    os.utime("raw/0.jsonl", (1, 1))
    lock()
    assert LOCK.read_bytes() == before


def test_a_file_more_is_a_line_more():
    lock()
    before = LOCK.read_text().splitlines()
    Path("raw/9.jsonl").write_text('{"text": "more"}\n')
    lock()
    more = [line for line in LOCK.read_text().splitlines() if line not in before]
    assert [line.split(",")[0].strip() for line in more] == ['["raw/1.jsonl"', '["raw/9.jsonl"', "[[0]"]


def test_a_recipe_of_generated_sources_needs_no_lock():
    RECIPE.write_text(
        "tokenizer: {train_on: [a], vocab_size: 300}\nsources: {a: {generator: stdlib_topics, shards: 1}}\n"
        "stages: [{name: s, kind: pretrain, function: f, data: {blend: {a: 1}}, until: 1}]\n"
    )
    assert locks.write("demo", RECIPES, Store("artifacts"), print) is None
    assert not LOCK.exists()


def test_a_local_tokenizer_is_pinned_whole():
    Path("tok/sub").mkdir(parents=True)
    Path("tok/tokenizer.json").write_text("{}")
    Path("tok/tokenizer_config.json").write_text("{ }")
    edit("{train_on: [words, sums], vocab_size: 280}", "{files: tok}")
    assert [row[0] for row in lock()["tokenizer"]["files"]] == ["tok/tokenizer.json", "tok/tokenizer_config.json"]
    file, spec = grammar.load("demo", RECIPES)
    payload, paths = Locks("demo", RECIPES, Store("artifacts")).tokenizer(spec.tokenizer, file)
    assert paths == ["tok/tokenizer.json", "tok/tokenizer_config.json"]
    assert payload == {
        "files": [{"size": len(t), "sha256": hashlib.sha256(t).hexdigest()} for t in (b"{}", b"{ }")],
    }


@pytest.mark.parametrize(
    ("names", "format_"),
    [
        (["a.jsonl", "b.json", "c.JSONL", "d.ndjson"], "jsonl"),
        (["a.jsonl.gz", "b.json.gz"], "jsonl.gz"),
        (["a.jsonl.zst"], "jsonl.zst"),
        (["a.parquet"], "parquet"),
        (["a.txt"], "txt"),
        (["a.jsonl", "b.parquet"], r"several formats, jsonl \(raw/x/a.jsonl\) and parquet \(raw/x/b.parquet\)"),
        (["a.jsonl", "b.jsonl.gz"], "several formats"),
        (["a.csv"], "raw/x/a.csv: no format goes by this name; set `format`, one of jsonl.gz,"),
        (["LICENSE", "a.jsonl"], "raw/x/LICENSE: no format"),
    ],
)
def test_the_format_is_what_the_names_say(names, format_):
    Path("raw/x").mkdir()
    for name in names:
        Path("raw/x", name).write_bytes(b"{}\n")
    edit(WORDS, "{files: raw/x}")
    if format_ in locks.SUFFIXES:
        assert lock()["sources.words"]["format"] == format_
        assert pinned().payload["format"] == format_
    else:
        with pytest.raises(NemoflowError, match=f"demo.yaml: sources.words: .*{format_}"):
            lock()
        edit("{files: raw/x}", "{files: raw/x, format: txt}")
        assert lock()["sources.words"]["format"] == "txt"


def test_large_parquet_is_planned_by_row_group_and_small_not_opened():
    whole = parquet(100, 10)
    Path("raw/x").mkdir()
    for name, data in {"0": whole[:-200], "1": whole + whole, "2": whole}.items():
        Path(f"raw/x/{name}.parquet").write_bytes(data)
    size = len(whole)
    edit(WORDS, f"{{files: raw/x/*.parquet, shard_size: {size - 100}}}")
    entry = lock()["sources.words"]
    assert len(entry["files"][0]) == 3  # as large as a shard: nothing but its size matters
    groups = [[int(n) for n in pair.split("/")] for pair in entry["files"][2][3].split()]
    assert [rows for rows, _ in groups] == [10] * 10
    assert 0.5 * size < sum(compressed for _, compressed in groups) < size
    found = pinned()
    sizes = [row[1] for row in entry["files"]]
    assert found.plan == shards(sizes, {1: groups, 2: groups}, size - 100) == entry["plan"]
    assert found.estimated_tokens == int(found.bytes * 3 / 4.4)


def test_a_large_parquet_file_that_is_none_is_named_when_locking():
    Path("raw/a.parquet").write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    edit(WORDS, "{files: raw/a.parquet, shard_size: 1000}")
    with pytest.raises(NemoflowError, match=r"demo.yaml: sources.words: raw/a.parquet: is no readable Parquet file"):
        lock()


def test_a_pattern_that_matches_nothing_is_refused_and_no_lock_is_written():
    edit("raw/*.jsonl", "raw/*.json")
    with pytest.raises(NemoflowError, match=r"demo.yaml: sources.words: no file matches 'raw/\*.json'"):
        lock()
    assert not LOCK.exists()


def test_a_lock_that_cannot_be_written_anew_stays_as_it_was():
    lock()
    before = LOCK.read_bytes()
    Path("raw/0.jsonl").write_text('{"text": "other"}\n')
    edit("raw/lines/*", "raw/none/*")
    with pytest.raises(NemoflowError, match="no file matches"):
        lock()
    assert LOCK.read_bytes() == before


def test_some_sources_can_be_locked_anew():
    before = lock()
    for path in ("raw/0.jsonl", "raw/lines/all.jsonl"):
        Path(path).write_text('{"text": "other", "line": "other"}\n')
    after = lock(only=["lines"])
    assert after["sources.words"] == before["sources.words"]
    assert after["sources.lines"] != before["sources.lines"]
    edit("  lines: {files: raw/lines/*, format: jsonl, field: line}\n", "")
    assert set(lock(only=["words"])) == {"sources.words"}  # what the recipe no longer has is not kept
    with pytest.raises(NemoflowError, match=r"demo.yaml: 'sums' is nothing that is locked; there are words$"):
        lock(only=["words", "sums"])


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_is_not_locked_is_refused_with_the_command():
    with pytest.raises(NemoflowError, match=r"sources.words: 'raw/\*.jsonl' is not locked; run `nemoflow lock demo`"):
        pinned()


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ("{files: raw/0.jsonl, format: jsonl}", r"files: 'raw/0.jsonl', but \S*demo.lock.json pins 'raw/\*.jsonl'"),
        ('{files: "raw/*.jsonl"}', r"format: None, but \S*demo.lock.json pins 'jsonl'"),
        ('{files: "raw/*.jsonl", format: jsonl, shard_size: 1MiB}', r"shard_size: 1048576, but \S* pins 536870912"),
        ('{files: "raw/*.jsonl", config: x}', "config: 'x': only hf://ORGANISATION/NAME has one, not 'raw/"),
        ('{files: "raw/*.jsonl", split: test}', "split: 'test': only hf://ORGANISATION/NAME has one, not 'raw/"),
    ],
)
def test_a_recipe_that_asks_for_something_else_than_was_locked_is_refused(now, message):
    lock()
    edit(WORDS, now)
    with pytest.raises(NemoflowError, match=rf"demo.yaml: sources.words.{message}") as error:
        pinned()
    assert "only hf://" in str(error.value) or str(error.value).endswith("; run `nemoflow lock demo`")


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("same_stamp", [True, False])
def test_a_changed_file_is_refused(same_size, same_stamp):
    lock()
    path = Path("raw/1.jsonl")
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("cat", "dog" if same_size else "mouse"))
    if same_stamp:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if same_size and same_stamp:  # what no look at the file's record can show: the job that reads it compares digests
        assert pinned()
        return
    with pytest.raises(NemoflowError, match=r"raw/1.jsonl: changed since it was pinned in .*lock.json; restore"):
        pinned()
    path.write_text(text)
    assert pinned()


def test_a_missing_file_is_known_but_no_error_while_nobody_reads_it():
    lock()
    shutil.rmtree("raw")
    found = pinned()
    assert len(found.payload["files"]) == 2
    assert found.paths == ["raw/0.jsonl", "raw/1.jsonl"]


def test_a_recipe_that_extends_uses_its_parents_lock_and_its_own_first():
    parent = lock()
    (RECIPES[0] / "child.yaml").write_text("extends: demo\n")
    assert pinned(name="child").payload["files"]
    Path("raw/0.jsonl").write_text('{"text": "other"}\n')
    lock(name="child", only=["words"])
    child = pinned(name="child")
    assert f"sha256:{child.payload['files'][0]['sha256']}" != parent["sources.words"]["files"][0][2]
    assert pinned("lines", name="child").payload["files"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\x00",
        '{"schema": 2, "entries": {"sources.words": {}}}',
        '{"schema": 2, "entries": {"sources.words": {"asked": {"files": "a"}, "files": [["a", "1", "sha256:0"]]}}}',
        '{"schema": 2, "entries": {}, "more": 1}',
    ],
)
def test_a_damaged_lock_is_named(text):
    LOCK.write_text(text)
    with pytest.raises(NemoflowError, match=r"demo.lock.json: damaged: .*; restore it, or run `nemoflow lock demo`"):
        pinned()


def test_a_lock_of_another_version_is_no_riddle():
    LOCK.write_text('{"schema": 1, "entries": {"sources.words": {"pattern": "raw/*.jsonl", "files": []}}}')
    with pytest.raises(NemoflowError, match=r"demo.lock.json: is of another version of nemoflow; run `nemoflow lock"):
        pinned()


def test_a_file_is_read_again_only_when_its_size_or_stamp_changed(monkeypatch):
    store, path = Store("artifacts"), Path("raw/0.jsonl")
    read = []
    monkeypatch.setattr(locks, "file_digest", lambda p: read.append(p) or str(len(read)))
    cache = StatCache(store)
    assert cache.digest(path, known_only=True) is None
    assert [cache.digest(path) for _ in range(3)] == ["1", "1", "1"]
    cache.save()
    assert StatCache(store).digest(path, known_only=True) == "1"
    os.utime(path, (5, 5))
    assert StatCache(store).digest(path, known_only=True) == "2"


def test_a_lock_of_60_000_files_is_read_at_once():
    rows = [(f"Some-Subset/part-{i:05d}.parquet", 2**29 + i, f"sha256:{i:064x}") for i in range(60_000)]
    rows[::3] = [(*row, "1000/5242880 " * 100) for row in rows[::3]]
    plan = [[[i]] for i in range(60_000)]
    asked = locks.Asked(files="hf://org/set", config="Some-Subset", split="train", shard_size=2**29)
    entry = locks.Entry(asked=asked, commit="c" * 40, config="Some-Subset", format="parquet", files=rows, plan=plan)
    LOCK.write_text(locks.dump({"sources.words": entry}))
    edit(WORDS, "{files: hf://org/set, config: Some-Subset}")
    code = """
        import time
        from pathlib import Path
        from nemoflow import recipe
        from nemoflow.locks import Locks
        from nemoflow.store import Store
        file, spec = recipe.load("demo", [Path("config/recipes")])
        def peak():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        before, begun = peak(), time.process_time()
        found = Locks("demo", [Path("config/recipes")], Store("a")).source("sources.words", spec.sources["words"], file)
        print(len(found.payload["files"]), len(found.plan), time.process_time() - begun, peak() - before)
        """
    code = re.sub("^        ", "", code, flags=re.M)
    env = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    files, planned, seconds, mib = map(float, subprocess.check_output([sys.executable, "-c", code], env=env).split())
    assert (files, planned) == (60_000, 60_000)
    assert seconds < 1
    assert mib < 150


# -- the hub -----------------------------------------------------------------------------------------------------------


def write_hub_recipe(hub: Hub) -> tuple[str, dict[str, bytes]]:
    """A recipe of subsets and a tokenizer on the hub; returns the commit of the set and its files."""
    card = "".join(
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/*}}]\n" for name in ("4plus", "4plus_MIND")
    )
    files = {"README.md": f"---\nconfigs:\n{card}---\n".encode(), "4plus_MIND/a.jsonl": b'{"text": "mind"}\n' * 99}
    files |= {f"4plus/{i}.parquet": parquet(rows, 20) for i, rows in enumerate((30, 400, 20))}
    commit = hub.datasets["org/math"].commit(files)
    hub.models["org/model"].commit({"tokenizer.json": b"{}" * 999, "tokenizer_config.json": b"{}", "more.bin": b"0"})
    edit("{train_on: [words, sums], vocab_size: 280}", "{files: hf://org/model}")
    edit(WORDS, "{files: hf://org/math, config: 4plus, shard_size: 32KiB}")
    edit("{files: raw/lines/*, format: jsonl, field: line}", "{files: hf://org/math, config: 4plus_MIND}")
    edit("  sums:", "  again: {files: hf://org/math, config: 4plus, shard_size: 32KiB, field: other}\n  sums:")
    return commit, files


def lock_on(hub: Hub, **env: str) -> list[str]:
    """Lock the recipe in a process that talks to `hub`; returns what it said."""
    return hub.run("locks.write('demo', [Path('config/recipes')], Store('artifacts'), show)", Path.cwd(), **env)


def test_subsets_and_a_tokenizer_of_the_hub_are_pinned_with_plan_and_need_no_network_again():
    with Hub() as hub:
        commit, files = write_hub_recipe(hub)
        said = lock_on(hub)
        footers = [path for _, path, _, asked, _ in hub.log if asked and path.startswith("/large/")]
        looked = [path for method, path, _, _, _ in hub.log if method == "POST"]
    assert len(footers) == 1  # of the one file that is larger than a shard; and a source under two names is one
    assert len(looked) == 3
    assert "sources.words: hf://org/math, 4plus, train" in said
    assert f"sources.words: 3 files, {human(pinned().bytes)}, {len(pinned().plan)} shards, commit {commit[:12]}" in said
    found, (_, spec) = pinned(), grammar.load("demo", RECIPES)
    assert found.payload["hub"] == {"repo": "org/math", "config": "4plus", "split": "train", "commit": commit}
    assert found.payload["format"] == "parquet"
    for i, file in enumerate(found.payload["files"]):
        data = files[f"4plus/{i}.parquet"]
        assert file == {"path": f"4plus/{i}.parquet", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert found.paths == []
    read = [unit for shard in found.plan for unit in shard]
    assert read[0] == [0]
    assert read[-1] == [2]
    assert [unit[0] for unit in read[1:-1]] == [1] * (len(read) - 2)
    assert read[1][1] == 0
    assert read[-2][2] == 20
    assert pinned("again") == found
    assert [file["path"] for file in pinned("lines").payload["files"]] == ["4plus_MIND/a.jsonl"]
    payload, paths = Locks("demo", RECIPES, Store("artifacts")).tokenizer(spec.tokenizer, RECIPE)
    assert paths == []
    assert payload["hub"] == {"repo": "org/model", "commit": hub.models["org/model"].head}
    assert [file["path"] for file in payload["files"]] == ["tokenizer.json", "tokenizer_config.json"]
    assert "sha256" in payload["files"][0]
    assert "git_sha1" in payload["files"][1]


def test_main_may_move_but_a_lock_says_where_it_was():
    with Hub() as hub:
        old, files = write_hub_recipe(hub)
        lock_on(hub)
        new = hub.datasets["org/math"].commit({**files, "4plus/3.parquet": parquet(30, 10)})
        assert pinned().payload["hub"]["commit"] == old
        lock_on(hub)
        assert pinned().payload["hub"]["commit"] == new
        assert len(pinned().payload["files"]) == 4
        edit("config: 4plus, shard_size: 32KiB}", f"config: 4plus, revision: {old}, shard_size: 32KiB}}")
        with pytest.raises(
            NemoflowError, match=rf"sources.words.revision: '{old}', but .* pins None; run `nemoflow lock"
        ):
            pinned()
        lock_on(hub)
        assert pinned().payload["hub"]["commit"] == old
        edit("config: 4plus_MIND}", "config: 4plus_MIND, split: test}")
        with pytest.raises(NemoflowError, match=r"lines.split: 'test', but .* pins 'train'; run `nemoflow lock"):
            pinned("lines")
        before = LOCK.read_bytes()
        assert lock_on(hub)[-1] == (
            "config/recipes/demo.yaml: sources.lines: hf://org/math: split: configuration '4plus_MIND' has no 'test'; "
            "there are train"
        )
        assert "HF_HUB_OFFLINE is set" in lock_on(hub, HF_HUB_OFFLINE="1")[-1]
        assert LOCK.read_bytes() == before


def test_reading_a_lock_brings_no_client():
    lock()
    code = "import sys; from nemoflow import locks; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[1])}
    modules = set(subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split())
    assert not modules & {"huggingface_hub", "datasets", "pyarrow", "httpx", "numpy", "fsspec"}
