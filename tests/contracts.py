"""What training must keep to wherever it runs: test_distributed.py asks it of the device shim, gpu/ of CUDA kernels.

`make(directory, settings, processes, **request)` gives a trajectory of so many processes, a `Run`, not started yet.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_fixtures import Run

Make = Callable[..., Run]


def after(run: Run, at: int) -> dict[int, tuple]:
    return {n: d for n, d in run.digits().items() if n > at}


def assert_close(one: dict[int, tuple], other: dict[int, tuple], loss: float = 1e-5, norm: float = 1e-3) -> None:
    """Losses and gradient norms agree but for the order of summing; learning rates and tokens exactly."""
    assert list(one) == list(other)
    assert [(d[1], d[3]) for d in one.values()] == [(d[1], d[3]) for d in other.values()]
    for a, b in zip(one.values(), other.values(), strict=True):
        assert a[0] == pytest.approx(b[0], rel=loss)
        assert a[2] == pytest.approx(b[2], rel=norm)


def continued(make: Make, run: Run, directory: Path, settings: dict, processes: int, at: int = 3) -> Run:
    """A trajectory of its own that goes on from the state `at` of `run`, as a killed one would."""
    new = make(directory, settings, processes)
    shutil.copytree(run.checkpoint(at), new.checkpoint(at))
    return new.train()


def goes_on_with_the_same_digits(make: Make, directory: Path, settings: dict, processes: int) -> Run:
    """Six iterations, which learn; and three after a stop, with the digits of those without. Returns the former."""
    run = make(directory / "straight", settings, processes, wanted=[3]).train()
    losses = [d[0] for d in run.digits().values()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3
    resumed = continued(make, run, directory / "resumed", settings, processes)
    assert after(resumed, 3) == after(run, 3)
    return run


def goes_on_dealt_out_anew(make: Make, run: Run, directory: Path, settings: dict, processes: int, **close) -> None:
    """State 3 of `run`, gone on from by another geometry, with the numbers of the run that stayed as it was: weights,
    Adam's moments, counters and data came along.
    """
    resumed = continued(make, run, directory, settings, processes)
    assert_close(after(resumed, 3), after(run, 3), **close)


def agrees(make: Make, directory: Path, settings: dict, variants: dict[str, dict], processes: int, **close) -> None:
    """Settings that must not change the result do not, but for the order of summing."""
    runs = [make(directory / name, settings | more, processes).train() for name, more in variants.items()]
    for run in runs[1:]:
        assert_close(run.digits(), runs[0].digits(), **close)


def exported(run: Run, at: int, dtype: str = "float32") -> str:
    """The digest of the exported weights of a state. Every number of the checkpoint went into one of the published
    tensors, and each of these was there, or the export would have failed.
    """
    out = run.directory / f"hf-{at}"
    if not out.exists():
        run.server.call("world:export", {"checkpoint": str(run.checkpoint(at)), "out": str(out), "dtype": dtype})
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def packed_logits(provider, device: str = "cpu") -> dict[str, float]:
    """In a process that has Megatron: how far the logits of a real model move when one packed sequence is changed.

    Returns the largest change in the changed sequence, in the others, in the others without packing, and between
    a packed sequence and the same one alone.
    """
    import torch
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    lengths = [20, 17, 27]
    starts = torch.tensor([0, 20, 37, 64], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    with temporary_distributed_context(backend="gloo" if device == "cpu" else "nccl"), torch.no_grad():
        model_parallel_cuda_manual_seed(0)
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)[0].eval()

        def logits(ids, packed):
            params = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=starts,
                cu_seqlens_kv=starts,
                max_seqlen_q=27,
                max_seqlen_kv=27,
                total_tokens=64,
            )
            return model(
                input_ids=ids,
                position_ids=torch.arange(ids.shape[1], device=device)[None],
                attention_mask=None,
                packed_seq_params=params if packed else None,
            ).float()

        row = torch.randint(0, 128, (1, 64)).to(device)
        changed = row.clone()
        changed[0, 20:37] = (changed[0, 20:37] + 1) % 128
        moved = (logits(row, True) - logits(changed, True)).abs().amax((0, 2))
        leaked = (logits(row, False) - logits(changed, False)).abs().amax((0, 2))
        alone = torch.cat([logits(part, False) for part in row.split(lengths, 1)], 1)
        return {
            "inside": moved[20:37].max().item(),
            "outside": torch.cat([moved[:20], moved[37:]]).max().item(),
            "outside_unpacked": leaked[37:].max().item(),
            "alone": (logits(row, True) - alone).abs().max().item(),
        }
