"""Transformers (GPT models: Qwen, Llama, ...) without Transformer Engine, with parameters named as with it.

Transformer Engine computes the norm before a linear layer within that layer, where Megatron-Core's local layers have a
norm of their own. Megatron-Bridge's tables for these models know the former's names only, so the layers here are made
in its form: checkpoints, conversion and adapters then find what they look for. Written against megatron-bridge 0.6.2
and megatron-core 0.19.2.
"""

import megatron.bridge.models.gpt_provider as gpt_provider
import megatron.core.transformer.transformer_block as transformer_block
import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from nemoflow.cpu.attention import PackedDotProductAttention
from nemoflow.cpu.patches import Norm
from nemoflow.errors import NemoflowError


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's linear layer, column parallel, of its input's root mean square norm.

    Input (length, batch, input_size). Returns (output, bias), and the normed input besides when an adapter asks for it.
    """

    return_layernorm_output = False

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.epsilon = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # see patches.Norm

    def forward(self, input_, *args, **kwargs):
        normed = torch.nn.functional.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.epsilon)
        output, bias = super().forward(normed, *args, **kwargs)
        return (output, bias, normed) if self.return_layernorm_output else (output, bias)


def local_layer_spec(config):
    """A layer of a transformer without Transformer Engine: Megatron-Core's local one, our attention and norms.

    Raises NemoflowError for a norm that this has no form of.
    """
    if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
        raise NemoflowError("model.normalization: on a CPU transformers have RMSNorm with weights around 1 only")
    spec = gpt_provider.local_layer_spec(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.sharded_state_dict_keys_map = {}  # the names are right already
    layer.input_layernorm = IdentityOp
    attention.linear_qkv = NormedColumnParallelLinear
    attention.core_attention = PackedDotProductAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if config.num_moe_experts:
        layer.pre_mlp_layernorm = Norm
    else:
        layer.pre_mlp_layernorm = IdentityOp
        layer.mlp.keywords["submodules"].linear_fc1 = NormedColumnParallelLinear
    return spec


def patch() -> None:
    """Transformers are built from these layers.

    What the provider's default spec calls is replaced, not the recipe's setting, so a stored configuration reads as on
    a GPU. A layer is told by the adapter that wraps it to return the normed input, which is the adapter's input too:
    upstream tells only Transformer Engine's layers.
    """
    gpt_provider.transformer_engine_layer_spec = local_layer_spec
    transformer_block.LayerNormImpl = Norm
    wrap = AdapterWrapper.__init__

    def wrap_normed(self, to_wrap, adapter):
        wrap(self, to_wrap, adapter)
        if isinstance(to_wrap, NormedColumnParallelLinear):
            to_wrap.return_layernorm_output = True

    AdapterWrapper.__init__ = wrap_normed
