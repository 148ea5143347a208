"""What happens around the iterations of Megatron-Bridge's loop: measuring, evaluating, keeping states, leaving."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.eval import evaluate_and_print_results

from nemoflow.engines.megatron_bridge import meters
from nemoflow.engines.megatron_bridge.watch import Watch
from nemoflow.errors import NemoflowError


class Hooks(Callback):
    """The callbacks of one run.

    request         as in train.py
    reached         the iteration the run goes on after
    consumed        samples of the trajectory before this stage trains
    valid_samples   samples of one evaluation
    """

    def __init__(self, request: dict, reached: int, consumed: int, valid_samples: int):
        self.request, self.reached = request, reached
        self.begins = reached == request["start"]
        self.consumed, self.valid_samples = consumed, valid_samples
        self.metrics = Path(request["metrics"])
        self.wanted = {*request["wanted"], request["stop"]}
        self.begun, self.rate = 0.0, 0.0
        self.intervals: tuple[int | None, int | None] | None = None

    def write(self, **entry) -> None:
        """Append a line to the metrics; the last rank knows the loss, and on one machine writes the same file."""
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def on_data_init_start(self, context) -> None:
        """After loading, before any data is opened: refuse a silent restart, and align the validation stream.

        Its sampler goes on where the checkpoint's counter stood; only from a multiple of the set's size on does each
        evaluation read the whole set once, and a stage's set is its own.
        """
        state = context.state.train_state
        reached = self.reached + self.request["skip"] * self.begins
        if state.step != reached:
            raise NemoflowError(f"the checkpoint says iteration {state.step}; {reached} was to be gone on from")
        if self.begins:
            state.consumed_valid_samples = 0
        elif self.valid_samples:
            state.consumed_valid_samples -= state.consumed_valid_samples % self.valid_samples

    def on_train_step_start(self, context) -> None:
        config = context.state.cfg
        if self.intervals is None:
            self.intervals = config.checkpoint.save_interval, config.validation.eval_interval
        config.checkpoint.save_interval, config.validation.eval_interval = self.intervals
        self.begun = time.perf_counter()
        self.rate = next(g["lr"] for g in context.optimizer.param_groups if not g.get("is_decoupled_lr"))

    def on_train_step_end(self, context) -> None:
        """Measure; and for a wanted state make this very iteration a multiple of the intervals the loop goes by."""
        state, config = context.state.train_state, context.state.cfg
        done = state.step + 1  # the loop counts after this
        samples = state.consumed_train_samples - self.consumed + config.train.global_batch_size
        loss = context.loss_dict.get("lm loss") if context.loss_dict else None
        if loss is not None:
            loss, seconds = float(loss), time.perf_counter() - self.begun
            self.write(
                iteration=done,
                loss=loss,
                lr=float(self.rate),
                grad_norm=None if context.grad_norm is None else float(context.grad_norm),
                seconds=round(seconds, 4),
                tokens=samples * config.model.seq_length,
                **meters.rates(context, seconds, config.train.global_batch_size * config.model.seq_length),
            )
        if done in self.wanted or context.user_state["asked"]:
            config.checkpoint.save_interval = done
        if done == self.request["stop"]:
            config.validation.eval_interval = done

    def on_eval_end(self, context) -> None:
        loss = context.total_loss_dict.get("lm loss")
        if loss is not None:
            found = {key: context.user_state[key] for key in ("valid_losses",) if key in context.user_state}
            self.write(iteration=context.state.train_state.step, valid_loss=float(loss), **found)


def train_between(train: Callable, hooks: Hooks, watch: Watch) -> Callable:
    """Megatron-Bridge's `train`, preceded by an evaluation at a stage's first start, and ending without exiting.

    The loop leaves at `train.exit_interval` by SystemExit(0), which its caller takes for a failure. Validation and test
    after the loop are switched off: the last iteration has been evaluated in it.
    """

    def train_then_return(forward, model, optimizer, scheduler, train_data, valid_data, state, *rest, **options):
        if state.train_state.do_valid and hooks.begins:
            evaluate_and_print_results(
                state,
                f"iteration {state.train_state.step}",
                forward,
                valid_data,
                model,
                state.cfg.model,
                callback_manager=options.get("callback_manager"),
            )
        try:
            with watch.explained(state):
                train(forward, model, optimizer, scheduler, train_data, valid_data, state, *rest, **options)
        except SystemExit as leaving:
            if leaving.code not in (0, None):
                raise
        watch.finish()
        state.train_state.do_valid = state.train_state.do_test = False

    return train_then_return
