"""Megatron speaks to "the GPU" by name; this sends what it says to the CPU.

`torch.cuda.is_available()` keeps saying False, so code that asks takes its CPU path by itself; what is here is for the
code that does not ask: `device="cuda"`, `tensor.cuda()`, streams, events, RNG states, memory figures.
"""

import contextlib
from types import SimpleNamespace

import torch


def _is_cuda(value) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


class CudaToCpu(torch.overrides.TorchFunctionMode):
    """Every torch call that names a CUDA device runs on the CPU, without pinned memory, which needs a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The local optimizer sorts gradients by type names and knows only those of CUDA tensors.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is not torch.Tensor.pin_memory:
            kwargs.pop("pin_memory", None)
        if any(_is_cuda(arg) for arg in args):
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


class Stream:
    """A queue of work on a device that has none: everything has happened by the time a call returns."""

    device, cuda_stream, stream_id = torch.device("cpu"), 0, 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class Event:
    """A mark in such a queue: always reached, no time between two of them."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, event):  # noqa: ARG002 - torch's signature
        return 0.0


# Each its own function: torch's compiler, which some libraries import, keeps a table of these by identity.
CUDA_API = {
    "current_device": lambda: torch.device("cpu"),
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda *_: Stream(),
    "default_stream": lambda *_: Stream(),
    "set_stream": lambda _: None,
    "stream": lambda _: contextlib.nullcontext(),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "get_device_capability": lambda *_: (0, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1
    ),
    "mem_get_info": lambda *_: (0, 0),
}


def redirect() -> None:
    """Put the CPU in the GPU's place for this whole process; there is no way back."""
    for name, replacement in CUDA_API.items():
        setattr(torch.cuda, name, replacement)
    CudaToCpu().__enter__()
