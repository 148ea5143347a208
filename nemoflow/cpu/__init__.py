"""The device shim: Megatron-Bridge and Megatron-Core on a machine without a GPU, at toy size.

    cpu.enable()             before the first import of Megatron, when cpu.needed()
    import megatron...
    cpu.patch()              once, after
    cpu.adapt(config)        on the ConfigContainer of a recipe, after its overrides

Everything that differs between a CPU and a GPU run is in this package. It changes how numbers are computed, never
which: precision, model, data and schedule are the recipe's own settings.
"""

import functools
import importlib.util
import os

from nemoflow.errors import NemoflowError

THREADS = 2
"""Threads of a process, unless NEMOFLOW_CPU_THREADS says otherwise. Sums are split among threads, so their last digits
depend on the number: it must not follow from the machine, nor from the cores a workflow was given this time."""


@functools.cache
def needed() -> bool:
    """Whether this machine lacks a GPU, Transformer Engine or mamba_ssm. NEMOFLOW_CPU=1 or =0 decides instead.

    Found out once: afterwards the stand-ins are there.

    Raises NemoflowError for another value of NEMOFLOW_CPU.
    """
    wish = os.environ.get("NEMOFLOW_CPU", "")
    if wish not in ("", "0", "1"):
        raise NemoflowError(f"NEMOFLOW_CPU={wish}: must be 1 (use the CPU), 0 (do not) or unset (find out)")
    if wish:
        return wish == "1"
    if any(importlib.util.find_spec(name) is None for name in ("transformer_engine", "mamba_ssm")):
        return True
    import torch

    return not torch.cuda.is_available()


@functools.cache
def enable() -> None:
    """Stand in for the GPU and for the libraries that need one. Before the first import of Megatron."""
    import torch

    from nemoflow.cpu import device, standins

    # Megatron-Core compiles small functions as it is imported, for which the compiler would ask CUDA for its GPUs.
    torch.compile = lambda function=None, **_: function or (lambda function: function)
    torch.set_num_threads(int(os.environ.get("NEMOFLOW_CPU_THREADS", THREADS)))
    standins.install()
    device.redirect()


@functools.cache
def patch(training: bool = True) -> None:
    """Patch what refuses a CPU. After `enable`, before a model is built; `training=False` where nothing is trained."""
    from nemoflow.cpu import adapters, gpt, patches

    adapters.patch()
    patches.models()
    gpt.patch()
    patches.random_states()
    patches.checkpoints()
    if training:
        patches.communication()
        patches.distributed_optimizer()
        patches.training()


# Settings that name a CUDA kernel, a CUDA-only way to overlap or recompute, or a communicator; never a result.
MODEL = {
    "transformer_impl": "local",
    "context_parallel_size": 1,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "moe_flex_dispatcher_backend": None,
    "moe_shared_expert_overlap": False,
    "gradient_accumulation_fusion": False,
    "use_fused_weighted_squared_relu": False,
    "cross_entropy_loss_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "recompute_granularity": None,
    "recompute_modules": None,
    "cuda_graph_impl": "none",
    "cuda_graph_modules": [],
    "use_te_rng_tracker": False,
}

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Ways to deal a model out among processes that gloo can serve. Context parallelism is none: only Transformer Engine's
attention has it."""


def adapt_model(model, processes: int = 1) -> None:
    """Take from a model provider the kernels a CPU does not have, and parallel sizes over `processes`. In place."""
    from megatron.core.transformer.enums import AttnBackend

    for name, value in MODEL.items():
        setattr(model, name, value)
    model.attention_backend = AttnBackend.auto
    if model.moe_token_dispatcher_type == "flex":
        model.moe_token_dispatcher_type = "alltoall"
    for name in SIZES:
        if (getattr(model, name) or 1) > processes:
            setattr(model, name, 1)
    if model.pipeline_model_parallel_size == 1:
        model.virtual_pipeline_model_parallel_size = model.pipeline_model_parallel_layout = None
    model.sequence_parallel = model.sequence_parallel and model.tensor_model_parallel_size > 1


def adapt(config) -> None:
    """Take from a ConfigContainer the kernels, overlaps and communicators a CPU does not have. In place.

    Parallel sizes and the distributed optimizer stay, as far as there are processes for them.
    """
    adapt_model(config.model, int(os.environ.get("WORLD_SIZE", "1")))
    config.rng.te_rng_tracker = False
    config.comm_overlap = None
    config.env_vars = {}
    config.dist.distributed_backend = "gloo"
    config.dist.disable_jit_fuser = True
    for section in (config.ddp, config.optimizer):
        section.overlap_param_gather = False
    config.ddp.overlap_grad_reduce = False
    config.ddp.average_in_collective = False
    config.dataset.num_workers = 0
    config.dataset.persistent_workers = False
    config.dataset.pin_memory = False
    config.checkpoint.async_save = False
