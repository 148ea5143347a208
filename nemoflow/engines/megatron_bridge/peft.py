"""Adapters: SFT that trains LoRA or DoRA beside a frozen model, and saves them alone.

The base stays in its own checkpoint, which every start reads (`init`); the stage's checkpoints hold the adapters and
their optimizer. What Megatron-Bridge 0.6.2 gets wrong about that is mended by `patch`. Imports Megatron.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter
from megatron.bridge.peft.module_matcher import ModuleMatcher
from megatron.bridge.peft.utils import ParallelLinearAdapter, wildcard_match
from megatron.bridge.recipes.utils.dataset_utils import default_peft_config
from megatron.bridge.training.config import ConfigContainer
from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from nemoflow.errors import NemoflowError

ATTENTION = ("linear_qkv", "linear_proj")
MLP = ("linear_fc1", "linear_fc2")
MAMBA = ("in_proj", "out_proj")
"""Linear layers that adapters go to, by Megatron's names: all of a model's, as in Megatron-Bridge's own recipes."""

EXPERTS = "decoder.layers.0.mlp.experts."
EXPERT_NAMES = [f"{EXPERTS}{place}{name}" for name in MLP for place in ("", "local_experts.0.")]
"""How the layers of routed experts are called, computed together and one by one."""


def arguments(function: Callable, request: dict) -> dict:
    """What a recipe function is told of the stage's adapters, where it can be told."""
    scheme = request.get("peft")
    return {"peft_scheme": scheme} if scheme and "peft_scheme" in inspect.signature(function).parameters else {}


def configure(config: ConfigContainer, request: dict) -> None:
    """Give a recipe's configuration the stage's adapters, in place, before overrides.

    Raises NemoflowError when the stage and the recipe function or an override disagree about there being any.
    """
    scheme = request.get("peft")
    if scheme is None:
        if config.peft is not None:
            raise NemoflowError(
                f"function: {request['function']}: trains adapters; write the stage's `peft: lora` or `peft: dora`, "
                "or name a recipe that trains the whole model"
            )
        for key in request["overrides"]:
            if key.partition(".")[0] == "peft":
                raise NemoflowError(f"overrides.{key}: the stage trains no adapters; write its `peft: lora` or `dora`")
        return
    if "peft" in request["overrides"]:
        raise NemoflowError(f"overrides.peft: the stage says `peft: {scheme}`; settings are overrides such as peft.dim")
    hybrid = hasattr(config.model, "hybrid_layer_pattern")
    if config.peft is None:
        config.peft = default_peft_config(scheme, target_modules=[*ATTENTION, *MLP, *(MAMBA if hybrid else ())])
    if scheme == "dora" and config.model.num_moe_experts:
        config.peft.target_modules = _without_experts(config.peft.target_modules, config.model)


def _without_experts(targets: list[str], model) -> list[str]:
    """Targets of DoRA: it has no form for experts computed together (one weight per expert, one call for all).

    Upstream's own DoRA recipe of nano3 names them all the same, and ends with an AttributeError.
    """
    dense = "-" in (getattr(model, "hybrid_layer_pattern", None) or "-")
    places = [p for p, there in (("*.mlp.", dense), ("*.shared_experts.", _shared_expert(model))) if there]
    found = []
    for target in targets:
        found += [f"{place}{target}" for place in places] if target in MLP else [target]
    return found


def _shared_expert(model) -> bool:
    return bool(model.moe_shared_expert_intermediate_size)


