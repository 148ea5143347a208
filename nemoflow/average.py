"""Kind `average`: the mean of the weights of several states, as a Megatron checkpoint to start from or to export.

    checkpoint/     as Megatron-Bridge's own iter_* directories, with the first state's run_config.yaml, no optimizer

Averaging the last states of a training does what a longer decay of the learning rate would (Izmailov et al.,
arXiv:1803.05407). A process of its own, python -m nemoflow.average OUT STATE..., holds the model twice: the sums in
float32, and the state being added.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from nemoflow.conversion import converting, said
from nemoflow.data.made import Made
from nemoflow.errors import NemoflowError
from nemoflow.export.convert import check_megatron
from nemoflow.imports import listed, save


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> Made:
    """Average inputs["states"], directories with a link `checkpoint` each, all of one trajectory or of equal models.

    Returns the measures {"states", "parameters"} and the checkpoint's files with their sizes.

    Raises NemoflowError for a checkpoint that is damaged, and for one of another model.
    """
    checkpoints = [state / "checkpoint" for state in inputs["states"]]
    for checkpoint in checkpoints:
        check_megatron(checkpoint)
    progress(f"averages {len(checkpoints)} states, in float32")
    converting("nemoflow.average", checkpoints[0], out, *checkpoints)
    parameters = int((out / "parameters").read_text(encoding="utf-8"))
    (out / "parameters").unlink()
    return Made({"states": len(payload["of"]), "parameters": parameters}, listed(out))


def main(out: Path, *checkpoints: Path) -> None:
    """Average; see the module."""
    from nemoflow import cpu

    if on_cpu := cpu.needed():
        cpu.enable()
    import torch
    from megatron.bridge.training.model_load_save import load_megatron_model, temporary_distributed_context

    if on_cpu:
        cpu.patch(training=False)

    def tensors(model) -> dict[str, torch.Tensor]:
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tensor for name, tensor in found.items() if tensor is not None and tensor.is_floating_point()}

    with temporary_distributed_context(backend="gloo"):
        sums: dict[str, torch.Tensor] = {}
        for number, checkpoint in enumerate(checkpoints):
            model = load_megatron_model(str(checkpoint), use_cpu_init=True, skip_temp_dist_context=True)
            for name, tensor in tensors(model[0]).items():
                value = tensor.detach().to(torch.float32)
                if number and (name not in sums or sums[name].shape != value.shape):
                    raise NemoflowError(f"{checkpoint}: is of another model than {checkpoints[0]}: {name}")
                sums[name] = sums[name].add_(value) if number else value.clone()
        with torch.no_grad():
            for name, tensor in tensors(model[0]).items():
                tensor.copy_(sums[name] / len(checkpoints))
        save(model, None, out)
    count = sum(parameter.numel() for parameter in model[0].parameters())
    (out / "parameters").write_text(str(count), encoding="utf-8")


if __name__ == "__main__":
    said(Path(sys.argv[1]), main, *map(Path, sys.argv[1:]))
