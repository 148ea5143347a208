"""A child process of test_export.py: a NemotronH model as a Megatron-Bridge checkpoint, and what Megatron computes.

python tests/export_model.py HF_DIRECTORY OUT

Writes OUT/iter_0000000 and OUT/logits.safetensors: `ids` [2, 64] and Megatron's `logits` [2, 64, vocabulary].
"""

import sys
from pathlib import Path

from nemoflow import cpu


def main(hf: Path, out: Path) -> None:
    cpu.enable()
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from safetensors.torch import save_file

    cpu.patch(training=False)
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=True)
    cpu.adapt_model(provider)
    provider.bf16 = False
    provider.params_dtype = provider.pipeline_dtype = torch.float32
    with temporary_distributed_context(backend="gloo"):
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        ids = torch.randint(6, 512, (2, 64), generator=torch.Generator().manual_seed(0))
        ahead = torch.triu(torch.ones(1, 1, 64, 64, dtype=torch.bool), diagonal=1)
        with torch.no_grad():
            logits = model[0].eval()(input_ids=ids, position_ids=torch.arange(64).expand(2, 64), attention_mask=ahead)
        bridge.save_megatron_model(model, out, hf_tokenizer_path=hf)
    save_file({"ids": ids, "logits": logits.float().contiguous()}, out / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
