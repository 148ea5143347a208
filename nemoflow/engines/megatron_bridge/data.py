"""The data streams of a stage: its own order from its own start, and the same validation samples every time.

Megatron-Bridge indexes the training samples of a run from its first iteration on, and lets the validation loader walk
on from one evaluation to the next. So a second phase would read the tail of an order over everything before it, and no
two validation losses would be of the same text. Both are mended where the datasets are made, whatever kind they are.

Megatron-Core writes that order, its index caches, wherever a rank 0 first wants it, under names that hash the places of
data and tokenizer. Here they are made by a job of their own (index.py), described without places, and training only
opens them.
"""

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from nemoflow.errors import NemoflowError


class Window(Dataset):
    """`inner` seen at the indices start .. start + length - 1: from its first sample on, and round again if shorter.

    A negative index (the padding of an incomplete SFT batch) is handed on as it is. Raises IndexError below `start`.
    """

    def __init__(self, inner: Dataset, start: int, length: int):
        self.inner, self.start, self.length = inner, start, length
        if hasattr(inner, "collate_fn"):
            self.collate_fn = inner.collate_fn

    def __len__(self) -> int:
        return self.start + self.length

    def __getitem__(self, index: int):
        if index < 0:
            return self.inner[index]
        if not self.start <= index < len(self):
            raise IndexError(f"sample {index} of a stage that has {self.start} to {len(self) - 1}")
        return self.inner[(index - self.start) % len(self.inner)]


def provider(
    make: Callable, stream: int, length: int, valid_samples: int, tagged: Callable = lambda window: window
) -> Callable:
    """A Megatron-Bridge dataset provider that makes a stage's datasets with `make`, the provider for its configuration.

    stream          samples that the trajectory had taken where this stream of data began: where it is placed
    length          samples of the stream
    valid_samples   size of the validation set, of which an evaluation reads all
    tagged          what to make of the validation set (meters.py)
    The test set is left out: nothing reads it.
    """

    def provide(_, config, tokenizer=None, pg_collection=None):
        offered = {"tokenizer": tokenizer, "pg_collection": pg_collection}
        known = inspect.signature(make).parameters
        wanted = [length, valid_samples, 0]
        train, valid, _ = make(wanted, config, **{k: v for k, v in offered.items() if k in known})
        if stream:
            train = Window(train, stream, len(train))
        if valid is not None and valid_samples:
            valid = tagged(Window(valid, 0, valid_samples))
        return train, valid, None

    return provide


def indexed(make: Callable, blend: Path, met: Callable[[GPTDataset | BlendedDataset], None]) -> Callable:
    """`make`, a provider of pretraining datasets, for prefixes relative to the directory `blend`.

    Index caches are described by these prefixes and by the tokenizer's name, not by where they lie, so that the caches
    are the same bytes under the same names in every store. `met` is called with every dataset before its indices are
    opened or built; what it raises ends both.
    """

    def provide(samples, config):
        with _described_without_places(config.tokenizer, blend, met):
            return make(samples, config)

    return provide


@contextlib.contextmanager
def _described_without_places(tokenizer, blend: Path, met: Callable) -> Iterator[None]:
    low = GPTDataset.build_low_level_dataset

    def open_prefix(prefix, config):
        return low(os.path.normpath(blend / prefix), config)

    def told(build: Callable) -> Callable:
        def build_told(dataset):
            met(dataset)
            return build(dataset)

        return build_told

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(GPTDataset, "build_low_level_dataset", staticmethod(open_prefix)))
        for owner, name in (
            (GPTDataset, "_build_document_sample_shuffle_indices"),
            (BlendedDataset, "_build_indices"),
        ):
            stack.enter_context(patch(owner, name, told(getattr(owner, name))))
        stack.enter_context(patch(tokenizer, "path", Path(tokenizer.path).name))
        yield


def must_be_built(dataset: GPTDataset | BlendedDataset) -> None:
    """Raise NemoflowError unless all index caches of `dataset` are there, naming the setting in which they differ.

    Otherwise Megatron-Core would build them: for hours, on one rank, while all others wait.
    """
    blended = isinstance(dataset, BlendedDataset)
    split = (dataset.split if blended else dataset.index_split).name
    arrays = ("dataset", "dataset_sample") if blended else ("document", "sample", "shuffle")
    kind, cache = type(dataset).__name__, Path(dataset.config.path_to_cache)
    files = ("description.txt", *(f"{name}_index.npy" for name in arrays))
    names = [f"{dataset.unique_description_hash}-{kind}-{split}-{file}" for file in files]
    missing = [name for name in names if not (cache / name).is_file()]
    if not missing:
        return
    own = json.loads(dataset.unique_description)
    differing = ""
    for path in sorted(cache.glob(f"*-{kind}-{split}-description.txt")):
        other = json.loads(path.read_text(encoding="utf-8"))
        if other.get("dataset_path") == own.get("dataset_path"):
            keys = [k for k in own if k != "datasets" and other.get(k) != own[k]]
            differing = ", ".join(f"{k} {other.get(k)} in the index, {own[k]} here" for k in keys)
            break
    raise NemoflowError(
        f"{cache}: does not fit this stage, whose training would have to build an index of "
        f"{own.get('dataset_path', 'the blend')} ({split}): {differing or f'{missing[0]} is missing'}; "
        "have the index artifact made again from the stage's own settings"
    )
