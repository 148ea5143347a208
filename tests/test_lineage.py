"""nemoflow trace and diff: on archives of records alone."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml
from archives import Archive, pretraining
from graph import write_demo

from nemoflow import cli, locks
from nemoflow.store import Store, dump


@pytest.fixture
def nemoflow(tmp_path, monkeypatch, capsys):
    """The command, run in an empty directory; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> tuple[int, str, str]:
        try:
            cli.main([str(a) for a in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def change(directory: Path, edit) -> None:
    """Change an artifact's record, both copies."""
    for name in ("sealed.json", "artifact.json"):
        record = json.loads((directory / name).read_text())
        edit(record)
        (directory / name).write_text(dump(record))


def test_trace_goes_down_to_commits(nemoflow, tmp_path):
    _, export = pretraining(tmp_path, sources=2, shards=3)
    code, out, _ = nemoflow("trace", export)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("hf_export/")
    assert any(f"repo org/web-001 commit {1:040x}" in line for line in lines)
    assert sum(": shards/" in line and "(above)" not in line for line in lines) == 6
    assert "(above)" in out, "what several artifacts came from is written out once"


def test_trace_tells_the_shards_of_a_source_in_one_line(nemoflow, tmp_path):
    _, export = pretraining(tmp_path, sources=2, shards=1204)
    sources = [p.name for p in (tmp_path / "artifacts/source").iterdir()]
    out = nemoflow("trace", export)[1]
    for source in sources:
        assert f"parts: 1,204 shards of source/{source}, 1,204,000 tokens\n" in out
        assert re.search(rf"^ +source: source/{source}: ", out, re.M), "what they come from is told"
    assert "parts: shards/" not in out
    each = nemoflow("trace", export, "--all")[1]
    assert each.count("parts: shards/") == 2408


def test_trace_as_data_lists_every_raw_file(nemoflow, tmp_path):
    archive, _ = pretraining(tmp_path, sources=1, shards=1)
    source = archive.store.load(
        archive.seal(
            "source",
            hub={"repo": "org/x", "commit": "a" * 40},
            format="jsonl",
            files=[{"path": "x.jsonl", "size": 5, "sha256": "b" * 64}],
        )
    )
    code, out, _ = nemoflow("trace", source.directory, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["raw_files"] == [
        {
            "artifact": f"source/x-{source.identity}",
            "repo": "org/x",
            "commit": "a" * 40,
            "path": "x.jsonl",
            "size": 5,
            "sha256": "b" * 64,
        }
    ]
    assert f"sha256:{'b' * 64}  5 B  x.jsonl" in nemoflow("trace", source.directory, "--files")[1]


def test_an_export_copied_away_alone(nemoflow, tmp_path):
    _, export = pretraining(tmp_path, sources=2, shards=2)
    records = json.loads(nemoflow("trace", export, "--json")[1])["artifacts"]
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    (alone / "lineage.json").write_text(dump({"artifacts": [one["record"] for one in records]}))
    shutil.rmtree(tmp_path / "artifacts")
    code, out, _ = nemoflow("trace", alone, "--json")
    assert code == 0
    assert [one["record"] for one in json.loads(out)["artifacts"]] == [one["record"] for one in records]


def test_ten_thousand_artifacts_take_five_seconds(nemoflow, tmp_path):
    _, export = pretraining(tmp_path, sources=10, shards=1000)
    begun = time.process_time()
    code, out, _ = nemoflow("trace", export)
    assert time.process_time() - begun < 5
    assert code == 0
    assert len(out.splitlines()) < 100, "alike shards are one line"
    begun = time.process_time()
    assert nemoflow("trace", export, "--all")[1].count("parts: shards/") == 10_000
    assert time.process_time() - begun < 5
    begun = time.process_time()
    assert nemoflow("graph", export)[:2] == (0, "wrote lineage.html: 10,025 artifacts\n")
    assert time.process_time() - begun < 5


def test_what_is_missing_is_named(nemoflow, tmp_path):
    _, export = pretraining(tmp_path, sources=1, shards=1)
    (gone,) = (tmp_path / "artifacts/merge").iterdir()
    shutil.rmtree(gone)
    code, out, _ = nemoflow("trace", export)
    assert code == 0
    assert f"merge/{gone.name}: missing" in out
    assert f"merge/{gone.name}: is missing, which " in out.splitlines()[-1]


def own_input(record: dict) -> None:
    entry = {key: record[key] for key in ("kind", "label", "identity")}
    record["inputs"].append(entry | {"role": "x", "sha256": ""})


COMMANDS = ("show", "trace", "diff", "verify", "graph")
DAMAGED = {
    "newer": (lambda r: r.update(schema=99), "schema: 99: this nemoflow reads up to 1; use a newer one"),
    "no schema": (lambda r: r.pop("schema"), "damaged: schema"),
    "no payload": (lambda r: r.pop("payload"), "damaged: payload is missing"),
    "payload": (lambda r: r.update(payload=[]), "damaged: payload"),
    "setting": (lambda r: r["payload"].update(parts=3), "its payload has the identity"),
    "kind": (lambda r: r.update(kind="../.."), "damaged: its address"),
    "inputs": (lambda r: r.update(inputs={}), "damaged: inputs"),
    "an input": (lambda r: r["inputs"].insert(0, 1), "damaged: inputs[0]"),
    "contents": (lambda r: r.update(contents=[{"name": 1}]), "damaged: contents"),
    "a size": (lambda r: r["contents"][0].update(size="1"), "damaged: contents"),
    "a digest": (lambda r: r["contents"][0].update(sha256=5), "damaged: contents"),
    "measures": (lambda r: r.update(measures=None), "damaged: measures"),
    "circle": (own_input, "comes from itself"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", DAMAGED)
def test_bad_records_are_named(nemoflow, tmp_path, case, command):
    edit, message = DAMAGED[case]
    _, export = pretraining(tmp_path, sources=1, shards=1)
    (blend,) = (tmp_path / "artifacts/blend").iterdir()
    change(blend, edit)
    code, out, err = nemoflow(command, *([export, blend] if command == "diff" else [blend]))
    assert code == 1
    lines = [line for line in err.splitlines() if message in line and blend.name in line]
    assert lines, err
    assert all(line.startswith("nemoflow: error: ") for line in err.splitlines())
    assert command == "verify" or (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", [b"", b'{"schema": 1, "kin', b"[]", b"\xff\xfe", b"null", b"9" * 5000, b"[" * 100_000])
def test_cut_and_foreign_records_are_named(nemoflow, tmp_path, text, command):
    _, export = pretraining(tmp_path, sources=1, shards=1)
    (blend,) = (tmp_path / "artifacts/blend").iterdir()
    for name in ("sealed.json", "artifact.json"):
        (blend / name).write_bytes(text)
    code, _, err = nemoflow(command, *([export, blend] if command == "diff" else [blend]))
    assert code == 1
    assert f"{blend.name}/" in err
    assert ": damaged: " in err
    assert all(line.startswith("nemoflow: error: ") for line in err.splitlines())


@pytest.mark.parametrize("command", ["show", "trace", "diff"])
def test_measures_and_attempts_of_wrong_types_are_named(nemoflow, tmp_path, command):
    _, export = pretraining(tmp_path, sources=1, shards=1)
    (trained,) = (tmp_path / "artifacts/pretrain").iterdir()
    (trained / "run.json").write_text('{"attempts": [3]}')
    state = trained / "at-100"
    code, _, err = nemoflow(command, *([export, export] if command == "diff" else [state]))
    assert (code, err.count("\n")) == (1, 1)
    assert f"{trained.name}/run.json: damaged: attempts is not what it should be" in err
    (trained / "run.json").unlink()
    change(state, lambda record: record.update(measures={"loss": "x"}))
    code, _, err = nemoflow("trace", state)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{trained.name}: its record is damaged: measures" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_parent_is_no_traceback(nemoflow, tmp_path, command):
    pretraining(tmp_path, sources=1, shards=1)
    (gone,) = (tmp_path / "artifacts/merge").iterdir()
    shutil.rmtree(gone)
    (blend,) = (tmp_path / "artifacts/blend").iterdir()
    code, out, err = nemoflow(command, *([blend, blend] if command == "diff" else [blend]))
    assert "Traceback" not in out + err
    assert code == (1 if command == "verify" else 0)  # files of archives are not there either
    if command in ("show", "trace", "verify"):
        assert gone.name in out


@pytest.mark.parametrize("command", [["show"], ["trace"], ["diff"], ["verify"], ["graph"]], ids=COMMANDS)
def test_what_is_told_as_data(nemoflow, tmp_path, command):
    """README, Lineage: --json of each is one JSON document on stdout."""
    _, export = pretraining(tmp_path, sources=1, shards=1)
    _, out, _ = nemoflow(*command, *([export] * (2 if command == ["diff"] else 1)), "--json")
    found = json.loads(out)
    if command == ["graph"]:
        states = {(node["kind"], node["state"]) for node in found["artifacts"]}
        assert ("hf_export", "complete") in states
        keys = [node["key"] for node in found["artifacts"]]
        assert all(entry["key"] in keys for node in found["artifacts"] for entry in node["inputs"])
        assert "# " not in nemoflow("graph", export, "--json", "-o", tmp_path / "x.json")[1]
        assert json.loads((tmp_path / "x.json").read_text()) == found


def test_recipes_that_differ_in_a_learning_rate(nemoflow, tmp_path):
    write_demo(tmp_path)
    locks.write("demo", [Path("config/recipes")], Store("artifacts"), lambda _: None)
    data = yaml.safe_load(Path("config/recipes/demo.yaml").read_text())
    data["stages"][0]["overrides"] = data["stages"][0].get("overrides", {}) | {"optimizer.lr": 0.003}
    Path("config/recipes/other.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    shutil.copy("config/recipes/demo.lock.json", "config/recipes/other.lock.json")
    code, out, _ = nemoflow("diff", "demo", "other")
    assert code == 0
    assert out == "phase1: overrides.optimizer.lr: 0.001 -> 0.003\n"
    assert nemoflow("diff", "demo", "demo")[1] == "demo and demo are the same\n"


def test_inputs_are_paired_by_what_they_are(nemoflow, tmp_path):
    """A source less, another revision of one, and other shares: each said once, and nothing of the rest."""
    archive = Archive(tmp_path)
    tokenizer = archive.seal("tokenizer", hub={"repo": "org/tokenizer", "commit": "0" * 40}, files=[])

    def blend(**commits: int) -> Path:
        parts = []
        for name, commit in commits.items():
            hub = {"repo": f"org/{name}", "commit": f"{commit:040x}"}
            source = archive.seal("source", hub=hub, format="parquet", files=[])
            shards = archive.seal("shards", source=source, tokenizer=tokenizer, first=0, shards=[[[0, 0, 1]]])
            parts.append(archive.seal("merge", parts=[shards], source=source))
        shares = [{"merge": part, "share": f"1/{len(parts)}"} for part in parts]
        return archive.directory(archive.seal("blend", parts=shares))

    code, out, _ = nemoflow("diff", blend(code=1, math=1, web=1), blend(web=1, math=2))
    assert code == 0
    first, second, *rest = out.splitlines()
    assert first.startswith("source/math-")
    assert first.endswith(f': hub.commit: "{1:040x}" -> "{2:040x}"')
    assert re.fullmatch(r'blend/.* / blend/.*: parts: "merge/code-[^"]*" -> not there', second)
    assert [line.split(": ")[1] for line in rest] == ["parts"]
    (shares,) = nemoflow("diff", blend(code=1, web=1), blend(code=1, web=1, math=1))[1].splitlines()[1:]
    assert shares.split(": ")[1] == "parts"


def test_artifacts_that_differ_in_setting_and_result(nemoflow, tmp_path):
    archive, export = pretraining(tmp_path, sources=1, shards=2)
    (one,) = (tmp_path / "artifacts/pretrain").glob("*/at-100")
    payload = json.loads((one / "sealed.json").read_text())["payload"]
    settings = {k: v for k, v in payload.items() if k != "kind"} | {"overrides": {"optimizer.lr": 0.002}}
    two = archive.seal("pretrain", at=100, measures={"iterations": 100, "loss": 2.4, "tokens": 10**6}, **settings)
    exported = archive.seal(
        "hf_export",
        measures={"parameters": 10**6},
        engine="megatron_bridge",
        of={"trajectory": two, "at": 100},
        tokenizer=payload["tokenizer"],
    )
    code, out, _ = nemoflow("diff", export, archive.directory(exported), "--json")
    assert code == 0
    assert [(d["what"], d["a"], d["b"]) for d in json.loads(out)] == [
        ("overrides.optimizer.lr", 0.001, 0.002),
        ("result loss", 2.5, 2.4),
    ]
    assert len(nemoflow("diff", export, archive.directory(exported))[1].splitlines()) == 2
