"""Kind `average`: the mean of the weights of several states, as a Megatron checkpoint to start from or to export.

    checkpoint/     as Megatron-Bridge's own iter_* directories, with the first state's run_config.yaml, no optimizer

Averaging the last states of a training does what a longer decay of the learning rate would (Izmailov et al.,
arXiv:1803.05407). A process of its own, python -m nemoflow.average OUT STATE..., holds the first state's model and adds
the others to it in float32, a few tensors at a time, however many there are.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nemoflow.conversion import converting, load, said, save
from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError
from nemoflow.export.convert import check_megatron
from nemoflow.imports import CHECKPOINT, listed
from nemoflow.launch import HERE
from nemoflow.progress import human

AT_A_TIME = 10**9
"""Parameters that are summed at once: 4 GB in float32, and as much again while another state's are read."""


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], launch: dict | None = None) -> Made:
    """Average inputs["states"], directories with a link `checkpoint` each, all of one trajectory or of equal models.

    Returns the measures {"states", "parameters"} and the checkpoint's files with their sizes.

    Raises NemoflowError for a checkpoint that is damaged, one of another model, and a disk that is too small.
    """
    checkpoints = [state / "checkpoint" for state in inputs["states"]]
    progress(f"averages {len(checkpoints)} states, in float32")
    converting("nemoflow.average", checkpoints[0], out, *checkpoints, cluster=(launch or {}).get("cluster", HERE))
    parameters = int((out / "parameters").read_text(encoding="utf-8"))
    (out / "parameters").unlink()
    return Made({"states": len(payload["of"]), "parameters": parameters}, listed(out))


def _check(out: Path, checkpoints: tuple[Path, ...]) -> None:
    """Raise NemoflowError for a checkpoint that is damaged, or of another model, and a disk that is too small."""
    sizes = [weights(checkpoint) for checkpoint in checkpoints]
    for checkpoint, (shapes, _) in zip(checkpoints, sizes, strict=True):
        differing = [n for n in {**sizes[0][0], **shapes} if sizes[0][0].get(n) != shapes.get(n)]
        if differing:
            raise NemoflowError(f"{checkpoint}: is of another model than {checkpoints[0]}: {min(differing)}")
    size = sizes[0][1]
    if (free := shutil.disk_usage(out).free) < size:
        raise NemoflowError(f"{out}: the checkpoint takes {human(size)} and {human(free)} are free; make room")


def weights(checkpoint: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Name -> shape of the model's tensors in a Megatron checkpoint, and their bytes, from its metadata alone.

    Raises NemoflowError when the checkpoint is damaged.
    """
    check_megatron(checkpoint)
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: entry
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors.values())
    return {name: tuple(entry.size) for name, entry in tensors.items()}, size


def main(out: Path, *checkpoints: Path) -> None:
    """Average; see the module."""
    _check(out, checkpoints)
    from nemoflow import cpu

    if on_cpu := cpu.needed():
        cpu.enable()
    import torch
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    if on_cpu:
        cpu.patch(training=False)
    with temporary_distributed_context(backend="gloo"), torch.no_grad():
        (model,) = load(checkpoints[0])
        own = model.state_dict()
        for names in _batches({n: t for n, t in own.items() if t is not None and t.is_floating_point()}):
            sums = {name: own[name].to(torch.float32, copy=True) for name in names}
            for checkpoint in checkpoints[1:]:
                for name, tensor in _read(model, checkpoint, names):
                    sums[name].add_(tensor)  # of a lower precision: exact in float32
            for name, total in sums.items():
                own[name].copy_(total / len(checkpoints))
        save([model], out / CHECKPOINT)
    # Who starts from it takes its settings from here; those that it was saved with are this process's
    shutil.copyfile(checkpoints[0] / "run_config.yaml", out / CHECKPOINT / "run_config.yaml")
    count = sum(parameter.numel() for parameter in model.parameters())
    (out / "parameters").write_text(str(count), encoding="utf-8")


def _batches(tensors: dict) -> Iterator[list[str]]:
    """The tensors' names in groups of AT_A_TIME parameters; of a larger one by itself."""
    group: list[str] = []
    count = 0
    for name, tensor in tensors.items():
        if group and count + tensor.numel() > AT_A_TIME:
            yield group
            group, count = [], 0
        group.append(name)
        count += tensor.numel()
    if group:
        yield group


def _read(model, checkpoint: Path, names: list[str]) -> Iterator[tuple[str, object]]:
    """(name, tensor) of some of a checkpoint's tensors, in the layout of `model`, which is left alone."""
    import torch
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    entries = model.sharded_state_dict(metadata=metadata)
    wanted = {
        name: dataclasses.replace(entries[name], data=torch.empty_like(entries[name].data, requires_grad=False))
        for name in names
    }
    # Of a whole model it would be checked that every part is asked for
    found = dist_checkpointing.load({"model": wanted}, str(checkpoint), validate_access_integrity=False)
    yield from found["model"].items()


if __name__ == "__main__":
    said(Path(sys.argv[1]), main, *map(Path, sys.argv[1:]))
