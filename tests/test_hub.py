"""What the hub's own clients find on a stand-in hub over HTTP: exact subsets, pinned commits, whole files, and errors
that say what to do."""

import hashlib
import io
import re
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub, git_sha1

from nemoflow.errors import NemoflowError
from nemoflow.hub import repository


def lines(name: str, count: int = 40) -> bytes:
    """A file of the hub's large kind, with a content of its own."""
    return b"".join(b'{"text": "%s %d"}\n' % (name.encode(), i) for i in range(count * 2))


def card(**configs: str) -> bytes:
    """A dataset's card: configuration -> YAML of its data_files."""
    listed = "".join(f"- config_name: {json_name(name)}\n  data_files:\n{files}" for name, files in configs.items())
    return f"---\nlicense: other\nconfigs:\n{listed}---\n# A dataset\n".encode()


def json_name(name: str) -> str:
    return '"' + name.replace("__", "-") + '"'


def train(path: str) -> str:
    return f"  - split: train\n    path: {path}\n"


HELD_OUT = "  - split: test\n    path: t.jsonl\n"
SUBSETS = {
    "README.md": card(
        High__Quality=train("High-Quality/*.jsonl"),
        High__Quality__Synthetic=train("High-Quality-Synthetic/*.jsonl"),
        **{
            "4plus": train("4plus/part*"),
            "4plus_MIND": train("4plus_MIND/part*") + "  - split: test\n    path: t.jsonl\n",
        },
    ),
    ".gitattributes": b"*.jsonl filter=lfs\n",
    "t.jsonl": b'{"text": "held out"}\n',
} | {
    f"{subset}/part_{i}.jsonl": lines(f"{subset} {i}")
    for subset, count in (("High-Quality", 9), ("High-Quality-Synthetic", 8), ("4plus", 2), ("4plus_MIND", 3))
    for i in range(count)
}


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def resolved(hub: Hub, cwd, *asked: tuple, commit: str) -> list[dict]:
    calls = "".join(
        f"show(asdict(hub.resolve('org/set', {config!r}, {split!r}, {commit!r})))\n" for config, split in asked
    )
    return hub.run(calls, cwd)


