"""Training with the real Megatron-Bridge, at a size of seconds: states, resuming to the digit, chaining, refusals."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, Run, pretrain, sft

from nemoflow.engines.megatron_bridge import checkpoints
from nemoflow.engines.megatron_bridge.data import Window, provider
from nemoflow.engines.megatron_bridge.train import explain, forget
from nemoflow.errors import NemoflowError

pytest_plugins = ["megatron_fixtures"]


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in directory.rglob("*")}


def test_states_kept_losses_measured_and_nothing_written_beside_the_data(server, data, tmp_path):
    run = pretrain(server, data, tmp_path, horizon=9, stop=9, wanted=[3], save_interval=4)
    before = tree(data)
    run.train()
    assert list(checkpoints.states(run.checkpoints)) == [3, 4, 8, 9]
    assert tree(data) == before
    digits = run.digits()
    assert list(digits) == list(range(1, 10))
    assert [d[3] for d in digits.values()] == [n * 4 * 64 for n in range(1, 10)]
    assert [d[1] for d in digits.values()][:5] == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert list(run.validation()) == [0, 5, 9]
    assert run.validation()[9] < run.validation()[0]


def test_training_learns(straight):
    losses = [d[0] for d in straight.digits().values()]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]


def test_a_finished_stage_starts_nothing(straight):
    before = tree(straight.directory)
    straight.train()
    after = tree(straight.directory)
    assert {k: v for k, v in after.items() if "request" not in k and k != str(straight.directory)} == {
        k: v for k, v in before.items() if "request" not in k and k != str(straight.directory)
    }


def test_raising_the_stop_by_a_fifth_goes_on_with_the_same_digits(server, data, tmp_path, straight):
    run = pretrain(server, data, tmp_path).train(stop=20)
    run.train(stop=24)
    assert run.digits() == straight.digits()
    shared = run.validation().keys() & straight.validation().keys()
    assert shared == {0, 5, 10, 15, 20, 24}
    assert {n: run.validation()[n] for n in shared} == {n: straight.validation()[n] for n in shared}


def test_a_wanted_state_that_is_asked_for_while_training_is_kept(server, data, tmp_path):
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    (wanted / "2").touch()
    run = pretrain(server, data, tmp_path / "run", horizon=4, stop=4, wanted_directory=str(wanted)).train()
    assert list(checkpoints.states(run.checkpoints)) == [2, 4]


@pytest.mark.slow
def test_killed_between_saves(server, data, tmp_path, straight):
    run = pretrain(server, data, tmp_path, save_interval=4)
    run.kill_when(lambda: max(run.digits(), default=0) >= 11)
    assert max(checkpoints.states(run.checkpoints)) == 8
    run.train()
    assert run.digits() == straight.digits()
    assert run.validation() == straight.validation()


@pytest.mark.slow
def test_killed_during_a_save(server, data, tmp_path, straight):
    run = pretrain(server, data, tmp_path, save_interval=4)
    run.kill_when(lambda: run.checkpoint(12).exists())
    assert not (run.checkpoint(12) / checkpoints.COMPLETE).exists(), "the save ended before the kill"
    assert list(checkpoints.states(run.checkpoints)) == [4, 8]
    run.train()
    assert run.digits() == straight.digits()
    assert list(checkpoints.states(run.checkpoints)) == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("cut", ["run_config.yaml", "train_state.pt", "latest_train_state.pt"])
def test_whatever_a_kill_during_a_save_left_is_not_gone_on_from(server, data, tmp_path, straight, cut):
    """The moments a poll cannot hit: between the tracker and the configuration, and in the middle of the tracker."""
    run = pretrain(server, data, tmp_path)
    shutil.copytree(straight.checkpoint(10), run.checkpoint(10))
    shutil.copytree(straight.checkpoint(24), run.checkpoint(20))
    (run.checkpoint(20) / checkpoints.COMPLETE).unlink()
    tracker = run.checkpoints / "latest_train_state.pt"
    shutil.copy(straight.checkpoints / "latest_train_state.pt", tracker)
    damaged = tracker if cut.startswith("latest") else run.checkpoint(20) / cut
    damaged.write_bytes(damaged.read_bytes()[:100])
    run.train(stop=12)
    assert run.digits() == {n: d for n, d in straight.digits().items() if n in (11, 12)}
    assert not run.checkpoint(20).exists()


def second_phase(server, data, directory, straight, **request) -> Run:
    return pretrain(
        server,
        data,
        directory,
        blend=(("a", "1/5"), ("b", "4/5")),
        init={"checkpoint": str(straight.checkpoint(10)), "at": 10, "carry": "all"},
        start=10,
        **request,
    )


def test_a_second_phase_carries_everything_over(server, data, tmp_path, straight):
    run = second_phase(server, data, tmp_path / "once", straight).train()
    digits, one = run.digits(), straight.digits()
    assert list(digits) == list(range(11, 25))
    assert [d[1] for d in digits.values()] == [one[n][1] for n in digits], "one schedule over both phases"
    assert [d[3] for d in digits.values()] == [n * 4 * 64 for n in range(1, 15)], "its own tokens"
    assert digits[11][0] != one[11][0], "its own data"
    # Adam's moments came along: without them the first steps would be several times as long
    assert digits[12][2] < 3 * one[12][2]

    two = second_phase(server, data, tmp_path / "twice", straight).train(stop=15)
    two.train(stop=24)
    assert two.digits() == digits
    assert list(run.validation()) == [10, 15, 20, 24]


@pytest.mark.slow
def test_a_second_phase_killed_before_and_after_its_first_save(server, data, tmp_path, straight):
    whole = second_phase(server, data, tmp_path / "whole", straight).train()
    run = second_phase(server, data, tmp_path / "killed", straight, save_interval=4)
    run.kill_when(lambda: max(run.digits(), default=0) >= 11)
    assert not checkpoints.states(run.checkpoints)
    run.kill_when(lambda: max(run.digits(), default=0) >= 14)
    assert list(checkpoints.states(run.checkpoints)) == [12]
    run.train()
    assert run.digits() == whole.digits()


def test_sft_takes_the_weights_and_the_model_of_its_checkpoint(server, data, tmp_path, straight):
    before = tree(data)
    run = sft(server, data, tmp_path / "once", straight.checkpoint(24), save_interval=2).train()
    assert list(run.digits()) == list(range(1, 7))
    assert run.digits()[1][1] == 0, "its own schedule, from the start"
    assert run.validation()[0] < 0.95 * straight.validation()[0], "trained weights, not fresh ones"
    assert run.validation()[6] < run.validation()[0]
    assert "vocab_size: 384" in (run.checkpoint(6) / "run_config.yaml").read_text(), "300 tokens padded to 3 x 128"
    assert tree(data) == before
    two = sft(server, data, tmp_path / "twice", straight.checkpoint(24)).train(stop=3)
    two.train(stop=6)
    assert two.digits() == run.digits()


def test_evaluations_of_untouched_weights_agree(server, data, tmp_path):
    """With a learning rate of zero every evaluation must measure the same, but for the order of summing."""
    overrides = (
        MODEL | PRECISION | PRETRAIN | {"optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "optimizer.weight_decay": 0.0}
    )
    overrides |= {"validation.eval_interval": 1, "model.moe_router_bias_update_rate": 0.0}
    run = pretrain(server, data, tmp_path, overrides=overrides, horizon=4, stop=4).train()
    losses = list(run.validation().values())
    assert len(losses) == 5
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-5)


def test_another_architecture_is_refused(server, data, tmp_path, straight):
    run = second_phase(server, data, tmp_path, straight)
    wider = run.request["overrides"] | {"model.hidden_size": 48, "model.hybrid_layer_pattern": "MEM*"}
    said = run.fails(overrides=wider)
    assert "another architecture" in said
    assert "hidden_size 32 (here 48)" in said
    assert "hybrid_layer_pattern 'ME*M' (here 'MEM*')" in said
    assert not checkpoints.states(run.checkpoints)


def test_a_damaged_or_missing_checkpoint_is_refused(server, data, tmp_path, straight):
    copy = tmp_path / "copy" / "iter_0000010"
    shutil.copytree(straight.checkpoint(10), copy)
    run = second_phase(server, data, tmp_path / "run", straight)
    init = run.request["init"] | {"checkpoint": str(copy)}
    tensors = next(copy.glob("*.distcp"))
    os.truncate(tensors, tensors.stat().st_size // 2)
    assert f"{tensors}: " in run.fails(init=init)
    tensors.unlink()
    assert f"{tensors}: missing" in run.fails(init=init)
    shutil.rmtree(copy)
    assert f"{copy}: no such checkpoint" in run.fails(init=init)


def test_a_state_of_another_iteration_is_refused(server, data, tmp_path, straight):
    moved = tmp_path / "iter_0000010"
    shutil.copytree(straight.checkpoint(6), moved)
    run = second_phase(server, data, tmp_path / "run", straight)
    said = run.fails(init=run.request["init"] | {"checkpoint": str(moved)})
    assert "the checkpoint says iteration 6" in said


def test_a_changed_configuration_is_refused_and_a_changed_path_is_not(server, data, tmp_path):
    run = pretrain(server, data, tmp_path / "run", horizon=4, stop=4).train(stop=2)
    said = run.fails(overrides=run.request["overrides"] | {"optimizer.weight_decay": 0.2, "optimizer.adam_beta2": 0.9})
    assert "optimizer.adam_beta2" in said
    assert "optimizer.weight_decay: 0.1 then, 0.2 now" in said
    moved = shutil.copytree(data, tmp_path / "moved")
    elsewhere = json.loads(json.dumps(run.request["data"]).replace(str(data), str(moved)))
    run.train(data=elsewhere, tokenizer=str(moved / "tokenizer"), save_interval=3)
    assert list(checkpoints.states(run.checkpoints)) == [2, 3, 4]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.hiden_size", 64, "no setting 'hiden_size' in model; did you mean 'model.hidden_size'?"),
        ("modell.hidden_size", 64, "no section 'modell'; did you mean 'model'?"),
        ("model.hidden_size", "64", "'64' is a str; it must be a"),
        ("model.hidden_size", 64.5, "64.5 is a float; it must be a"),
        ("optimizer.lr", "1e-3", "'1e-3' is a str; it must be a"),
        ("model.params_dtype", "float33", "'float33' is no torch dtype"),
        ("model.bf16", 0, "0 is a int; it must be a bool"),
        ("scheduler.lr_decay_style", "wsd", "'wsd' is none of"),
        ("train.train_iters", 5, "a recipe cannot set this"),
        ("train.eval_iters", 5, "a recipe cannot set this: write validation.eval_iters"),
        ("checkpoint.finetune", True, "a recipe cannot set this"),
        ("dataset.seq_length", 128, "differs from model.seq_length"),
    ],
)
def test_a_wrong_override_is_one_clear_error(server, data, tmp_path, key, value, said):
    run = pretrain(server, data, tmp_path, horizon=2, stop=2)
    line = run.fails(overrides=run.request["overrides"] | {key: value})
    assert f"overrides.{key}: " in line
    assert said in line
    assert not list(run.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.micro_batch_size", 3, "must be divisible by eval_micro_batch_size"),
        ("train.global_batch_size", 5, "must be divisible by eval_micro_batch_size"),
        ("validation.eval_global_batch_size", 3, "eval_global_batch_size (3) must be divisible by"),
        ("model.num_layers", 5, "num_layers (5) does not match the number of layers"),
    ],
)
def test_overrides_that_contradict_each_other_are_one_clear_error(server, data, tmp_path, key, value, said):
    overrides = MODEL | PRECISION | PRETRAIN | {key: value}
    line = pretrain(server, data, tmp_path, overrides=overrides, horizon=2, stop=2).fails()
    assert "Megatron-Bridge refuses this configuration: " in line
    assert said in line


def test_a_wrong_recipe_function_is_one_clear_error(server, data, tmp_path):
    run = pretrain(server, data, tmp_path, horizon=2, stop=2)
    name = run.request["function"]
    assert "did you mean" in run.fails(function=name.replace("pretrain", "pretrian"))
    assert "no module 'nowhere'" in run.fails(function="nowhere.config")


def test_a_full_disk_is_one_clear_error(server, data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = pretrain(server, data, tmp_path / "run", horizon=2, stop=2, checkpoints=str(small / "checkpoints"))
        assert "no space left" in run.fails()
        assert not checkpoints.states(run.checkpoints)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_program_runs_by_hand(server, data, tmp_path, straight):
    """As the workflow starts it: a process of its own, two at a time without a port in common."""
    runs = [pretrain(server, data, tmp_path / name, stop=6, horizon=24) for name in ("one", "two")]
    environment = {**os.environ, "NEMOFLOW_CPU": "1", "NEMOFLOW_CPU_THREADS": "1"}
    children = []
    for run in runs:
        request = run.directory / "request.json"
        request.write_text(json.dumps(run.request))
        command = [sys.executable, "-m", "nemoflow.engines.megatron_bridge.train", str(request)]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for child, run in zip(children, runs, strict=True):
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output.decode()[-3000:]
        assert run.digits() == {n: d for n, d in straight.digits().items() if n <= 6}


def test_a_window_is_a_stream_from_its_own_start():
    window = Window(list("abcdef"), 100, 4)
    assert len(window) == 104
    assert [window[n] for n in range(100, 104)] == list("abcd")
    for index in (99, 104):
        with pytest.raises(IndexError):
            window[index]
    assert [Window(list("ab"), 0, 5)[n] for n in range(5)] == list("ababa")


def test_a_phase_asks_for_its_own_samples_only():
    asked = []

    def make(samples, config, tokenizer):
        asked.append((samples, config, tokenizer))
        return list(range(samples[0])), list(range(7)), None

    train, valid, test = provider(make, 160, 80, 8)((240, 1000, 1000), "config", tokenizer="t", pg_collection="pg")
    assert asked == [([80, 8, 0], "config", "t")]
    assert (len(train), train[160], train[239]) == (240, 0, 79)
    assert [valid[n] for n in range(len(valid))] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert test is None


def test_metrics_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 4, "loss": 1.0}\n{"iteration": 5, "loss": 2.0}\n{"iteration": 6, "lo')
    forget(path, after=4)
    assert path.read_text() == '{"iteration": 4, "loss": 1.0}\n'
    forget(path, after=None)
    assert path.read_text() == ""


def test_only_complete_checkpoints_count(tmp_path):
    for n in (9, 10, 100):
        directory = tmp_path / f"iter_{n:07d}"
        directory.mkdir()
        for name in checkpoints.REQUIRED:
            (directory / name).write_bytes(b"12345")
    (tmp_path / "iter_0000011.old").mkdir()
    assert checkpoints.states(tmp_path) == {}
    for n in (100, 9):
        checkpoints.mark_complete(tmp_path / f"iter_{n:07d}")
    assert checkpoints.states(tmp_path) == {9: tmp_path / "iter_0000009", 100: tmp_path / "iter_0000100"}
    assert checkpoints.remove_incomplete(tmp_path) == [tmp_path / "iter_0000010"]
    checkpoints.check(tmp_path / "iter_0000009")
    (tmp_path / "iter_0000009" / ".metadata").write_bytes(b"1234")
    with pytest.raises(NemoflowError, match=r"\.metadata: 4 bytes where 5 were saved"):
        checkpoints.check(tmp_path / "iter_0000009")


def test_a_full_disk_is_recognised_wherever_it_is_noticed():
    request = {"checkpoints": "/runs/x"}
    full = OSError(errno.ENOSPC, "No space left on device")
    error = RuntimeError("a worker failed")
    error.__cause__ = full
    assert "no space left on the disk of /runs/x" in explain(error, request)
    assert explain(RuntimeError("something else"), request) is None


def test_the_shim_is_not_needed_to_read_states():
    """The main process and the driver must stay light."""
    code = "import sys, nemoflow.engines.megatron_bridge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.cuda.is_available() in (True, False), "nothing in this process was replaced"
