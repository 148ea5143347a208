"""Modules that a machine without a GPU does not have, in the form and as far as Megatron imports them.

mamba_ssm               the scan in plain PyTorch (nemoflow/cpu/mamba.py), always: an installed one would need a GPU
causal_conv1d           its version number, asked for before packed Mamba; its functions are for generation only
nvidia_resiliency_ext   the name CallWrapper in an annotation of `pretrain`, unless installed
transformer_engine      while `megatron.bridge.peft.lora_layers` is imported, which names its classes; never otherwise,
                        since Megatron-Core takes the presence of that module for the presence of its kernels
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch

from nemoflow.cpu import mamba


def _module(name: str, **members) -> ModuleType:
    module = ModuleType(name)
    # Packages that look for optional ones call find_spec, which refuses a loaded module without a spec.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    return module


def _generation_only(*args, **kwargs):
    raise NotImplementedError("a kernel for generation; on a CPU models generate from their HF export")


def _modules() -> dict[str, ModuleType]:
    scan = {name: getattr(mamba, name) for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")}
    modules = [
        # The versions are those whose behaviour is copied; Megatron-Core wants at least 2.0.0 and 1.4.0 for packing.
        _module("mamba_ssm", __version__="2.2.6"),
        _module("mamba_ssm.ops"),
        _module("mamba_ssm.ops.triton"),
        _module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=mamba.RMSNorm),
        _module("mamba_ssm.ops.triton.ssd_combined", **scan),
        _module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=_generation_only),
        _module("causal_conv1d", __version__="1.5.3", causal_conv1d_fn=None, causal_conv1d_update=None),
        _module("causal_conv1d.causal_conv1d_varlen", causal_conv1d_varlen_states=_generation_only),
    ]
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        wrapper = type("CallWrapper", (), {})
        modules += [
            _module("nvidia_resiliency_ext", __version__="0.0.0"),
            _module("nvidia_resiliency_ext.inprocess", CallWrapper=wrapper),
        ]
    return {module.__name__: module for module in modules}


def _transformer_engine() -> dict[str, ModuleType]:
    layers = {name: type(name, (torch.nn.Module,), {}) for name in ("Linear", "LayerNormLinear", "LayerNormMLP")}
    operators = SimpleNamespace(Sequential=type("Sequential", (), {}))
    pytorch = _module("transformer_engine.pytorch", ops=operators, **layers)
    return {"transformer_engine": _module("transformer_engine", pytorch=pytorch), "transformer_engine.pytorch": pytorch}


class _LoraLayers(importlib.abc.MetaPathFinder):
    """Lets `megatron.bridge.peft.lora_layers` see a Transformer Engine, and nothing it imports in turn."""

    NAME = "megatron.bridge.peft.lora_layers"
    IMPORTS = (
        "megatron.core.transformer.moe.moe_utils",
        "megatron.bridge.peft.adapter_wrapper",
        "megatron.bridge.peft.lora_merge",
    )

    def find_spec(self, name, path, target=None):
        if name != self.NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            for needed in self.IMPORTS:
                importlib.import_module(needed)
            visible = _transformer_engine()
            sys.modules.update(visible)
            try:
                run(module)
            finally:
                for each in visible:
                    del sys.modules[each]

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Make the stand-ins importable. Before the first import of Megatron."""
    sys.modules.update(_modules())
    if importlib.util.find_spec("transformer_engine") is None:
        sys.meta_path.insert(0, _LoraLayers())