def test_a_subset_is_what_the_card_says_and_never_what_its_name_begins_with(hub, tmp_path):
    commit = hub.datasets["org/set"].commit(SUBSETS)
    asked = [(subset, "train") for subset in ("High-Quality", "High-Quality-Synthetic", "4plus", "4plus_MIND")]
    for (subset, _), found in zip(asked, resolved(hub, tmp_path, *asked, commit=commit), strict=True):
        assert (found["commit"], found["config"]) == (commit, subset)
        expected = sorted(path for path in SUBSETS if path.startswith(f"{subset}/"))
        assert [file["path"] for file in found["files"]] == expected
        for file in found["files"]:
            data = SUBSETS[file["path"]]
            assert file == {"path": file["path"], "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert not (tmp_path / ".hf" / "datasets").exists() or not list((tmp_path / ".hf" / "datasets").glob("*/*.arrow"))


def test_splits_directories_and_several_patterns_of_a_card(hub, tmp_path):
    files = {
        "README.md": b"---\nconfigs:\n- config_name: of directory\n  data_dir: sub\n"
        b"- config_name: twice\n  data_files:\n  - split: train\n    path: [sub/b.jsonl, sub/*.jsonl]\n---\n",
        "sub/b.jsonl": b'{"text": "small"}\n',
        "sub/a.jsonl": lines("a"),
        "other.jsonl": lines("other"),
    }
    commit = hub.datasets["org/set"].commit(files)
    found = resolved(hub, tmp_path, ("of directory", "train"), ("twice", "train"), commit=commit)
    for one in found:
        assert [file["path"] for file in one["files"]] == ["sub/a.jsonl", "sub/b.jsonl"]
        small = files["sub/b.jsonl"]
        assert one["files"][1] == {"path": "sub/b.jsonl", "size": len(small), "git_sha1": git_sha1(small)}


@pytest.mark.parametrize(
    ("files", "license_"),
    [
        ({"README.md": b"---\nlicense: cc-by-4.0\n---\n# A dataset\n"}, "cc-by-4.0"),
        ({"README.md": b"---\nlicense: [mit, apache-2.0]\n---\n" + b"long " * 1000}, "mit, apache-2.0"),
        ({"README.md": b"---\nlicense: other\nlicense_name: of-its-own\n---\n"}, "of-its-own"),
        ({"README.md": b"---\nlicense: other\n---\n"}, "other"),
        ({"README.md": b"no front matter"}, None),
        ({"README.md": b"---\nlicense: [\n---\n"}, None),
        ({"README.md": b"---\n- a list\n---\n"}, None),
        ({"a.jsonl": b"{}"}, None),
    ],
)
def test_the_license_is_what_the_card_says_at_the_commit(hub, tmp_path, files, license_):
    commit = hub.datasets["org/set"].commit(files)
    hub.datasets["org/set"].commit({"README.md": b"---\nlicense: another\n---\n"})
    assert hub.run(f"show(hub.license_of('org/set', {commit!r}))", tmp_path) == [license_]


def test_a_dataset_without_a_card_is_split_as_datasets_does(hub, tmp_path):
    files = {"train-0.jsonl": lines("0"), "train-1.jsonl": lines("1"), "test-0.jsonl": lines("t")}
    commit = hub.datasets["org/set"].commit(files)
    train, test = resolved(hub, tmp_path, (None, "train"), (None, "test"), commit=commit)
    assert [file["path"] for file in train["files"]] == ["train-0.jsonl", "train-1.jsonl"]
    assert [file["path"] for file in test["files"]] == ["test-0.jsonl"]
    assert train["config"] == "default"


def test_a_commit_stays_what_it_was_when_main_moves(hub, tmp_path):
    old = hub.datasets["org/set"].commit({"train.jsonl": lines("old")})
    new = hub.datasets["org/set"].commit({"train.jsonl": lines("new"), "train-more.jsonl": lines("more")})
    found = hub.run(
        f"""
        show(hub.commit("org/set", None))
        show(hub.commit("org/set", {old!r}))
        show(asdict(hub.resolve("org/set", None, "train", {old!r})))
        """,
        tmp_path,
    )
    assert found[:2] == [new, old]
    (file,) = found[2]["files"]
    assert file["sha256"] == hashlib.sha256(lines("old")).hexdigest()


@pytest.mark.parametrize(
    ("repo", "revision", "token", "env", "message"),
    [
        ("org/none", None, None, {}, "hf://org/none: there is no such dataset .* HF_TOKEN is not set"),
        ("org/none", None, "hf_known", {}, "hf://org/none: there is no such dataset .* may not read it"),
        ("org/set", "v9", None, {}, "hf://org/set: has no revision 'v9'; give a branch, a tag or a commit"),
        ("org/gated", None, None, {}, "is gated: accept its terms on .*/datasets/org/gated, then set HF_TOKEN to"),
        ("org/gated", None, "hf_known", {}, r"is gated: .* \(the account of today's HF_TOKEN has no access\)"),
        ("org/set", None, "hf_wrong", {}, "hf://org/set: .* refuses HF_TOKEN as invalid"),
        ("org/set", None, None, {"HF_HUB_OFFLINE": "1"}, "hf://org/set: HF_HUB_OFFLINE is set .*; unset it"),
        ("org/set", None, None, {"HF_ENDPOINT": "closed"}, r"hf://org/set: .* cannot be reached \(ConnectError"),
    ],
)
def test_what_the_hub_does_not_give_is_a_line_that_says_what_to_do(hub, tmp_path, repo, revision, token, env, message):
    hub.datasets["org/set"].commit(SUBSETS)
    hub.datasets["org/gated"].commit(SUBSETS)
    hub.datasets["org/gated"].gated = True
    if "HF_ENDPOINT" in env:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = {"HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}"}
    code = f"hub.resolve({repo!r}, '4plus', 'train', hub.commit({repo!r}, {revision!r}))"
    (error,) = hub.run(code, tmp_path, token, **env)
    assert re.search(message, error), error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("files", "config", "split", "message"),
    [
        (
            SUBSETS,
            "High",
            "train",
            "config: there is no 'High'; choose from High-Quality, High-Quality-Synthetic, 4plus",
        ),
        (SUBSETS, None, "train", "config: is missing, and the dataset has several; choose from High-Quality, High-"),
        (SUBSETS, "4plus_MIND", "dev", "split: configuration '4plus_MIND' has no 'dev'; there are train, test"),
        ({"README.md": b"no data"}, None, "train", "cannot tell what its files are"),
        ({"README.md": b"---\nconfigs: 3\n---\n", "a.jsonl": b"{}"}, None, "train", "Expected configs to be a list"),
        ({"README.md": card(a=train("none/*"))}, "a", "train", "cannot tell what its files are"),
    ],
)
def test_subsets_that_are_not_there(hub, tmp_path, files, config, split, message):
    commit = hub.datasets["org/set"].commit(files)
    (error,) = resolved(hub, tmp_path, (config, split), commit=commit)
    assert error.startswith("hf://org/set: ")
    assert message in error


