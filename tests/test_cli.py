"""The command `nemoflow`."""

import json
import subprocess
import sys

import pytest
from graph import BASE, DEMO, Work, write_demo

from nemoflow import cli


@pytest.fixture
def nemoflow(tmp_path, monkeypatch, capsys):
    """A function that runs the command in a directory with the demo's recipe; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            cli.main(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_lock_says_what_it_wrote(nemoflow, tmp_path):
    code, out, err = nemoflow("lock", "demo")
    assert code == 0
    assert out == "demo: wrote config/recipes/demo.lock.json; commit it\n"
    assert "sources.words: 2 files, " in err
    assert json.loads((tmp_path / "config/recipes/demo.lock.json").read_text())["schema"] == 2
    code, out, _ = nemoflow("lock", "nano3-tiny")
    assert (code, out) == (0, "nano3-tiny: nothing to lock: every source is generated\n")


def test_check_tells_what_recipes_come_to(nemoflow):
    nemoflow("lock", "demo")
    code, out, _ = nemoflow("check", "demo")
    assert code == 0
    assert out.startswith("config/recipes/demo.yaml: fine\n")
    assert "  phase2: pretrain by sleep_engine, iterations 21 to 40 of 60, artifacts/pretrain/toy-" in out


def test_check_goes_through_all_recipes_and_fails_when_one_does(nemoflow, tmp_path):
    nemoflow("lock", "demo")
    (tmp_path / "config/recipes/a-broken-one.yaml").write_text("stages: [")
    code, out, err = nemoflow("check")
    assert code == 1
    assert "a-broken-one.yaml:1: " in err
    assert "demo.yaml: fine" in out
    assert "nano3-tiny.yaml: fine" in out, "those of the checkout too"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graph", "sft/demo"], "sources.words: 'raw/*.jsonl' is not locked; run `nemoflow lock demo`"),
        (["check", "demmo"], "unknown recipe 'demmo'"),
        (["lock", "a/b"], "'a/b' cannot be a recipe's name"),
        (["show", "sft/demmo"], "unknown recipe 'demmo'"),
        (["graph", "sft/demo@x"], "is not locked"),
    ],
)
def test_what_is_wrong_is_one_line(nemoflow, arguments, message):
    code, out, err = nemoflow(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("nemoflow: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["show", "stf/demo"], ["graph", "artifacts/x"], ["show", "demo"]])
def test_what_is_no_name_is_refused(nemoflow, arguments):
    nemoflow("lock", "demo")
    code, out, err = nemoflow(*arguments)
    assert (code, out) == (1, "")
    assert "KIND/RECIPE" in err


def test_show_and_graph_of_a_finished_run(finished: Work):
    shown = finished.nemoflow("show", "rl/demo", "tokenizer/demo")
    assert shown.returncode == 0, shown.stderr
    assert "sft of demo to 12" in shown.stdout
    assert "rl/demo -> ../artifacts/rl/grpo-" in shown.stdout
    chart = finished.nemoflow("graph", "--mermaid", "rl/demo")
    assert chart.returncode == 0, chart.stderr
    assert chart.stdout.startswith("flowchart TD\n")
    before = finished.state()
    finished.nemoflow("show", "rl/demo", check=True)
    assert finished.state() == before


def test_printing_targets_shows_a_broken_recipe_with_its_error(nemoflow, tmp_path, capsys):
    nemoflow("lock", "demo")
    (tmp_path / "config/recipes/broken.yaml").write_text(DEMO.replace("until: 12", "until: soon"))
    cli.print_targets([tmp_path / "config/recipes"])
    out = capsys.readouterr().out
    assert "broken: " in out
    assert "stages[sft].until: 'soon'" in out
    assert "demo: a chain of sleeps\n  tokenizer/demo\n" in out


def test_the_command_is_installed_and_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from nemoflow.cli import main; main()' check nano3-tiny | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=BASE, capture_output=True, text=True)
    assert done.stderr == ""