def check(config: ConfigContainer, request: dict) -> None:
    """Raise NemoflowError for settings of adapters that cannot be, after overrides."""
    scheme = request.get("peft")
    if scheme is None:
        return
    if not request["init"]:
        raise NemoflowError("peft: adapters are trained beside a model; give the stage an `init`")
    if request["init"]["carry"] != "weights":
        raise NemoflowError(f"init.carry: {request['init']['carry']}: adapters are new; write carry: weights")
    if config.peft.dim < 1:
        raise NemoflowError(f"overrides.peft.dim: {config.peft.dim}: must be 1 or more")
    if getattr(config.peft, "experts_shared_outer_loras", False):
        raise NemoflowError("overrides.peft.experts_shared_outer_loras: such adapters cannot be exported; set false")
    if getattr(config.peft, "normalize_moe_lora", False) and config.peft.dim % config.model.moe_router_topk:
        raise NemoflowError(
            f"overrides.peft.dim: {config.peft.dim}: with peft.normalize_moe_lora the experts' rank is a share of it, "
            f"so it must be a multiple of model.moe_router_topk, {config.model.moe_router_topk}"
        )
    if scheme == "dora" and config.peft.dropout_position != "pre":
        raise NemoflowError("overrides.peft.dropout_position: DoRA drops out before its adapter only; set pre")
    if "router" in config.peft.target_modules:
        raise NemoflowError("overrides.peft.target_modules: router: an adapter of it cannot be exported; leave it out")
    if scheme == "dora" and config.model.num_moe_experts:
        for target in config.peft.target_modules:
            if target in MLP or any(wildcard_match(target, name) for name in EXPERT_NAMES):
                raise NemoflowError(
                    f"overrides.peft.target_modules: {target}: names the routed experts too, which DoRA has no form "
                    f"for; write *.shared_experts.{target.rpartition('.')[2]}, or peft: lora"
                )


def load_from(config: ConfigContainer, request: dict, load: Path) -> None:
    """Where base and adapters are loaded from, in place; `load` as in config.build.

    The base is read at every start. Its optimizer stays behind, which "raise_all" would call missing; the adapters'
    own checkpoint is read with "raise_all" (`patch`).
    """
    if not request.get("peft"):
        return
    base = request["init"]["checkpoint"]
    config.checkpoint.pretrained_checkpoint = base
    config.checkpoint.load = None if load == Path(base) else str(load)
    config.checkpoint.dist_ckpt_strictness = "raise_unexpected"


def patch(request: dict) -> None:
    """Mend, for this process, what would make adapters' checkpoints incomplete, inexact, or impossible to save."""
    if not request.get("peft"):
        return
    import megatron.bridge.training.setup as setup

    transform = setup._create_peft_pre_wrap_hook

    def strict_after_base(cfg, state):
        """Both loads obey one setting of strictness; the base's is over when this hook is."""
        hook = transform(cfg, state)

        def load_base_then_be_strict(model):
            model = hook(model)
            cfg.checkpoint.dist_ckpt_strictness = "raise_all"
            return model

        return load_base_then_be_strict

    setup._create_peft_pre_wrap_hook = strict_after_base
    layers(all_targets="peft.target_modules" in request["overrides"])


