"""Adapters of routed experts without grouped kernels: as on a GPU, one for all experts of a layer.

A GPU computes a layer's experts in one grouped call, around which Megatron-Bridge puts one LoRA adapter that they all
share. Here they are computed one by one, and by itself it would give each its own: another model, with other
checkpoints. Reaches private names of megatron-bridge 0.6.2 and megatron-core 0.19.2, as patches.py does.
"""

import re

from megatron.bridge.peft import module_matcher, utils
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import get_pg_size

LINEARS = ("linear_fc1", "linear_fc2")


class SharedLoRALinear(LoRALinear):
    """An expert's linear layer with an adapter that is saved by the layer of experts, once for all of them."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)


def patch() -> None:
    """Share adapters among the experts of a layer wherever the LoRA settings say so, as they do by default."""
    # Megatron-Core defines the names of Transformer Engine's layers as None, which Bridge takes for their presence.
    utils.HAVE_TE = False
    for layer in ("COL", "LN_COL", "ROW"):
        setattr(module_matcher, f"HAVE_TE_{layer}_LINEAR", False)
    # The wrapper of a Mamba layer's projection asks it for this, which only Transformer Engine's layers have.
    ColumnParallelLinear.tp_size = property(lambda self: get_pg_size(self.tp_group))
    transform, call, save = LoRA.transform, PEFT.__call__, SequentialMLP.sharded_state_dict

    def transform_as_grouped(self, module, name=None, prefix=None):
        """Under the name that a GPU's grouped layer has, from which the adapter's form follows."""
        if self.share_expert_adapters and prefix:
            prefix = re.sub(r"\.local_experts\.\d+$", "", prefix)
        return transform(self, module, name, prefix)

    def call_and_share(self, model, training=True):
        model = call(self, model, training=training)
        if getattr(self, "share_expert_adapters", False):
            for chunk in model if isinstance(model, list) else [model]:
                for experts in [m for m in chunk.modules() if isinstance(m, SequentialMLP)]:
                    _share(experts)
        return model

    def save_with_shared(self, prefix="", sharded_offsets=(), metadata=None):
        found = save(self, prefix, sharded_offsets, metadata)
        for linear in LINEARS:
            wrapper = getattr(self.local_experts[0], linear)
            if isinstance(wrapper, SharedLoRALinear):
                own = f"{prefix}local_experts.0.{linear}.adapter."
                part = wrapper.adapter.sharded_state_dict(own, sharded_offsets, metadata)
                replace_prefix_for_sharding(part, own, f"{prefix}experts.{linear}.adapter.")
                found |= part
        return found

    LoRA.transform, PEFT.__call__, SequentialMLP.sharded_state_dict = (
        transform_as_grouped,
        call_and_share,
        save_with_shared,
    )


def _share(experts: SequentialMLP) -> None:
    """Give all experts of a layer the adapters of the first."""
    for linear in LINEARS:
        first = getattr(experts.local_experts[0], linear)
        if isinstance(first, LoRALinear):
            for expert in experts.local_experts:
                wrapper = getattr(expert, linear)
                wrapper.adapter = first.adapter
                wrapper.__class__ = SharedLoRALinear
