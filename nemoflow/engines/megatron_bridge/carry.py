"""What a stage takes over from the checkpoint it starts from, besides weights: optimizer, schedule, counters.

Under carry `all` the learning rate is a function of the samples consumed since the first stage of the schedule, in the
units that Megatron's scheduler counts in. A recipe gives its lengths in iterations of that first stage's batch; another
batch size or learning rate later does not move its corners.

Megatron-Bridge has no such modes: it loads learning rates, betas and limits of the schedule as they were saved, and
refuses others. So the scheduler is watched as it is made, and what the recipe says now is put back after loading.
"""

import functools
from pathlib import Path

import yaml
from megatron.bridge.training import optim
from megatron.bridge.training.callbacks import Callback

KEPT = ("max_lr", "min_lr", "betas", "eps")
"""Settings of a parameter group that the recipe decides, not the checkpoint. Weight decay is the scheduler's."""

LIMITS = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_incr_steps")
"""Entries of a saved schedule that an edit, or a later stage, may change. Others that differ are refused."""


class Carry(Callback):
    """Begins a stage from its init's optimizer; in later slots keeps its schedule. To be called before other callbacks.

    request     as in train.py
    load        the checkpoint that is loaded, if any
    """

    def __init__(self, request: dict, load: Path | None):
        init = request["init"]
        self.request = request
        self.begins = bool(init) and load == Path(init["checkpoint"]) and init["carry"] != "weights"
        self.own: list[dict] = []

    def patch(self) -> None:
        """Watch the scheduler as it is made, in this process."""
        make = optim._get_scheduler

        def watched(optimizer_config, scheduler_config, optimizer):
            if batch := self.request.get("schedule_batch"):
                in_samples(scheduler_config, batch)
            self.own = [{key: group[key] for key in KEPT if key in group} for group in optimizer.param_groups]
            scheduler = make(optimizer_config, scheduler_config, optimizer)
            if self.begins:
                self._as_saved(optimizer_config, optimizer)
                scheduler.load_state_dict = functools.partial(self._load, scheduler, scheduler.load_state_dict)
            return scheduler

        optim._get_scheduler = watched

    def _as_saved(self, now, optimizer) -> None:
        """Give the parameter groups the saved rates: Megatron-Core finds by them which saved group belongs to which."""
        path = Path(self.request["init"]["checkpoint"]) / "run_config.yaml"
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))["optimizer"]
        rates = {now.lr: saved["lr"]} | ({now.decoupled_lr: saved["decoupled_lr"]} if now.decoupled_lr else {})
        least = {now.min_lr: saved["min_lr"]} | (
            {now.decoupled_min_lr: saved["decoupled_min_lr"]} if now.decoupled_min_lr else {}
        )
        for group in optimizer.param_groups:
            group["max_lr"] = rates.get(group["max_lr"], group["max_lr"])
            group["min_lr"] = least.get(group["min_lr"], group["min_lr"])

    def _load(self, scheduler, load, saved: dict) -> None:
        if self.request["init"]["carry"] == "all":
            load({**saved, **{name: getattr(scheduler, name) for name in LIMITS}})

    def on_data_init_start(self, context) -> None:
        """After loading: the recipe's own rates; counters from 0 unless they are carried; past what is skipped."""
        if not self.begins:
            return
        state, scheduler = context.state.train_state, context.scheduler
        for group, own in zip(context.optimizer.param_groups, self.own, strict=True):
            group.update(own)
        if self.request["init"]["carry"] == "weights+optimizer":
            state.step = state.consumed_train_samples = state.skipped_train_samples = 0
            scheduler.num_steps = 0
        skipped = self.request["skip"] * context.state.cfg.train.global_batch_size
        state.step += self.request["skip"]
        state.consumed_train_samples += skipped
        state.skipped_train_samples += skipped
        scheduler.step(skipped)


def in_samples(scheduler, batch: int) -> None:
    """Turn the lengths of a SchedulerConfig from iterations into samples by `batch`, not by the stage's own. In place.

    As Megatron-Bridge does in ConfigContainer.validate.
    """
    scheduler.lr_decay_steps = scheduler.lr_decay_iters * batch
    if scheduler.lr_wsd_decay_iters is not None:
        scheduler.wsd_decay_steps = scheduler.lr_wsd_decay_iters * batch
    if scheduler.lr_warmup_fraction is not None:
        scheduler.lr_warmup_steps = scheduler.lr_warmup_fraction * scheduler.lr_decay_steps
    else:
        scheduler.lr_warmup_steps = scheduler.lr_warmup_iters * batch
