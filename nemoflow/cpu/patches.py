"""What in Megatron refuses a CPU whatever the device API says: each patch, its reason, the private names it reaches.

Written against megatron-bridge 0.6.2 and megatron-core 0.19.2, whose versions are pinned; a newer release may move
these names, and the tests of logit parity, packing and resuming are what would notice.
"""

import functools
import queue
from unittest import mock

import megatron.bridge.models.hybrid.hybrid_provider as hybrid_provider
import megatron.core.models.hybrid.hybrid_block as hybrid_block
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from megatron.core.tensor_parallel import random as rng
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from nemoflow.cpu.attention import PackedDotProductAttention


class Norm(WrappedTorchNorm):
    """Torch's norm under sequence parallelism, which the parent refuses.

    Every tensor parallel rank then norms its own positions, so gradients of the weights are parts of a sum. Megatron
    adds them up for the parameters that are marked, as Transformer Engine's norms mark theirs.
    """

    def __new__(cls, config, *args, **kwargs):
        with mock.patch.object(config, "sequence_parallel", False):
            norm = super().__new__(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def local_stack_spec():
    """The layers of a hybrid stack without Transformer Engine: Megatron-Core's local ones, torch norms, our attention.

    The ModelOpt spec is the only public one with local linear layers; it still asks Transformer Engine for its norms.
    """
    spec = get_hybrid_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=False)
    layers = spec.submodules
    layers.mamba_layer.submodules.norm = Norm
    layers.attention_layer.submodules.input_layernorm = Norm
    layers.attention_layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
    layers.mlp_layer.submodules.pre_mlp_layernorm = Norm
    layers.moe_layer.submodules.pre_mlp_layernorm = Norm
    return spec


def models() -> None:
    """Hybrid models are built from local layers.

    The provider's default spec is replaced, not the recipe's setting, so a stored configuration reads as on a GPU.
    HybridStack takes Transformer Engine's norm for its last one, whatever the spec says.
    """
    hybrid_provider.transformer_engine_hybrid_stack_spec = local_stack_spec
    hybrid_block.TENorm = Norm


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


def communication() -> None:
    """Expert parallelism's all-to-all over gloo, which takes the numbers of tokens to send as ints only.

    Megatron counts them as arrays of NumPy, whose elements are no ints.
    """
    exchange = token_dispatcher.all_to_all

    def plain(sizes):
        return None if sizes is None else [int(n) for n in sizes]

    def with_ints(group, tokens, output_split_sizes=None, input_split_sizes=None, *rest, **options):
        return exchange(group, tokens, plain(output_split_sizes), plain(input_split_sizes), *rest, **options)

    token_dispatcher.all_to_all = with_ints


def distributed_optimizer() -> None:
    """The distributed optimizer goes on from a checkpoint with torch's Adam, which counts its steps per parameter.

    Written for Adams that count them per group, Megatron's loading goes wrong in three places: it describes the state
    of an optimizer that has none yet; it gives all parameters one and the same tensor as their counter, so that a
    step counts as many as there are parameters; and it looks for the counter among the sharded tensors, or puts back
    there the one from before loading. The counter of a parameter group, which is saved and loaded, is right.
    """
    describe, load, put = (
        getattr(DistributedOptimizer, name)
        for name in ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states")
    )

    def state_dict(self):
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return describe(self)

    def load_state_dict(self, found):
        load(self, found)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def put_without_step(self, parameter, tensors):
        put(self, parameter, tensors | {"step": None})  # what is no tensor is left as it is

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = put_without_step


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
