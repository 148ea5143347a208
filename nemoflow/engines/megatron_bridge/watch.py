"""Leaving in time: before the job is ended from outside, when asked to, and when training goes wrong.

Also what belongs to a save: when a checkpoint counts, which older ones go, and whether the next ones will fit.

All processes of a run must leave at the same iteration. So after each one they agree in a single reduction of a few
numbers: the first process knows the clock and the stop file, the last one the loss.
"""

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from torch import distributed

from nemoflow.engines.megatron_bridge import checkpoints
from nemoflow.engines.megatron_bridge.limits import Clock, Guard
from nemoflow.errors import UNFINISHED_PREFIX, NemoflowError
from nemoflow.progress import human

STOPPED, OUT_OF_TIME = 1, 2


class Watch(Callback):
    """The callbacks that keep a run safe. To be called before those that measure.

    `context.user_state` has after each iteration, for those: "memory", the largest in bytes that a GPU has used, and
    "asked", whether this state has come to be wanted meanwhile.

    request     as in train.py
    reached     the iteration the run goes on after
    started     time.time() at which this process began
    """

    def __init__(self, request: dict, reached: int, started: float):
        self.request, self.reached = request, reached
        self.directory = Path(request["checkpoints"])
        self.metrics = Path(request["metrics"])
        self.guard = Guard(None, 1)
        self.clock = Clock(request.get("deadline"), started)
        self.done_at: dict[int, float] = {}
        self.left: str | None = None
        self.removing: list[threading.Thread] = []

    # -- before the first iteration ----------------------------------------------------------------------------------

    def on_data_init_start(self, context) -> None:
        """Before any data is opened: what the run's past says, the same to all processes; and room for its saves.

        Raises NemoflowError when fewer than two checkpoints would fit.
        """
        settings = self.request.get("guard") or {"spike": None, "patience": 1}
        past = [_past(self.metrics) if _last_rank() else None]
        distributed.broadcast_object_list(past, src=distributed.get_world_size() - 1)
        losses, self.clock.save = past[0]
        self.guard = Guard(settings["spike"], settings["patience"], losses)
        needed = checkpoint_bytes(context.model, context.state.cfg)
        said = [self._room(needed) if distributed.get_rank() == 0 else None]
        distributed.broadcast_object_list(said, src=0)
        if said[0]:
            raise NemoflowError(said[0])

    def _room(self, needed: int) -> str | None:
        """What is wrong with the space for the saves of this run; `needed`: estimated bytes of a checkpoint."""
        complete = checkpoints.states(self.directory)
        if complete:
            needed = checkpoints.size(complete[max(complete)])
        start, stop, interval = self.reached, self.request["stop"], self.request["save_interval"]
        saves = len({*range(start // interval * interval, stop, interval), *self.request["wanted"], stop} - {0, start})
        count = 1 if saves == 1 or len(complete) >= 2 else 2
        free = shutil.disk_usage(self.directory).free
        if free >= count * needed:
            return None
        return (
            f"{self.directory}: no space left for {('a checkpoint', 'two checkpoints')[count - 1]}: "
            f"{human(count * needed)} are needed and {human(free)} free; free some and run again"
        )

    # -- after each iteration ----------------------------------------------------------------------------------------

    def on_train_step_end(self, context) -> None:
        """Agree on whether to save and to leave. Raises NemoflowError, without a save, when training has diverged."""
        state, config = context.state.train_state, context.state.cfg
        done = state.step + 1
        self.clock.iterated()
        self.done_at[done] = time.time()
        loss = context.loss_dict.get("lm loss") if context.loss_dict else None
        why, asked, memory, loss, norm = self._agree(done, loss, None if context.skipped_iter else context.grad_norm)
        context.user_state |= {"memory": memory, "asked": asked}
        if not context.skipped_iter and (what := self._judge(loss, norm)):
            raise NemoflowError(self.diverged(what, state, config))
        if why and done < min(self.request["stop"], config.train.train_iters):
            config.train.exit_interval = done  # by which the loop saves and leaves
            self.left = self._reason(why, done)

    def _judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with an iteration; None when it can be gone on from."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {'NaN' if math.isnan(value) else 'infinite'}"
        if not self.guard.see(loss):
            return None
        limit = f"{self.guard.spike:g} times its running median, {self.guard.median:.3f}"
        return f"the loss is {loss:.3f} and has been above {limit}, for {self.guard.high} iterations"

    def _agree(self, done: int, loss, norm) -> tuple[int, bool, int, float, float]:
        """The same on all ranks: why to leave (0: no reason), whether this state is asked for, the largest memory in
        bytes, loss and gradient norm. A file may be there for one rank and not yet for another.
        """
        first = distributed.get_rank() == 0
        why, asked = (self._why(), self._asked(done)) if first else (0, False)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        loss, norm = 0.0 if loss is None else float(loss), 0.0 if norm is None else float(norm)  # as others have them
        # A maximum of NaNs is not defined, so what is not finite travels as a number of its own
        told = [why, asked, memory, *(f(v) for v in (loss, norm) for f in (_finite, _code))]
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        told = torch.tensor(told, dtype=torch.float64, device=device)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
        why, asked, memory, loss, lost, norm, wrong = told.tolist()
        return int(why), bool(asked), int(memory), _decoded(loss, lost), _decoded(norm, wrong)

    def _asked(self, done: int) -> bool:
        directory = self.request.get("wanted_directory")
        return bool(directory) and (Path(directory) / str(done)).exists()

    def _why(self) -> int:
        if self.request.get("stop_file") and Path(self.request["stop_file"]).exists():
            return STOPPED
        return OUT_OF_TIME if self.clock.up() else 0

    def _reason(self, why: int, done: int) -> str:
        if why == STOPPED:
            return f"iteration {done} of {self.request['stop']}, because {self.request['stop_file']} asked for it"
        ends = time.strftime("%H:%M:%S", time.localtime(self.clock.deadline))
        return (
            f"iteration {done} of {self.request['stop']}, because the job ends at {ends} and the last "
            f"{self.clock.margin:.0f} s of it are kept for saving"
        )

    def diverged(self, what: str, state, config) -> str:
        """What to say of an iteration that must not be gone on from, and the way out."""
        now, batch = state.step + 1, config.train.global_batch_size
        samples = f"samples {state.consumed_train_samples} to {state.consumed_train_samples + batch - 1}"
        before = now - max(self.guard.high, 1)
        good = max((n for n in checkpoints.states(self.directory) if n <= before), default=None)
        way = (
            f"go on from {good} past this data, with `edits: [{{at: {good}, skip: {now - good}}}]`, or with a lower "
            "optimizer.lr from there"
            if good is not None
            else "no state was saved before it: look at the data, or lower optimizer.lr"
        )
        return f"iteration {now} ({samples}): {what}; {way}"

    @contextlib.contextmanager
    def explained(self, state) -> Iterator[None]:
        """Say what Megatron's own check of a loss or gradient that is no number found, in one sentence.

        It raises in the process that has it, before the optimizer's step; the launcher ends the others.
        """
        try:
            yield
        except RuntimeError as error:
            if "Unexpected result" not in str(error):
                raise
            found = str(error).partition("message='")[2].partition("'")[0] or str(error)
            raise NemoflowError(self.diverged(f"Megatron {found}", state.train_state, state.cfg)) from error

    # -- saves -------------------------------------------------------------------------------------------------------

    def on_eval_end(self, context) -> None:
        self.done_at[context.state.train_state.step] = time.time()  # a save of this iteration begins now

    def on_checkpoint_save(self, _context) -> None:
        """All of a checkpoint is written, at once or in the background: it counts, and older ones may go."""
        done = checkpoints.saved(self.directory)  # in the background, the loop has gone on since
        if begun := self.done_at.get(done):
            seconds = round(time.time() - begun, 2)
            self.clock.saved(seconds)
            if _last_rank():
                with self.metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"iteration": done, "save_seconds": seconds}) + "\n")
        self.done_at = {n: at for n, at in self.done_at.items() if n > done}
        if distributed.get_rank() == 0:
            checkpoints.mark_complete(self.directory / f"iter_{done:07d}")
            if not self.guard.high:  # while the loss is high, what was saved before may be all there is to go back to
                self._prune()

    def _prune(self) -> None:
        complete, keep = checkpoints.states(self.directory), self.request.get("keep")
        if not keep:
            return
        wanted = {*self.request["wanted"], self.request["stop"]}
        wanted |= {int(p.name) for p in self._listed() if p.name.isdigit()}
        wanted |= {int(p.parent.name[3:]) for p in self.directory.parent.glob("at-*/sealed.json")}
        for n in checkpoints.prunable(complete, wanted, keep["last"], keep["every"]):
            print(f"removing the checkpoint of iteration {n}: it is not wanted, and there are newer ones", flush=True)
            # Terabytes take minutes to delete, and all other ranks would wait
            self.removing.append(threading.Thread(target=checkpoints.remove, args=(complete[n],)))
            self.removing[-1].start()

    def _listed(self) -> Iterable[Path]:
        directory = self.request.get("wanted_directory")
        return Path(directory).glob("*") if directory else ()

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After the loop: say why it was left early, and let deletions end."""
        for thread in self.removing:
            thread.join()
        if self.left and distributed.get_rank() == 0:
            print(f"{UNFINISHED_PREFIX}{self.left}", flush=True)


def checkpoint_bytes(model: list, config) -> int:
    """Estimated bytes of a checkpoint: parameters, with the optimizer's master copy and two moments of each.

    For adapters only what trains. To be called on all ranks.
    """
    groups = get_pg_collection(model)
    parameters = [p for chunk in model for p in chunk.parameters() if p.requires_grad or config.peft is None]
    each = next((p.element_size() for p in parameters), 0)
    counts = [sum(p.numel() for p in parameters if getattr(p, "allreduce", True) is own) for own in (True, False)]
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    total = torch.tensor(counts, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    dense, experts = total.tolist()
    number = dense / groups.dp_cp.size() + experts / groups.expt_dp.size()
    if config.checkpoint.save_optim:
        optimizer = config.optimizer
        own_copy = optimizer.use_distributed_optimizer or each < 4  # else a float32 model is its own master
        each += optimizer.main_params_dtype.itemsize if own_copy else 0
        each += optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
    return int(number * each)


def _past(metrics: Path) -> tuple[list[float], float | None]:
    """The latest losses in the metrics, and the longest save's seconds, None where none was measured."""
    losses: dict[int, float] = {}
    saves: list[float] = []
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                losses[entry["iteration"]] = entry["loss"]
            saves += [entry["save_seconds"]] if "save_seconds" in entry else []
    return [losses[n] for n in sorted(losses)][-2 * Guard.WINDOW :], max(saves, default=None)


def _last_rank() -> bool:
    return distributed.get_rank() == distributed.get_world_size() - 1


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _code(value: float) -> int:
    return 2 if math.isnan(value) else 1 if value == math.inf else 0


def _decoded(value: float, code: float) -> float:
    return (value, math.inf, math.nan)[int(code)]
