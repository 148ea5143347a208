"""nemoflow trace and diff: on archives of records alone."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml
from archives import pretraining
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
    assert out.count(" shards") + out.count("parts: shards") >= 10_000
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


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(schema=99), "schema: 99: this nemoflow reads up to 1; use a newer one"),
        (lambda r: r.pop("payload"), "damaged: payload is missing"),
        (
            lambda r: r["inputs"].append(
                {k: r[k] for k in ("kind", "label", "identity")} | {"role": "x", "sha256": ""}
            ),
            "comes from itself",
        ),
    ],
)
def test_bad_records_are_one_line(nemoflow, tmp_path, edit, message):
    _, export = pretraining(tmp_path, sources=1, shards=1)
    (blend,) = (tmp_path / "artifacts/blend").iterdir()
    change(blend, edit)
    for command in (("trace", export), ("diff", export, blend)):
        code, out, err = nemoflow(*command)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert blend.name in err
        assert message in err


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
