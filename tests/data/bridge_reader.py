"""Reads a packed file with Megatron-Bridge's own dataset and prints what it feeds the model, as JSON, pack by pack.

`python bridge_reader.py FILE PACK_SIZE OUTPUT [PAD_MULTIPLE]`. A process of its own, because without a GPU
Megatron-Bridge can be imported only after the device shim, which changes torch.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from nemoflow import cpu


def main(file: str, pack_size: int, output: str, pad_multiple: int = 1) -> None:
    if cpu.needed():
        cpu.enable()
    from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split

    data = build_gpt_sft_split(
        file,
        tokenizer=SimpleNamespace(eos_id=2, eod=2),
        seq_length=pack_size,
        memmap_workers=1,
        seed=0,
        packed_sequence_size=pack_size,
        pad_seq_to_mult=pad_multiple,
        dataset_kwargs={"pad_to_max_length": True},
    )
    packs = []
    for i in range(len(data)):
        row = data[i]
        data.validate_row(i, row["input_ids"], row["loss_mask"], row["seq_boundaries"][:-1])
        batch = data.collate_fn([row])
        keys = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q", "cu_seqlens_q_padded")
        packs.append({key: batch[key][0].tolist() for key in keys if key in batch})
    Path(output).write_text(json.dumps(packs))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
