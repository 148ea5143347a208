"""What the benchmarks compare with, one program each: python benchmarks/peers.py PEER CORPUS.jsonl OUT TOKENIZER_DIR

Imports nothing of nemoflow, so that each peer is what it is by itself; datatrove runs in an environment of its own.
"""

import json
import os
import sys
import time
from pathlib import Path


def datatrove(corpus: Path, out: Path, tokenizer: Path) -> None:
    """datatrove's MegatronDocumentTokenizer, in one process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    writer = MegatronDocumentTokenizer(
        output_folder=str(out),
        tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
        eos_token="</s>",
        batch_size=1000,
    )
    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=str(out / "logs")).run()


def datasets(corpus: Path, out: Path, tokenizer: Path) -> None:
    """datasets.map with tokenizers' fastest call in batches of 1000, then ids to one file."""
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = engine.token_to_id("</s>")

    def encode(batch: dict) -> dict:
        found = engine.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*e.ids, end] for e in found]}

    rows = load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    rows = rows.map(encode, batched=True, batch_size=1000, remove_columns=rows.column_names)
    with (out / "datasets.bin").open("wb") as file:
        for batch in rows.with_format("arrow").iter(1000):
            file.write(batch.column("ids").combine_chunks().flatten().to_numpy().astype(np.int32))


def bare(corpus: Path, out: Path, tokenizer: Path) -> None:
    """gigatoken alone, cold, on texts in memory: CPU-seconds of its documented batch call and of one call for many
    joined texts, each in a process of its own; prints the call's bytes and seconds."""
    call = out.name
    import gigatoken

    engine = gigatoken.Tokenizer(str(tokenizer))
    size, seconds, batch = 0, 0.0, []

    def encode() -> None:
        nonlocal seconds
        text = "</s>".join(batch).encode()
        begun = time.process_time()
        if call == "batch":
            engine.encode_batch(batch, parallel=False)
        else:
            engine.encode(text)
        seconds += time.process_time() - begun
        batch.clear()

    engine.encode_batch(["first"], parallel=False)  # what the first call imports is no part of it
    with corpus.open("rb") as lines:
        held = 0
        for line in lines:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1].encode())
            held += len(batch[-1])
            if held >= 1_000_000:
                encode()
                held = 0
    encode()
    print(json.dumps({"bytes": size, "seconds": seconds}))


if __name__ == "__main__":
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    {"datatrove": datatrove, "datasets": datasets, "bare": bare}[sys.argv[1]](*map(Path, sys.argv[2:]))
