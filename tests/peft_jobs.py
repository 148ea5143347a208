"""What test_peft.py runs beside Megatron, in a fork of its server."""

from pathlib import Path

from nemoflow.errors import NemoflowError

POSITIONS = 64


def configure(request: dict) -> dict:
    """The adapters' settings that a request leads to, or what is said against it."""
    from nemoflow.engines.megatron_bridge import config

    try:
        peft = config.prepare(request).peft
    except NemoflowError as error:
        return {"error": str(error)}
    names = ("target_modules", "dim", "alpha", "dropout")
    return {"kind": type(peft).__name__} | {name: getattr(peft, name) for name in names}


def export(job: dict) -> dict:
    """A conversion, as the program does it: {"checkpoint", "base", "tokens", "out"}."""
    from nemoflow.export import convert

    base, about = job["base"] and Path(job["base"]), {"tokens": job["tokens"], "hf_config": None}
    try:
        convert.main("megatron_bridge", Path(job["checkpoint"]), about, "float32", Path(job["out"]), base)
    except NemoflowError as error:
        return {"error": str(error)}
    return {}


def logits(job: dict) -> int:
    """Megatron's own logits of a base with its adapters beside it, in `out`, for `ids` (2, POSITIONS)."""
    import torch
    from megatron.bridge.training.model_load_save import load_megatron_model, temporary_distributed_context
    from megatron.core.utils import unwrap_model
    from safetensors.torch import save_file

    from nemoflow.export import adapter

    with temporary_distributed_context(backend="gloo"):
        model = unwrap_model(load_megatron_model(job["base"], use_cpu_init=True, skip_temp_dist_context=True))
        adapter._load(Path(job["checkpoint"]), model)
        ids = torch.randint(3, 300, (2, POSITIONS), generator=torch.Generator().manual_seed(0))
        ahead = torch.triu(torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.bool), diagonal=1)
        positions = torch.arange(POSITIONS).expand(2, POSITIONS)
        with torch.no_grad():
            found = model[0].eval()(input_ids=ids, position_ids=positions, attention_mask=ahead)
    save_file({"ids": ids, "logits": found.float().contiguous()}, job["out"])
    return 0


def train(argument: dict) -> int:
    """A run as world.run does it, whose adapters begin with the same numbers however they are dealt out."""
    import torch
    import world
    from megatron.bridge.peft.utils import ParallelLinearAdapter

    begin = {"xavier": 0.1, "zero": 0.0}
    ParallelLinearAdapter._get_init_fn = lambda _, method: lambda t: torch.nn.init.constant_(t, begin[method])
    return world.run(argument)


def dense(job: dict) -> int:
    """A small Qwen3 with adapters of random numbers: `base`, and in `out` merged, with Megatron's logits unmerged."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.utils.dataset_utils import default_peft_config
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from nemoflow import cpu
    from nemoflow.export import adapter

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    base, out = Path(job["base"]), Path(job["out"])
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(base)
    bridge = AutoBridge.from_hf_pretrained(base, torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=True)
    cpu.adapt_model(provider)
    provider.bf16 = False
    provider.params_dtype = provider.pipeline_dtype = torch.float32
    with temporary_distributed_context(backend="gloo"):
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        peft = default_peft_config(job["scheme"], dim=4, alpha=8)
        peft(model, training=False)
        with torch.no_grad():
            for name, parameter in model[0].named_parameters():
                if ".adapter." in name and parameter.dim() == 2:
                    parameter.normal_(std=0.2)
                elif ".adapter." in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            ids = torch.randint(0, 300, (2, POSITIONS))
            ahead = torch.triu(torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.bool), diagonal=1)
            positions = torch.arange(POSITIONS).expand(2, POSITIONS)
            found = model[0].eval()(input_ids=ids, position_ids=positions, attention_mask=ahead)
        adapter.take_out(peft, bridge, model, "float32", out)
        bridge.save_hf_pretrained(model, out, show_progress=False)
    save_file({"ids": ids, "logits": found.detach().float().contiguous()}, out / "logits.safetensors")
    return 0