def layers(all_targets: bool = False) -> None:
    """What of `patch` concerns models with adapters, wherever they are made.

    all_targets: a target that names no layer is an error, not a warning; a recipe's own list may name more than a model
    has, but somebody who writes one means it.
    """
    freeze = PEFT.freeze_model

    def freeze_router_bias_too(self, model, training=True):
        """The bias that balances the routing is a buffer and would go on changing, in no checkpoint of adapters."""
        freeze(self, model, training=training)
        for chunk in model if isinstance(model, list) else [model]:
            for module in chunk.modules():
                if hasattr(module, "frozen_expert_bias"):
                    module.frozen_expert_bias = True

    PEFT.freeze_model = freeze_router_bias_too

    matched = ModuleMatcher._validate_target_matches

    def some_layer_each(self):
        unmatched = sorted(alias for alias, found in self._alias_matches.items() if not found)
        if unmatched and (all_targets or len(unmatched) == len(self._alias_matches)):
            raise NemoflowError(
                f"overrides.peft.target_modules: {', '.join(unmatched)}: names no layer of this model; adapters go to "
                f"{', '.join((*ATTENTION, *MLP, *MAMBA))}, everywhere or as in *.layers.0.*.linear_qkv"
            )
        matched(self)

    ModuleMatcher._validate_target_matches = some_layer_each

    # A Mamba layer asks its projections for their weight when it is saved; LoRA's wrapper answers, DoRA's does not.
    DoRALinear.weight = property(lambda self: self.to_wrap.weight)
    save = ParallelLinearDoRAAdapter.sharded_state_dict

    def save_in_parts(self, prefix="", sharded_offsets=(), metadata=None, mamba_dim_info=None):
        """Also for a Mamba layer's in_proj, whose rows are five parts, each sharded by itself."""
        found = save(self, prefix, sharded_offsets, metadata)
        if mamba_dim_info is None:
            return found
        found |= ParallelLinearAdapter.sharded_state_dict(self, prefix, sharded_offsets, metadata, mamba_dim_info)
        inner = mamba_dim_info["d_inner_local_tp"]
        states = mamba_dim_info["ngroups_local_tp"] * mamba_dim_info["d_state"]
        key, sizes = f"{prefix}weight_magnitude", [inner, inner, states, states, mamba_dim_info["nheads_local_tp"]]
        found[key] = _split_tensor_factory(found[key], sizes, ["z", "x", "B", "C", "dt"], 0)
        return found

    ParallelLinearDoRAAdapter.sharded_state_dict = save_in_parts

    norm = DoRALinear._get_weight_norm

    def norm_of_whole_rows(self):
        """A row-parallel layer has a piece of each row; upstream measures the piece, each rank another one."""
        adapter = self.adapter
        if not adapter.input_is_parallel or adapter.tp_group.size() == 1:
            return norm(self)
        squares = norm(self).float().square()
        torch.distributed.all_reduce(squares, group=adapter.tp_group)
        return squares.sqrt().to(self.to_wrap.weight.dtype)

    DoRALinear._get_weight_norm = norm_of_whole_rows
    measure = ParallelLinearDoRAAdapter.init_weight_magnitude

    def measure_and_mark(self, value):
        """Tensor parallel ranks have magnitudes of their own rows, or all rows', as the layer is cut."""
        measure(self, value)
        if not self.input_is_parallel:
            set_tensor_model_parallel_attributes(self.weight_magnitude, True, 0, 1)
        elif self.config.sequence_parallel:
            self.weight_magnitude.sequence_parallel = True  # each scales its own positions: gradients to be summed

    ParallelLinearDoRAAdapter.init_weight_magnitude = measure_and_mark

    register = ParallelLinearAdapter._register_shared_expert_grad_sync_hooks

    def count_once(self):
        """Every expert parallel rank has the adapter that all experts share: the gradient's norm wants it once."""
        register(self)
        if self.ep_group is not None and self.ep_group.rank() > 0:
            self.linear_in.weight.shared = self.linear_out.weight.shared = True

    ParallelLinearAdapter._register_shared_expert_grad_sync_hooks = count_once

    slots = ParallelLinearAdapter._apply_expert_axis_factory

    def first_slot(self, *args, **kwargs):
        """An adapter that all experts share is stored once for each. Their mean, which a load takes, is rounded."""
        factory = slots(self, *args, **kwargs)
        merge, count = factory.merge_fn, self.local_experts_per_rank()

        def merge_first(parts):
            if not isinstance(parts, list):
                return merge(parts)
            return merge(parts[: len(parts) // count])

        factory.merge_fn = merge_first
        return factory

    ParallelLinearAdapter._apply_expert_axis_factory = first_slot


def effective(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, magnitude=None) -> torch.Tensor:
    """A weight (out, in) with its adapter: W + scale up down, and under DoRA each row of that with length `magnitude`.

    down (dim, in) and up (out, dim) are LoRA's A and B, magnitude (out). Summed in float32; returns the weight's dtype.
    DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), equation 5.
    """
    merged = weight.float() + scale * (up.float() @ down.float())
    if magnitude is not None:
        merged = merged * (magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)