def test_a_token_opens_what_is_gated_and_is_shown_to_no_other_host(hub, tmp_path):
    hub.datasets["org/set"].gated = True
    commit = hub.datasets["org/set"].commit({"a.jsonl": lines("a")})
    code = """
        commit = hub.commit("org/set", None)
        file = hub.resolve("org/set", None, "train", commit).files[0]
        show(hub.download("org/set", commit, file, Path("a.jsonl"), lambda *_: None))
        """
    assert hub.run(code, tmp_path, "hf_granted") == [hashlib.sha256(lines("a")).hexdigest()]
    assert (tmp_path / "a.jsonl").read_bytes() == lines("a")
    asked = [entry for entry in hub.log if commit in entry[1]]
    assert {token for _, path, _, _, token in asked if path.startswith("/large/")} == {None}
    assert {token for _, path, _, _, token in asked if not path.startswith("/large/")} == {"hf_granted"}


def test_tokenizers(hub, tmp_path):
    whole = {"tokenizer.json": lines("tokenizer"), "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    hub.models["org/model"].commit(whole | {"model.safetensors": lines("weights"), "config.json": b"{}"})
    hub.models["org/gated"].commit(whole)
    hub.models["org/gated"].gated = True
    hub.models["org/slow"].commit({"tokenizer_config.json": b"{}", "vocab.json": b"{}"})
    code = """
        commit = hub.commit("org/model", "main", "model")
        found = hub.resolve_tokenizer("org/model", commit)
        show(asdict(found))
        Path("out").mkdir()
        download.fetch({"hub": {"repo": "org/model", "commit": commit}, "files": found.files}, Path("out"), print)
        hub.resolve_tokenizer("org/slow", hub.commit("org/slow", None, "model"))
        """
    found, error = hub.run(code, tmp_path)
    assert found["commit"] == hub.models["org/model"].head
    assert [(f["path"], f["size"]) for f in found["files"]] == [(path, len(data)) for path, data in whole.items()]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert "hf://org/slow: has no tokenizer.json" in error
    (error,) = hub.run("hub.resolve_tokenizer('org/gated', hub.commit('org/gated', None, 'model'))", tmp_path)
    assert re.search("hf://org/gated: is gated: accept its terms on http://127.0.0.1:[0-9]+/org/gated, then", error)


def test_row_groups_are_known_from_the_footer_alone(hub, tmp_path):
    files = {}
    for name, rows in (("few.parquet", 30), ("many.parquet", 900)):  # the footer of the second has more than 64 KiB
        sink = io.BytesIO()
        table = pa.table({"text": [f"{name} {i} " * 400 for i in range(rows)], "n": range(rows)})
        pq.write_table(table, sink, row_group_size=10 if name == "few.parquet" else 2, compression="none")
        files[name] = sink.getvalue()
    files["no.parquet"] = lines("no")
    commit = hub.datasets["org/set"].commit(files)
    code = "".join(
        f"show(hub.row_groups('org/set', {commit!r}, {{'path': {name!r}, 'size': {len(data)}}}))\n"
        for name, data in files.items()
    )
    *found, error = hub.run(code, tmp_path)
    for name, groups in zip(files, found, strict=False):
        metadata = pq.read_metadata(io.BytesIO(files[name]))
        assert len(groups) == metadata.num_row_groups > 2
        assert sum(rows for rows, _ in groups) == metadata.num_rows
        starts = [metadata.row_group(i).column(0).data_page_offset for i in range(3)]
        assert 0.9 < groups[1][1] / (starts[2] - starts[1]) < 1.1
        footer = int.from_bytes(files[name][-8:-4], "little") + 8
        assert hub.served[name] <= footer + 2**16
    assert hub.served["many.parquet"] > 2**16
    assert re.search(r"hf://datasets/org/set@\w{12}/no.parquet: is no readable Parquet file", error)


def test_addresses():
    assert repository("hf://org/set-1.0") == "org/set-1.0"
    for wrong in ("hf://org", "hf://org/set/file.jsonl", "hf://org/set@main", "hf:///set", "hf://datasets/org/set"):
        with pytest.raises(NemoflowError, match="write hf://ORGANISATION/NAME, and beside it `config`, `split` and"):
            repository(wrong)
