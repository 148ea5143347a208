"""Small NemotronH models and a tokenizer for them, made in seconds without training."""

import json
from pathlib import Path

import torch

from nemoflow.data import tokenizer as tokenizers


def small_tokenizer(out: Path) -> Path:
    """A tokenizer of 512 tokens with a chat template in `out`, made as recipes make theirs."""
    source = out.with_name(f"{out.name}-source")
    (source / "files").mkdir(parents=True)
    out.mkdir(exist_ok=True)
    words = (Path(__file__).parent / "test_export.py").read_text(encoding="utf-8").split()
    texts = [" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]
    (source / "files/00000.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (source / "sealed.json").write_text(json.dumps({"payload": {"generator": "test", "shards": 1}}))
    tokenizers.make({"vocab_size": 512, "chat_template": "chatml"}, {"sources": [source]}, out, print)
    return out


def random_model(pattern: str, **more):
    """A transformers NemotronH model of random weights, with logits of size one and an expert bias that matters."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 256,
        "time_step_min": 1e-12,
        "use_mamba_kernels": False,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(hybrid_override_pattern=pattern, **sizes | more)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
            elif name.endswith("dt_bias"):
                tensor[::2] = -9  # a step size of 1e-4, as training reaches it and initialisation does not
    return model
