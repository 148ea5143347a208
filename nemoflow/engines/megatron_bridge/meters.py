"""What is measured besides the loss of each iteration: speed, memory, and the validation loss of each source.

A source's validation loss costs nothing extra: every validation sample carries the number of its source, and while the
model evaluates, its loss is added up under that number too. So the blend's loss is their mean by tokens, exactly.
"""

import functools
import json
from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils import flop_utils
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch import distributed
from torch.utils.data import Dataset

SOURCE = "source"
"""Key under which a sample carries the number of its source."""


def rates(context, seconds: float, tokens: int) -> dict:
    """How fast an iteration of `seconds` was, and how full the fullest GPU has been.

    {"tokens_per_second", "tflops_per_gpu", and on GPUs "memory_gb"}: those of all processes; those of the model by
    Megatron-Bridge's own formula, recomputed activations not counted, per process; allocated by torch at the most.
    """
    state, config = context.state, context.state.cfg
    seen, squares, patches = flop_utils.resolve_global_flops_seqlen_stats(
        state, data_parallel_size=config.data_parallel_size
    )
    flops = flop_utils.num_floating_point_operations(
        config,
        batch_size=config.train.global_batch_size,
        seqlen_sum=seen,
        seqlen_squared_sum=squares,
        num_vision_patches=patches,
    )
    found = {
        "tokens_per_second": round(tokens / seconds, 1),
        "tflops_per_gpu": _digits(flops / seconds / distributed.get_world_size() / 1e12),
    }
    if memory := context.user_state.get("memory"):
        found["memory_gb"] = round(memory / 1e9, 3)
    return found


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def sources(blend: Path, split: str = "valid") -> dict[str, str]:
    """Prefix as in the blend's weights.json -> name of its source.

    The blend lists its sources in the order of their prefixes, and those of one source lie in one directory.
    """
    prefixes = [p for p, _ in json.loads((blend / "weights.json").read_text(encoding="utf-8")).get(split, [])]
    if not prefixes:
        return {}
    parts = json.loads((blend / "sealed.json").read_text(encoding="utf-8"))["measures"]["parts"]
    directories = list(dict.fromkeys(str(Path(p).parent) for p in prefixes))
    names = dict(zip(directories, (part["source"] for part in parts), strict=True))
    return {p: names[str(Path(p).parent)] for p in prefixes}


class Tagged(Dataset):
    """A validation set whose samples carry the number of their source: its place in the list `names`.

    window      of a blended or single dataset of Megatron-Core's (`inner`), which it shows from its start on
    of          prefix -> name of its source
    """

    def __init__(self, window, of: dict[str, str], names: list[str]):
        self.window, inner = window, window.inner
        blended = isinstance(inner, BlendedDataset)
        parts = inner.datasets if blended else [inner]
        self.numbers = [names.index(of[part.dataset_path]) for part in parts]
        self.which = inner.dataset_index if blended else None

    def __len__(self) -> int:
        return len(self.window)

    def __getitem__(self, index: int) -> dict:
        part = self.which[index % len(self.window.inner)] if self.which is not None else 0
        return {**self.window[index], SOURCE: torch.tensor(self.numbers[part])}


class Sources(Callback):
    """Adds up the validation loss of each source. To be called before those that write it.

    `context.user_state["valid_losses"]` has the last evaluation's on the last process: {source: loss per token}, of the
    sources that the validation set has samples of.
    """

    def __init__(self, of: dict[str, str]):
        self.of, self.names = of, sorted(set(of.values()))
        self.sums: torch.Tensor | None = None

    def tagged(self, window):
        """A validation set with the numbers of its samples' sources; as it is where sources are not told apart."""
        return Tagged(window, self.of, self.names) if self.of else window

    def watching(self, forward_step):
        """`forward_step`, Megatron-Bridge's, adding up while the model evaluates."""

        def step(state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
            if model.training:
                return forward_step(state, data_iterator, model, return_schedule_plan)
            noted = _Noted(data_iterator)
            output, loss = forward_step(state, noted, model, return_schedule_plan)
            return output, functools.partial(self._loss, loss, noted)

        return step

    def _loss(self, loss: functools.partial, noted: "_Noted", output: torch.Tensor):
        if noted.source is not None and loss.func is masked_next_token_loss:
            mask = loss.args[0].reshape(len(noted.source), -1).float()
            losses = output.reshape(mask.shape).float() * mask
            if self.sums is None:
                self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=output.device)
            both = torch.stack([losses.sum(1), mask.sum(1)], 1).double()
            self.sums.index_add_(0, noted.source.to(output.device), both)
        return loss(output)

    def on_eval_start(self, _context) -> None:
        self.sums = None

    def on_eval_end(self, context) -> None:
        if self.sums is None:  # not the last stage of a pipeline
            return
        distributed.all_reduce(self.sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        context.user_state["valid_losses"] = {
            name: loss / tokens for name, (loss, tokens) in zip(self.names, self.sums.tolist(), strict=True) if tokens
        }


class _Noted:
    """An iterator of batches that takes the numbers of the sources out, and keeps those of the last."""

    def __init__(self, inner):
        self.inner, self.source = inner, None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        batch = dict(next(self.inner))
        self.source = batch.pop(SOURCE, None)
        return batch
