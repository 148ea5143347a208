"""The graph through the real `snakemake`: what runs again and what does not, resuming, states, names, faults.

The trainer is tests/sleep_engine.py; everything else is the product.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from graph import BASE, DATA, DEMO, STAGES, Work, copy_checkout, kill, read_until, suspended

from nemoflow.store import file_digest

DATA_JOBS = {"source": 4, "tokenizer": 1, "shards": 2, "merge": 2, "blend": 2, "index": 2, "chats": 1, "prompts": 1}
CHAIN = Counter(DATA_JOBS | {"pretrain": 2, "sft": 1, "rl": 1, "name": 1})


# -- what a finished run plans: nothing, unless what defines a result changed ------------------------------------------


def again(work: Work) -> None:
    pass


def touch_every_file(work: Work) -> None:
    paths = list(work.path.rglob("*"))
    random.Random(0).shuffle(paths)
    for minutes, path in enumerate(paths):
        stamp = time.time() - 60 * minutes
        os.utime(path, (stamp, stamp), follow_symlinks=False)


def touch_inputs_newer_than_outputs(work: Work) -> None:
    """And with no memory of what their content was."""
    chain = ["raw", *DATA, "pretrain", "sft", "rl"]
    for age, part in enumerate(chain):
        root = work.path / part if part == "raw" else work.path / "artifacts" / part
        for path in root.rglob("*"):
            os.utime(path, (time.time() - 60 * age,) * 2, follow_symlinks=False)
    os.utime(work.path / "rl/demo", (time.time() - 6000,) * 2, follow_symlinks=False)
    remove_snakemake(work)


def reorder_keys(work: Work) -> None:
    def reordered(value):
        if isinstance(value, dict):
            return {k: reordered(v) for k, v in reversed(value.items())}
        return [reordered(v) for v in value] if isinstance(value, list) else value

    text = work.recipe().read_text()
    changed = yaml.safe_dump(reordered(yaml.safe_load(text)), sort_keys=False)
    assert changed.index("stages:") < changed.index("tokenizer:")
    work.recipe().write_text(changed)


def respell_values(work: Work) -> None:
    text = work.recipe().read_text()
    for old, new in [
        ("0.001", "1.0e-3"),
        ("words: 1/2", "words: 0.5"),
        ("cap: 1/5", "cap: 0.2"),
        ("a chain", "# no\n  a"),
    ]:
        assert old in text
        text = text.replace(old, new)
    work.recipe().write_text("# a comment\n" + text)


def remove_snakemake(work: Work) -> None:
    shutil.rmtree(work.path / ".snakemake")


def change_what_is_no_identity(work: Work) -> None:
    work.set("sft", save_interval=3, milestones=[12], overrides={"sleep.seconds": 0.5})
    work.set("phase1", resources={"gpus_per_node": 2}, keep={"last": 5}, guard={"spike": None})


def rename_stage(work: Work) -> None:
    text = work.recipe().read_text()
    work.recipe().write_text(text.replace("name: phase1", "name: warmup").replace("from: phase1", "from: warmup"))


def add_recipe(work: Work) -> None:
    work.recipe("another").write_text(DEMO.replace("0.001", "0.5"))


def break_another_recipe(work: Work) -> None:
    work.recipe("another").write_text("stages: [")


def delete_another_recipe(work: Work) -> None:
    add_recipe(work)
    work.recipe("another").unlink()


def remove_raw_files(work: Work) -> None:
    """Raw texts that went to an archive: what was made from them stays."""
    shutil.rmtree(work.path / "raw")


@pytest.mark.parametrize(
    "change",
    [
        again,
        touch_every_file,
        touch_inputs_newer_than_outputs,
        reorder_keys,
        respell_values,
        remove_snakemake,
        change_what_is_no_identity,
        rename_stage,
        add_recipe,
        break_another_recipe,
        delete_another_recipe,
        remove_raw_files,
    ],
)
def test_a_finished_run_plans_nothing_after(demo: Work, change):
    change(demo)
    attempts, sealed = demo.attempts(), demo.sealed()
    assert demo.planned("rl/demo") == Counter()
    demo.run("rl/demo")
    assert (demo.attempts(), demo.sealed()) == (attempts, sealed)


def test_the_first_run_does_each_thing_once(finished: Work, fresh: Work):
    assert fresh.planned("rl/demo") == CHAIN
    assert set(finished.attempts().values()) == {1}
    assert Counter(p.partition("/")[0] for p in finished.attempts()) == CHAIN - Counter(["name"])


def test_code_comments_and_commits_plan_nothing(finished: Work, tmp_path):
    work = finished.copy(tmp_path / "work")
    work.checkout = copy_checkout(tmp_path / "checkout")
    git = ["git", "-C", str(work.checkout), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for path in [work.checkout / "Snakefile", *work.checkout.rglob("*.smk"), *work.checkout.rglob("*.py")]:
        text = path.read_text()
        path.write_text(f"{text}\n# a comment\n" if path.suffix != ".py" else f"# a comment\n{text}")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a comment in every script"], check=True)
    attempts = work.attempts()
    assert work.planned("rl/demo") == Counter()
    work.run("rl/demo")
    assert work.attempts() == attempts


def test_a_fresh_clone_with_copied_artifacts_plans_names_only(finished: Work, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for part in ("artifacts", "config", "raw"):  # in this order: the raw files are the newest
        subprocess.run(["cp", "-r", str(finished.path / part), str(clone)], check=True)
    work = Work(clone)
    sealed = work.sealed()
    assert work.planned("rl/demo") == {"name": 1}
    work.run("rl/demo")
    assert work.sealed() == sealed


def test_a_copied_recipe_shares_everything(demo: Work):
    shutil.copy(demo.recipe("demo"), demo.recipe("copy"))
    assert "sources.words" in demo.refused("rl/copy")
    demo.nemoflow("lock", "copy", check=True)
    assert demo.planned("rl/copy") == {"name": 1}
    demo.run("rl/copy")
    demo.recipe("demo").unlink()  # and the original may go
    assert demo.planned("rl/copy") == Counter()
    demo.run("rl/copy")


def test_a_recipe_that_differs_in_rl_shares_everything_before(demo: Work):
    demo.recipe("variant").write_text(
        "extends: demo\nstages:\n  - {name: rl, overrides: {sleep.temperature: 0.7}, until: 6}\n"
    )
    assert demo.planned("rl/variant") == {"rl": 1, "name": 1}
    attempts = demo.attempts()
    demo.run("rl/variant")
    new = demo.attempts().keys() - attempts.keys()
    assert [p.partition("/")[0] for p in new] == ["rl"]
    assert {p: demo.attempts()[p] for p in attempts} == attempts
    assert demo.planned("rl/demo", "rl/variant") == Counter()


def test_a_changed_sft_makes_a_new_version_and_changing_back_finds_the_old(demo: Work):
    text, old, sealed = demo.recipe().read_text(), (demo.path / "rl/demo").readlink(), demo.sealed()
    demo.set("sft", overrides={"optimizer.lr": 0.01})
    assert demo.planned("rl/demo") == {"sft": 1, "rl": 1, "name": 1}
    demo.run("rl/demo")
    new = (demo.path / "rl/demo").readlink()
    assert new != old
    assert sealed.items() <= demo.sealed().items()
    assert len(demo.sealed()) == len(sealed) + 2

    demo.recipe().write_text(text)
    assert demo.planned("rl/demo") == {"name": 1}
    assert not os.path.lexists(demo.path / "rl/demo"), "a name that shows something else is gone at once"
    demo.run("rl/demo")
    assert (demo.path / "rl/demo").readlink() == old

    demo.set("sft", overrides={"optimizer.lr": 0.01})
    shutil.rmtree(demo.path / ".snakemake")
    assert demo.planned("rl/demo") == {"name": 1}
    demo.run("rl/demo")
    assert (demo.path / "rl/demo").readlink() == new


def test_blessing_a_stale_name_by_touch_does_not_last(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01})
    demo.snakemake("--touch", "rl/demo")
    demo.run("rl/demo")


# -- jobs and recipes are apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "executor", [(), ("--executor", "spawn", "--jobs", "2", "--seconds-between-status-checks", "1")]
)
def test_recipes_edited_broken_and_deleted_while_jobs_run_and_wait(demo: Work, executor):
    """`spawn` reads the Snakefile again in every job, as a cluster does."""
    text = demo.recipe().read_text()
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.15})
    edited = demo.recipe().read_text()
    running = demo.start(*executor, "rl/demo")
    sft = demo.wait_for("sft", 2)
    assert json.loads((sft / "request.json").read_text())["overrides"]["sleep.seconds"] == 0.15
    demo.recipe().write_text(text.replace("0.001", "0.9").replace("grpo", "dpo"))
    time.sleep(0.3)
    demo.recipe().write_text("stages: [half a")
    demo.recipe("demo").with_suffix(".lock.json").unlink()
    time.sleep(0.3)
    demo.recipe().unlink()
    shutil.rmtree(demo.path / "raw")
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0, printed
    assert "Traceback" not in printed

    Work.new(demo.path.parent / "again").copy(demo.path.parent / "restored")
    shutil.copytree(demo.path.parent / "again/config", demo.path / "config", dirs_exist_ok=True)
    shutil.copytree(demo.path.parent / "again/raw", demo.path / "raw")
    demo.recipe().write_text(edited)
    assert demo.planned("rl/demo") == Counter()
    demo.check_today("rl/demo")
    assert demo.iterations(sft) == list(range(1, 13))


def test_a_second_run_waits_for_the_first_and_nothing_is_trained_twice(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.1})
    first = demo.start("rl/demo")
    sft = demo.wait_for("sft", 2)
    _, trainer = demo.owners(sft)
    with suspended(trainer):
        second = demo.start("rl/demo")
        read_until(second, "another run is working on this")
    for run in (first, second):
        printed, _ = run.communicate(timeout=120)
        assert run.returncode == 0, printed
        assert "Traceback" not in printed
    assert demo.iterations(sft) == list(range(1, 13))
    assert demo.iterations(demo.trajectory("rl/demo")) == list(range(1, 9))
    assert set(demo.attempts().values()) == {1}
    demo.check_today("rl/demo")


# -- killed and resumed ------------------------------------------------------------------------------------------------


def test_kill_9_of_everything_resumes_from_the_newest_checkpoint(demo: Work):
    demo.set("phase2", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.1})
    running = demo.start("rl/demo")
    phase2 = demo.wait_for("pretrain", 28 + 4)
    kill(running)
    before = demo.iterations(phase2)
    newest = max(int(p.name) for p in (phase2 / "checkpoints").glob("[0-9]*"))
    assert newest >= 30
    assert before == list(range(21, before[-1] + 1))
    assert demo.planned("rl/demo") == {"pretrain": 1, "sft": 1, "rl": 1, "name": 1}
    assert f"phase2 of demo to 40: resume, {newest} of 40 done" in demo.snakemake("-n", "pretrain/demo").stdout
    printed = demo.run("rl/demo")
    assert f"resumes at iteration {newest} of 40" in printed
    assert demo.iterations(phase2) == before + list(range(newest + 1, 41))
    outcomes = [a.get("outcome") for a in json.loads((phase2 / "run.json").read_text())["attempts"]]
    assert outcomes == ["died", "done"]
    assert demo.planned("rl/demo") == Counter()


def test_kill_9_of_the_driver_alone_leaves_a_trainer_that_the_next_run_waits_for(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.1})
    first = demo.start("sft/demo")
    sft = demo.wait_for("sft", 2)
    driver, trainer = demo.owners(sft)
    with suspended(trainer):
        driver.kill()
        first.communicate(timeout=60)
        assert first.returncode != 0
        second = demo.start("sft/demo")
        read_until(second, f"another run is working on this (process {trainer.pid})")
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 0, printed
    demo.check_today("sft/demo")
    assert demo.iterations(sft) == list(range(1, 13)), "the orphan trained to the end, and nothing again"


def test_kill_9_of_snakemake_alone_lets_the_job_end_and_its_artifact_counts(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.1})
    running = demo.start("sft/demo")
    sft = demo.wait_for("sft", 2)
    driver, _ = demo.owners(sft)
    running.kill()
    running.wait()
    assert driver.is_running()
    psutil.wait_procs([driver], timeout=60)
    assert (sft / "at-12/artifact.json").exists()
    assert demo.planned("sft/demo") == {"name": 1}
    demo.run("sft/demo")
    assert demo.iterations(sft) == list(range(1, 13))


def test_an_interrupt_ends_the_trainer_and_the_next_run_resumes(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.3})
    running = demo.start("sft/demo")
    sft = demo.wait_for("sft", 5)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0, printed
    assert "Traceback" not in printed
    left = [p for p in psutil.process_iter(["cmdline"]) if str(sft) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    before = demo.iterations(sft)
    demo.run("sft/demo")
    assert demo.iterations(sft) == before + list(range(5, 13))


def test_a_trainer_that_ends_without_its_checkpoint_fails(demo: Work):
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.end_at": 6})
    assert "ended without error before iteration 12, and without its checkpoint" in demo.refused("sft/demo")
    assert not os.path.lexists(demo.path / "sft/demo")
    demo.set("sft", overrides={"sleep.end_at": 0, "sleep.fail_at": 7})
    assert "told to fail at 7" in demo.refused("sft/demo")
    demo.set("sft", overrides={"sleep.fail_at": 0})
    demo.run("sft/demo")
    assert demo.iterations(demo.trajectory("sft/demo")) == [1, 2, 3, 4, 5, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12]


# -- states of a trajectory --------------------------------------------------------------------------------------------


def test_until_raised_goes_on_and_lowered_to_a_kept_state_trains_nothing(demo: Work):
    (sft,) = (demo.path / "artifacts/sft").iterdir()
    demo.set("sft", until=18)
    assert demo.planned("rl/demo") == {"sft": 1, "rl": 1, "name": 1}
    demo.run("rl/demo", "sft/demo")
    assert demo.iterations(sft) == list(range(1, 19))
    assert demo.trajectory("sft/demo") == sft

    demo.set("sft", until=12)  # the end of the first run is kept
    assert demo.planned("rl/demo", "sft/demo") == {"name": 2}
    demo.run("rl/demo", "sft/demo")
    assert (demo.path / "sft/demo").readlink().name == "at-12"

    demo.set("sft", until=8)  # no one asked for it, but its checkpoint is there
    assert demo.planned("sft/demo") == {"sft": 1, "name": 1}
    demo.run("sft/demo")
    assert demo.iterations(sft) == list(range(1, 19))

    demo.set("sft", until=7)
    before = demo.state()
    for arguments in (["-n", "sft/demo"], ["sft/demo"]):
        message = demo.refused(*arguments)
        assert "state 7" in message
        assert "4, 8, 12, 16, 18" in message
    assert demo.state().keys() == before.keys() - {str(demo.path / "sft/demo")}


def test_until_lowered_to_a_milestone_plans_names_only(demo: Work):
    demo.set("phase1", until=10)
    assert demo.planned("pretrain/demo@phase1") == {"name": 1}
    demo.run("pretrain/demo@phase1")
    assert (demo.path / "pretrain/demo@phase1").readlink().name == "at-10"


def test_raising_phase_1_makes_another_phase_2_and_goes_on_in_phase_1(demo: Work):
    demo.set("phase1", until=30)
    attempts = demo.attempts()
    assert demo.planned("pretrain/demo") == {"index": 1, "pretrain": 2, "name": 1}
    demo.run("pretrain/demo", "pretrain/demo@phase1")
    assert demo.iterations(demo.trajectory("pretrain/demo@phase1")) == list(range(1, 31))
    assert demo.iterations(demo.trajectory("pretrain/demo")) == list(range(31, 41))
    assert len(demo.attempts()) == len(attempts) + 2, "phase 2's other order, and its training"


@pytest.mark.parametrize("at", [10, 15])
def test_a_branch_from_a_kept_state_trains_the_branch_only(demo: Work, at: int):
    """10 is a milestone, 15 a checkpoint that no one asked for and that is only sealed now."""

    def branch(data):
        stage = data["stages"]["phase1"] | {"name": "branch", "until": 25, "overrides": {"optimizer.wd": 0.1}}
        data["stages"]["branch"] = stage | {"init": {"from": "phase1", "at": at, "carry": "all"}, "milestones": []}

    demo.edit(branch)
    before = demo.attempts()
    parent = next(
        demo.path / "artifacts" / p
        for p in before
        if p.startswith("pretrain/") and demo.iterations(demo.path / "artifacts" / p)[0] == 1
    )
    sealing = 0 if at == 10 else 1
    assert demo.planned("pretrain/demo@branch") == {"index": 1, "pretrain": 1 + sealing, "name": 1}
    demo.run("pretrain/demo@branch")
    assert demo.iterations(demo.trajectory("pretrain/demo@branch")) == list(range(at + 1, 26))
    assert demo.iterations(parent) == list(range(1, 21))
    assert (
        json.loads((demo.path / "pretrain/demo@branch/artifact.json").read_text())["measures"]["iterations"] == 25 - at
    )


def test_a_rule_chooses_the_state_that_goes_on(demo: Work):
    def choose(best: str, metric: str = "loss"):
        def change(data):
            rule = {"metric": metric, "best": best}
            data["stages"]["pick"] = {"name": "pick", "kind": "select", "of": {"stage": "phase1"}} | rule
            data["stages"]["phase2"]["init"] = {"from": "pick", "carry": "weights"}

        return change

    demo.edit(choose("lowest"))
    demo.run("select/demo", "pretrain/demo@phase2", "pretrain/demo@phase1")
    trained = demo.trajectory("pretrain/demo@phase1")
    assert (demo.path / "select/demo/checkpoint").samefile(trained / "at-20/checkpoint")
    measures = json.loads((demo.path / "select/demo/sealed.json").read_text())["measures"]
    assert measures == {"at": 20, "metric": "loss", "best": "lowest", "values": {"10": 1.0, "20": 0.5}}
    assert demo.nemoflow("verify", "--deep", "select/demo").returncode == 0
    demo.edit(choose("highest"))
    assert demo.planned("pretrain/demo@phase2") == {"select_state": 1, "pretrain": 1, "name": 1}
    demo.run("select/demo")
    assert (demo.path / "select/demo/checkpoint").samefile(trained / "at-10/checkpoint")
    shown = demo.nemoflow("show", "select/demo").stdout
    assert "iteration 10: loss 1" in shown
    demo.edit(choose("highest", "reward"))
    message = demo.snakemake("select/demo").stdout
    assert re.search(r"at-10: has no 'reward', .*; it measured iterations, loss, tokens", message), message


def test_an_edit_rolls_back_to_a_kept_state_and_trains_what_follows(demo: Work):
    demo.run("pretrain/demo")
    before = demo.trajectory("pretrain/demo")
    demo.set("phase2", edits=[{"at": 30, "skip": 2, "overrides": {"optimizer.lr": 0.0005}}])
    assert demo.planned("rl/demo", "pretrain/demo") == {"pretrain": 2, "sft": 1, "rl": 1, "name": 2}
    output = demo.run("rl/demo", "pretrain/demo")
    assert "pretrain phase2 of demo to 30: reached 30; is sealed, without training" in output
    assert "pretrain phase2 of demo to 40: new, iterations 31 to 40" in output
    after = demo.trajectory("pretrain/demo")
    assert after != before
    assert demo.iterations(after) == list(range(31, 41))
    assert demo.iterations(before) == list(range(21, 41)), "what was trained stays where it is"
    demo.set("phase2", edits=[])
    assert demo.planned("rl/demo") == {"name": 1}, "taking the edit back finds the old one"


def test_an_edit_of_a_state_that_was_not_kept_is_refused(demo: Work):
    demo.set("phase2", edits=[{"at": 33}])
    message = demo.refused("-n", "rl/demo")
    assert "phase2 of demo: state 33: training has passed it, at 40, and kept 25, 30, 35, 40; choose one" in message


def test_a_branch_from_a_state_that_was_not_kept_is_refused(demo: Work):
    demo.set("phase2", init={"from": "phase1", "at": 13, "carry": "all"})
    message = demo.refused("pretrain/demo")
    assert "13" in message
    assert "5, 10, 15, 20" in message


def test_states_asked_for_together_are_trained_once_and_in_order(fresh: Work):
    fresh.run("pretrain/demo@phase1:10", "pretrain/demo@phase1", "tokenizer/demo")
    phase1 = fresh.trajectory("pretrain/demo@phase1")
    assert (fresh.path / "pretrain/demo@phase1:10").resolve() == phase1 / "at-10"
    assert fresh.iterations(phase1) == list(range(1, 21))
    assert "state 11 is neither" in fresh.refused("pretrain/demo@phase1:11")
    assert fresh.planned("pretrain/demo@phase1:10", "pretrain/demo@phase1") == Counter()


# -- names and targets -------------------------------------------------------------------------------------------------


def test_partial_targets_make_what_they_need_and_no_more(fresh: Work):
    assert fresh.planned("tokenizer/demo") == {"source": 2, "tokenizer": 1, "name": 1}
    assert fresh.planned("data/demo@sft") == {"source": 2, "tokenizer": 1, "chats": 1, "name": 1}
    fresh.run("data/demo")
    assert fresh.links("data/demo") == ["phase1", "phase2", "rl", "sft"]
    assert fresh.planned("pretrain/demo@phase1") == {"pretrain": 1, "name": 1}
    assert fresh.planned("sft/demo") == {"pretrain": 2, "sft": 1, "name": 1}
    assert fresh.planned("data/demo") == Counter()


def test_data_follows_the_recipe(demo: Work):
    demo.run("data/demo")
    old = (demo.path / "data/demo/sft").readlink()
    demo.set("sft", data={"chats": {"sums": 2}, "pack_size": 128})
    assert demo.planned("data/demo") == {"chats": 1, "name": 1}
    demo.run("data/demo")
    assert (demo.path / "data/demo/sft").readlink() != old
    demo.edit(lambda data: data["stages"].pop("rl"))
    assert demo.planned("data/demo") == {"name": 1}
    demo.run("data/demo")
    assert demo.links("data/demo") == ["phase1", "phase2", "sft"]


def test_snakemake_alone_prints_the_targets_and_a_broken_recipe_hides_none(demo: Work):
    demo.recipe("broken").write_text("stages: [")
    done = demo.snakemake()
    assert done.returncode == 0, done.stdout
    for name in ("rl/demo", "pretrain/demo@phase1:10", "data/demo@sft", "hf_export/demo"):
        assert f"\n  {name}\n" in done.stdout
    assert "a chain of sleeps" in done.stdout
    assert "broken.yaml:1: " in done.stdout
    assert "Traceback" not in done.stdout


def test_until_and_omit_from_stop_early_without_a_complaint(fresh: Work):
    done = fresh.snakemake("rl/demo", "--until", "shards")
    assert done.returncode == 0, done.stdout
    assert "nemoflow: error" not in done.stdout
    assert Counter(p.partition("/")[0] for p in fresh.attempts()) == {"source": 3, "tokenizer": 1, "shards": 2}
    done = fresh.snakemake("rl/demo", "--omit-from", "sft")
    assert done.returncode == 0, done.stdout
    assert "sft" not in {p.partition("/")[0] for p in fresh.attempts()}
    assert sum(p.startswith("pretrain/") for p in fresh.attempts()) == 2
    fresh.run("rl/demo")
    assert set(fresh.attempts().values()) == {1}


def test_summary_tells_what_is_there_and_what_would_be_made(demo: Work):
    done = demo.snakemake("rl/demo", "--summary")
    assert done.returncode == 0, done.stdout
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 5][1:]
    assert {row[2] for row in rows} == STAGES - {"hf_export"} | {"name"}
    assert {row[-1] for row in rows} == {"no update"}
    demo.set("sft", overrides={"optimizer.lr": 0.01})
    printed = demo.snakemake("rl/demo", "--summary").stdout
    missing = [line.split("\t")[2] for line in printed.splitlines() if line.split("\t")[4:5] == ["missing"]]
    assert sorted(missing) == ["name", "rl", "sft"]


@pytest.mark.parametrize("options", [["-R", "sft"], ["-F"], ["--forcerun", "pretrain"], ["--rerun-triggers", "code"]])
def test_what_would_make_finished_artifacts_again_is_refused_with_the_way_out(demo: Work, options):
    before = demo.state()
    message = demo.refused("rl/demo", *options)
    if options[0] == "--rerun-triggers":
        assert "code" in message
        assert "mtime and params" in message
    else:
        assert "`version:`" in message
    assert demo.state() == before


def test_raising_the_version_trains_anew_and_keeps_the_old(demo: Work):
    sealed = demo.sealed()
    demo.set("sft", version=2)
    assert demo.planned("rl/demo") == {"sft": 1, "rl": 1, "name": 1}
    demo.run("rl/demo")
    assert sealed.items() <= demo.sealed().items()


def test_deleting_all_output_costs_seconds_not_training(demo: Work):
    attempts, sealed, metrics = (
        demo.attempts(),
        demo.sealed(),
        {p: p.read_bytes() for p in demo.path.rglob("metrics.jsonl")},
    )
    done = demo.snakemake("rl/demo", "--delete-all-output")
    assert done.returncode == 0, done.stdout
    assert not os.path.lexists(demo.path / "rl/demo")
    assert [p.parent.name for p in (demo.path / "artifacts").rglob("artifact.json")] == ["at-10"]  # no one asks for it
    demo.run("rl/demo")
    assert demo.attempts() == attempts
    assert demo.sealed() == sealed
    assert {p: p.read_bytes() for p in metrics} == metrics
    for path in sealed:
        record = (demo.path / path).with_name("artifact.json")
        assert record.read_text() == sealed[path]


def test_forcing_a_target_publishes_its_record_again(demo: Work):
    attempts = demo.attempts()
    artifact = str((demo.path / "rl/demo").resolve().relative_to(demo.path) / "artifact.json")
    demo.run("--force", artifact)
    assert demo.attempts() == attempts


def test_a_path_with_spaces_and_another_directory(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    work = Work.new(tmp_path / "a work (1) with 'spaces'")
    here, work.path = work.path, elsewhere
    done = work.snakemake("--directory", str(here), "sft/demo", "data/demo")
    work.path = here
    assert done.returncode == 0, done.stdout
    work.check_today("sft/demo", "data/demo")
    assert list(elsewhere.iterdir()) == []
    assert work.planned("sft/demo", "data/demo") == Counter()


def test_a_checkout_with_spaces(fresh: Work, tmp_path):
    fresh.checkout = copy_checkout(tmp_path / "a check out's")
    fresh.run("tokenizer/demo")


def test_an_artifact_path_is_a_target_too(demo: Work):
    demo.snakemake("-n", "rl/demo")
    artifact = (demo.path / "rl/demo").resolve().relative_to(demo.path) / "artifact.json"
    shutil.rmtree(demo.path / artifact.parents[1])
    assert demo.planned(str(artifact)) == {"rl": 1}
    demo.run(str(artifact))
    assert (demo.path / artifact).exists()
    demo.check_today("rl/demo")


def test_an_artifact_that_was_deleted_is_made_again(demo: Work):
    """A dangling link is no target; and exit 0 never stands for something that is not there."""
    rl = demo.trajectory("rl/demo")
    shutil.rmtree(rl)
    assert demo.planned("rl/demo")["rl"] == 1
    demo.run("rl/demo")
    assert demo.iterations(rl) == list(range(1, 9))


def test_a_deleted_upstream_artifact_is_not_missed_while_nobody_needs_it(demo: Work):
    for trajectory in (demo.path / "artifacts/pretrain").iterdir():
        shutil.rmtree(trajectory)
    assert demo.planned("rl/demo") == Counter()
    demo.run("rl/demo")
    demo.set("rl", overrides={"optimizer.lr": 0.5})
    assert demo.planned("rl/demo") == {"rl": 1, "name": 1}
    demo.run("rl/demo")
    demo.set("sft", overrides={"optimizer.lr": 0.5})
    assert demo.planned("rl/demo") == {"pretrain": 2, "sft": 1, "rl": 1, "name": 1}
    demo.run("rl/demo")


def test_the_graph_is_drawn(demo: Work):
    dag = subprocess.run(**demo._command("rl/demo", "--dag", "mermaid-js"), capture_output=True, text=True, check=True)
    assert "flowchart" in dag.stdout
    assert dag.stdout.count("pretrain - id:") == 2
    rules = subprocess.run(**demo._command("rl/demo", "--rulegraph"), capture_output=True, text=True, check=True)
    assert rules.stdout.startswith("digraph")
    assert {f'label = "{rule}"' in rules.stdout for rule in CHAIN} == {True}


def test_the_guard_fails_a_run_whose_target_is_gone_at_the_end(demo: Work):
    demo.run("tokenizer/demo")
    (demo.path / "tokenizer/demo").unlink()
    demo.set("sft", overrides={"optimizer.lr": 0.01, "sleep.seconds": 0.2})
    running = demo.start("tokenizer/demo", "sft/demo", "--jobs", "1", "--prioritize", "tokenizer/demo")
    demo.wait_for("sft", 2)
    (demo.path / "tokenizer/demo").unlink()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0, printed
    assert "nemoflow: error: finished, yet these do not show today's artifact: tokenizer/demo" in printed


def test_the_plan_says_what_each_job_would_do(demo: Work):
    demo.set("sft", until=18)
    printed = demo.snakemake("-n", "rl/demo").stdout
    assert "sft of demo to 18: resume, 12 of 18 done" in printed
    assert "rl of demo to 8: new, iterations 1 to 8" in printed
    assert not list(demo.path.glob("artifacts/sft/*/wanted/18")), "a dry run leaves no wishes behind"
    shutil.rmtree(demo.path / "artifacts/merge")  # what is not there, and not needed
    targets = ["rl/demo", "pretrain/demo@phase2", "seal/demo@phase1"]
    printed = demo.snakemake("-n", *targets).stdout
    whole = printed[printed.index("Plan:") :].split("\n\n")[0]
    assert len(whole.splitlines()) == 4
    assert demo.nemoflow("plan", *targets).stdout.strip() == whole
    told = json.loads(demo.nemoflow("plan", "--json", *targets).stdout)
    assert [f"  {job['title']}: {job['does']}" for job in told["jobs"]] == whole.splitlines()[1:]
    assert demo.nemoflow("plan", "data/demo").stdout == "Nothing to be done: all of it is there.\n"
    assert "raw: write KIND/RECIPE" in demo.nemoflow("plan", "raw").stderr


def test_the_plan_of_all_is_what_snakemake_plans(fresh: Work):
    printed = fresh.snakemake("-n", "rl/demo").stdout
    whole = printed[printed.index("Plan:") :].split("\n\n")[0]
    assert len(whole.splitlines()) > 15
    assert fresh.nemoflow("plan", "rl/demo").stdout.strip() == whole


# -- bad input ---------------------------------------------------------------------------------------------------------


def recipe(old: str, new: str):
    def change(work: Work) -> None:
        text = work.recipe().read_text()
        assert old in text
        work.recipe().write_text(text.replace(old, new, 1))

    return change


BAD = {
    "unknown key": (
        recipe("vocab_size", "vocab_sizes"),
        r"demo.yaml: tokenizer.vocab_sizes: unknown key.*'vocab_size'",
    ),
    "wrong type": (recipe("until: 12", "until: soon"), r"demo.yaml: stages\[sft\].until: 'soon': .*integer"),
    "number in disguise": (recipe("0.001", "1e-3"), r"overrides.sleep_engine.optimizer.lr: 1e-3 .*write 1.0e-3"),
    "key twice": (recipe("vocab_size: 280", "vocab_size: 280, vocab_size: 290"), r"demo.yaml:2: .*'vocab_size'.*twice"),
    "no YAML": (recipe("stages:", "stages: ["), r"demo.yaml:\d+: "),
    "circle of extends": (recipe("description:", "extends: demo\ndescription:"), r"extends: a circle: demo -> demo"),
    "circle of init": (
        recipe("until: 20", "init: {from: phase2, carry: all}\n    until: 20"),
        r"init.from: a circle: phase1 -> phase2 -> phase1",
    ),
    "unknown stage": (recipe("from: phase2", "from: phase3"), r"stages\[sft\].init.from: no stage 'phase3'.*'phase2'"),
    "unknown source": (recipe("{sums: 1}", "{sum: 1}"), r"stages\[sft\].data.chats: no source 'sum'.*'sums'"),
    "extends a path": (
        recipe("description:", "extends: ../recipes/demo\ndescription:"),
        r"'../recipes/demo' cannot be a recipe's name",
    ),
    "stage twice": (recipe("name: phase2", "name: phase1"), r"stages\[phase1\]: two stages have this name"),
    "past the horizon": (recipe("until: 12", "until: 31"), r"stages\[sft\].until: 31 lies past .* horizon 30"),
    "shares": (recipe("words: 1/2", "words: 1/3"), r"stages\[phase2\].data.blend: the shares add up to 5/6, not to 1"),
    "unknown engine": (recipe("engine: sleep_engine", "engine: megatron_brige"), r"engine.*'megatron_bridge'"),
    "unlocked source": (
        lambda work: work.recipe().with_suffix(".lock.json").unlink(),
        r"demo.yaml: sources.words: 'raw/\*.jsonl' is not locked; run `nemoflow lock demo`",
    ),
    "changed file": (
        lambda work: (work.path / "raw/1.jsonl").write_text('{"text": "other"}\n'),
        r"raw/1.jsonl: changed since it was pinned in .*demo.lock.json",
    ),
    "changed file of the same size": (
        lambda work: (work.path / "raw/1.jsonl").write_text(
            (work.path / "raw/1.jsonl").read_text().replace("cat", "dog")
        ),
        r"raw/1.jsonl: changed since it was pinned in .*demo.lock.json",
    ),
    "missing file": (lambda work: (work.path / "raw/1.jsonl").unlink(), r"raw/1.jsonl is missing, which its lock pins"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_recipes_end_with_one_clear_error_and_nothing_written(fresh: Work, change, message):
    change(fresh)
    before = fresh.state().keys()
    said = fresh.refused("rl/demo")
    assert re.search(message, said), said
    assert {p for p in fresh.state().keys() - before if "/.stages/" not in p} == set()
    assert not (fresh.path / "rl").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("rl/dmo", "unknown recipe 'dmo': there is no dmo.yaml in config/recipes.*did you mean 'demo'"),
        ("rl/demo/more", "'demo/more' cannot be a recipe's name"),
        ("rl/..demo", "'..demo' cannot be a recipe's name"),
        ("sft/demo@rl", "sft/demo@rl: stage rl is rl: rl/demo@rl"),
        ("sft/demo@stf", "sft/demo@stf: .* has no stage 'stf'; did you mean 'sft'"),
        ("rl/demo:soon", "'soon' is no state"),
        ("data/demo:3", "data has no states"),
    ],
)
def test_bad_names_end_with_one_clear_error(fresh: Work, target, message):
    before = fresh.state()
    said = fresh.refused(target)
    assert re.search(message, said), said
    assert fresh.state() == before


@pytest.mark.parametrize("target", ["rl/../demo", "rl/..", "rl/", "../rl/demo", "stf/demo"])
def test_what_is_no_name_at_all_is_refused_by_snakemake(fresh: Work, target):
    before = fresh.state()
    done = fresh.snakemake(target)
    assert done.returncode != 0
    assert "MissingRuleException:\nNo rule to produce" in done.stdout
    assert "Traceback" not in done.stdout
    assert fresh.state() == before


def test_an_empty_corpus_is_refused(fresh: Work):
    for file in (fresh.path / "raw").rglob("*.jsonl"):
        file.write_text("")
    fresh.nemoflow("lock", "demo", check=True)
    message = fresh.refused("tokenizer/demo")
    assert "source" in message
    assert not list(fresh.path.glob("artifacts/source/jsonl*/sealed.json"))


def test_a_corrupt_shard_is_refused_before_training(demo: Work):
    shard = sorted(demo.path.glob("artifacts/merge/*/*.bin"), key=lambda p: p.stat().st_size)[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    demo.set("phase1", version=2)
    message = demo.refused("pretrain/demo@phase1")
    assert shard.name in message
    assert "has other bytes than it was sealed with" in message
    assert not os.path.lexists(demo.path / "pretrain/demo@phase1")
    shutil.rmtree(shard.parent)  # as the message advises: it is made again, and what needs it goes on
    assert demo.planned("pretrain/demo@phase1") == {"merge": 1, "blend": 1, "index": 1, "pretrain": 1, "name": 1}
    demo.run("pretrain/demo@phase1")


def test_a_truncated_checkpoint_is_not_started_from(demo: Work):
    weights = next(demo.trajectory("rl/demo").parents[1].glob("sft/*/checkpoints/12/weights"))
    weights.write_text(weights.read_text()[:10])
    demo.set("rl", version=2)
    message = demo.refused("rl/demo")
    assert "checkpoint/weights: has 10 bytes, sealed with" in message
    assert not os.path.lexists(demo.path / "rl/demo")


def test_a_full_disk_is_said_and_the_next_run_goes_on(fresh: Work, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.rmtree(fresh.path / "artifacts")
        (fresh.path / "artifacts").symlink_to(mount)
        fresh.set("phase1", overrides={"sleep.bytes": 1_500_000})
        message = fresh.refused("pretrain/demo@phase1")
        assert re.search("phase1 of demo: .*[Nn]o space left", message), message
        assert not os.path.lexists(fresh.path / "pretrain/demo@phase1")
        fresh.set("phase1", overrides={"sleep.bytes": 0})
        with contextlib.suppress(OSError), (mount / "ballast").open("ab", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        message = fresh.refused("pretrain/demo@phase1")
        assert re.search("[Nn]o space left", message), message
        subprocess.run(["mount", "-o", "remount,size=6m", str(mount)], check=True)
        fresh.run("pretrain/demo@phase1")

        fresh.edit(lambda data: data["sources"]["sums"]["args"].update(count=100_000))
        message = fresh.refused("data/demo@sft")
        assert re.search("source sums: no space left", message), message
        fresh.edit(lambda data: data["sources"]["sums"]["args"].update(count=200))
        fresh.run("data/demo@sft")
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_as_a_module_of_another_workflow(fresh: Work, tmp_path: Path):
    using = tmp_path / "using"
    shutil.copytree(BASE / "profiles", using / "profiles")
    module = f'module nemo:\n    snakefile: "{BASE}/Snakefile"\n\n\nuse rule * from nemo as nemo_*\n'
    (using / "Snakefile").write_text(module)
    fresh.checkout = using
    fresh.run("pretrain/demo@phase1")
    launch = next(fresh.path.glob("artifacts/pretrain/*/launch.json"))
    assert json.loads(launch.read_text())["title"] == "pretrain phase1 of demo"


# -- digests -----------------------------------------------------------------------------------------------------------


def test_seal_makes_digests_of_a_states_files(demo: Work):
    assert demo.planned("seal/demo@phase1:10") == {"seal": 1, "name": 1}
    demo.run("seal/demo@phase1:10")
    shown = demo.path / "seal/demo@phase1:10"
    found = json.loads((shown / "digests.json").read_text())
    state = shown.resolve()
    assert state.name == "at-10"
    assert [f["name"] for f in found["files"]] == ["checkpoint/weights"]
    assert found["files"][0]["sha256"] == file_digest(state / "checkpoint/weights")
    assert found["sealed"] == file_digest(state / "sealed.json")
    assert demo.planned("seal/demo@phase1:10") == Counter()
    assert demo.planned("rl/demo") == Counter(), "nothing consumes it"


def test_seal_names_the_file_that_is_not_what_was_sealed(demo: Work):
    weights = next(demo.path.glob("artifacts/pretrain/*/at-10/checkpoint/weights"))
    weights.write_bytes(weights.read_bytes() + b"x")
    message = demo.refused("seal/demo@phase1:10")
    assert "at-10/checkpoint/weights: has" in message
    assert "restore it, or choose another state" in message
