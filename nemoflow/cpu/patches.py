"""What in Megatron refuses a CPU whatever the device API says: each patch, its reason, the private names it reaches.

Written against megatron-bridge 0.6.2 and megatron-core 0.19.2, whose versions are pinned; a newer release may move
these names, and the tests of logit parity, packing and resuming are what would notice.
"""

import functools
import queue

import megatron.bridge.models.hybrid.hybrid_provider as hybrid_provider
import megatron.core.models.hybrid.hybrid_block as hybrid_block
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from megatron.core.tensor_parallel import random as rng
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from nemoflow.cpu.attention import PackedDotProductAttention


def local_stack_spec():
    """The layers of a hybrid stack without Transformer Engine: Megatron-Core's local ones, torch norms, our attention.

    The ModelOpt spec is the only public one with local linear layers; it still asks Transformer Engine for its norms.
    """
    spec = get_hybrid_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=False)
    layers = spec.submodules
    layers.mamba_layer.submodules.norm = WrappedTorchNorm
    layers.attention_layer.submodules.input_layernorm = WrappedTorchNorm
    layers.attention_layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    layers.mlp_layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    layers.moe_layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    return spec


def models() -> None:
    """Hybrid models are built from local layers.

    The provider's default spec is replaced, not the recipe's setting, so a stored configuration reads as on a GPU.
    HybridStack takes Transformer Engine's norm for its last one, whatever the spec says.
    """
    hybrid_provider.transformer_engine_hybrid_stack_spec = local_stack_spec
    hybrid_block.TENorm = WrappedTorchNorm


def random_states() -> None:
    """The tracker of model-parallel RNG states keeps states of the CPU generator.

    `_get_cuda_rng_state` and `_set_cuda_rng_state` reach into CUDA's generators. Conversion builds models without ever
    seeding the tracker (that is done only with CUDA), so `fork` seeds a missing state by its place.
    """
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    fork = rng.CudaRNGStatesTracker.fork

    def fork_seeded(self, name=rng._MODEL_PARALLEL_RNG_TRACKER_NAME):
        if name not in self.states_:
            self.add(name, 1234 + len(self.states_))
        return fork(self, name)

    rng.CudaRNGStatesTracker.fork = fork_seeded


def checkpoints() -> None:
    """A synchronous save passes its results through a plain queue.

    `get_write_results_queue` starts a manager process by spawn, which imports the whole program once more, although a
    synchronous save writes and reads that queue in this very process. The module's `_results_queue` stays None, so the
    clean-up after a failure does not look for that process either. `adapt` turns asynchronous saves off.
    """
    filesystem_async.get_write_results_queue = lambda *_: queue.Queue()


def training() -> None:
    """`pretrain` starts without CUDA and seeds the model-parallel RNG states.

    `setup` insists on CUDA unless `allow_no_cuda` is passed, which it never passes; `_set_random_seed` skips the
    tracker when there are no GPUs; `compile_helpers` runs make, and an installed wheel has no Makefile and no need.
    """
    import megatron.bridge.training.initialize as initialize
    import megatron.bridge.training.setup as setup

    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    initialize.compile_helpers = lambda: None
    seed = initialize._set_random_seed

    def seed_tracker_too(value, *args, pg_collection, **kwargs):
        seed(value, *args, pg_collection=pg_collection, **kwargs)
        ranks = {
            "tp_rank": pg_collection.tp.rank(),
            "ep_rank": pg_collection.ep.rank(),
            "etp_rank": pg_collection.expt_tp.rank(),
        }
        rng.model_parallel_cuda_manual_seed(value, **ranks)

    initialize._set_random_seed = seed_tracker_too
