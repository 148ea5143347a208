"""Going on from a state with something changed: rates, batch size, data left out; or with the optimizer alone.

What must be equal is compared digit by digit with one run that nothing was changed in.
"""

import shutil

import pytest
from megatron_fixtures import MODEL, PRECISION, PRETRAIN, Run, pretrain

pytest_plugins = ["megatron_fixtures"]

OVERRIDES = MODEL | PRECISION | PRETRAIN
LOSS, RATE = 0, 1


def edited(server, data, directory, straight: Run, overrides=(), **request) -> Run:
    """What an edit at state 10 of `straight` makes of it: its data goes on."""
    return pretrain(
        server,
        data,
        directory,
        overrides=OVERRIDES | dict(overrides),
        init={"checkpoint": str(straight.checkpoint(10)), "at": 10, "carry": "all"},
        start=10,
        **{"stream": 0, "data": straight.request["data"]} | request,
    )


def resumed(run: Run, at: int, directory) -> dict:
    """The digits of the same run, made in two slots of which the first ends at `at`."""
    again = Run(run.server, directory, **{k: v for k, v in run.request.items() if str(run.directory) not in str(v)})
    again.train(stop=at)
    return again.train().digits()


def test_an_edit_that_changes_nothing_gives_the_same_digits(server, data, tmp_path, straight):
    run = edited(server, data, tmp_path, straight).train()
    # Tokens are those of this trajectory
    assert [d[:3] for d in run.digits().values()] == [straight.digits()[n][:3] for n in range(11, 25)]


def test_a_new_learning_rate_keeps_optimizer_schedule_and_data(server, data, tmp_path, straight):
    half = {"optimizer.lr": 0.005, "optimizer.min_lr": 0.0005}
    run = edited(server, data, tmp_path / "once", straight, half).train()
    digits, before = run.digits(), straight.digits()
    assert list(digits) == list(range(11, 25)), "the log goes on at the iteration after the state's"
    assert [d[RATE] for d in digits.values()] == [pytest.approx(before[n][RATE] / 2, rel=1e-12) for n in digits]
    assert digits[11][LOSS] == before[11][LOSS], "the same weights on the same data"
    assert digits[13][LOSS] != before[13][LOSS]
    assert resumed(run, 17, tmp_path / "twice") == digits


def test_a_new_batch_size_stays_on_the_schedule(server, data, tmp_path, straight):
    # Fourteen iterations of 4 samples are left: seven of 8
    run = edited(
        server,
        data,
        tmp_path / "once",
        straight,
        {"train.global_batch_size": 8, "validation.eval_iters": 1},  # as many samples of validation as before
        schedule_batch=4,
        horizon=17,
        stop=17,
    ).train()
    digits, before = run.digits(), straight.digits()
    assert {n: d[RATE] for n, d in digits.items()} == {10 + k: before[10 + 2 * k - 1][RATE] for k in range(1, 8)}
    assert digits[17][3] == 7 * 8 * 64
    assert resumed(run, 13, tmp_path / "twice") == digits


def test_a_later_phase_may_have_another_batch_size(server, data, tmp_path, straight):
    run = pretrain(
        server,
        data,
        tmp_path,
        overrides=OVERRIDES | {"train.global_batch_size": 8},
        init={"checkpoint": str(straight.checkpoint(10)), "at": 10, "carry": "all"},
        start=10,
        schedule_batch=4,
        horizon=14,
        stop=14,
    ).train()
    assert {n: d[RATE] for n, d in run.digits().items()} == {
        10 + k: straight.digits()[10 + 2 * k - 1][RATE] for k in range(1, 5)
    }


def test_skipped_data_is_not_trained_on_and_counts(server, data, tmp_path, straight):
    # Nothing moves the weights of `still`, so its losses are those of the state at 10 on the data of each iteration
    frozen = {"optimizer.lr": 0.0, "optimizer.min_lr": 0.0, "model.moe_router_bias_update_rate": 0.0}
    still = edited(server, data, tmp_path / "still", straight, frozen, stop=14).train()
    run = edited(server, data, tmp_path / "once", straight, skip=3).train()
    digits = run.digits()
    assert list(digits) == list(range(14, 25))
    assert digits[14][LOSS] == still.digits()[14][LOSS]
    assert digits[14][LOSS] != straight.digits()[14][LOSS]
    assert {n: d[RATE] for n, d in digits.items()} == {n: straight.digits()[n][RATE] for n in digits}
    assert digits[24][3] == 11 * 4 * 64, "tokens are those trained on"
    assert next(iter(run.validation())) == 13, "measured before anything is trained"
    assert resumed(run, 19, tmp_path / "twice") == digits


def test_weights_and_optimizer_begin_a_schedule_of_their_own(server, data, tmp_path, straight):
    init = {"checkpoint": str(straight.checkpoint(10)), "at": 10}
    settings = {"optimizer.lr": 0.002, "scheduler.lr_decay_style": "constant", "scheduler.lr_warmup_iters": 2}
    overrides = OVERRIDES | settings | {"scheduler.lr_wsd_decay_style": None, "scheduler.lr_wsd_decay_iters": None}

    def stage(carry: str, name: str) -> Run:
        run = pretrain(
            server, data, tmp_path / name, overrides=overrides, init=init | {"carry": carry}, horizon=8, stop=8
        )
        return run.train()

    kept, fresh = stage("weights+optimizer", "kept"), stage("weights", "fresh")
    digits = kept.digits()
    assert list(digits) == list(range(1, 9))
    assert [d[RATE] for d in digits.values()] == [d[RATE] for d in fresh.digits().values()]
    assert digits[3][RATE] == 0.002
    assert digits[1][LOSS] == fresh.digits()[1][LOSS], "the same weights"
    assert digits[3][LOSS] != fresh.digits()[3][LOSS], "other moments"
    assert digits[8][3] == 8 * 4 * 64
    assert resumed(kept, 5, tmp_path / "twice") == digits


def test_another_schedule_under_carry_all_is_refused(server, data, tmp_path, straight):
    said = edited(server, data, tmp_path, straight, {"scheduler.lr_decay_iters": 48}).fails()
    assert "total number of iterations" in said
    assert "192" in said


def test_a_state_that_is_another_iteration_than_it_says_is_refused(server, data, tmp_path, straight):
    moved = tmp_path / "iter_0000010"
    shutil.copytree(straight.checkpoint(6), moved)
    run = edited(server, data, tmp_path / "run", straight)
    assert "says iteration 6, not 10" in run.fails(init=run.request["init"] | {"checkpoint": str(moved)})
