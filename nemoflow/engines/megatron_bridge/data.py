"""The data streams of a stage: its own order from its own start, and the same validation samples every time.

Megatron-Bridge indexes the training samples of a run from its first iteration on, and lets the validation loader walk
on from one evaluation to the next. So a second phase would read the tail of an order over everything before it, and no
two validation losses would be of the same text. Both are mended where the datasets are made, whatever kind they are.
"""

import inspect
from collections.abc import Callable

from torch.utils.data import Dataset


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


def provider(make: Callable, consumed: int, valid_samples: int) -> Callable:
    """A Megatron-Bridge dataset provider that makes a stage's datasets with `make`, the provider for its configuration.

    consumed        samples that the trajectory had taken before this stage: where its own stream is placed
    valid_samples   size of the validation set, of which an evaluation reads all
    The test set is left out: nothing reads it.
    """

    def provide(samples, config, tokenizer=None, pg_collection=None):
        # samples: train, valid and test, of which the first counts from the trajectory's beginning
        offered = {"tokenizer": tokenizer, "pg_collection": pg_collection}
        known = inspect.signature(make).parameters
        wanted = [samples[0] - consumed, valid_samples, 0]
        train, valid, _ = make(wanted, config, **{k: v for k, v in offered.items() if k in known})
        if consumed:
            train = Window(train, consumed, len(train))
        if valid is not None and valid_samples:
            valid = Window(valid, 0, valid_samples)
        return train, valid, None

    return provide
