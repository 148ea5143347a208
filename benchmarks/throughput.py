"""Tokens per second of our trainer beside Megatron-Bridge's own entry point: python -m benchmarks.throughput

The same configuration, data and seeds, the one run by nemoflow.engines.megatron_bridge.train, the other by
megatron.bridge.training.pretrain.pretrain without any of ours around it: no metrics, no watch, no window over the
data, no checkpoints. Both log the time of an interval of iterations themselves, by the same code; the intervals after
the first count. They take turns, so that whatever else the machine does falls on both. Prints each run, and the ratio
of the medians, ours over theirs, over 1 where ours is faster; the target is 0.99.

On a machine without a GPU a toy model behind the device shim, elsewhere one of nano3's architecture on --gpus GPUs;
what --overrides names (a JSON file) comes on top.
"""

import argparse
import json
import pydoc_data.topics
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nemoflow import cpu, launch, training
from nemoflow.errors import NemoflowError

FUNCTION = "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_pretrain_config"
PREFIX = "topics/train-00000"
INTERVAL = 10
"""Iterations of a logged interval."""

TOY = {
    "model.hybrid_layer_pattern": "MEM*EME",
    "model.num_layers": 7,
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.kv_channels": 32,
    "model.mamba_num_heads": 8,
    "model.mamba_head_dim": 32,
    "model.mamba_state_dim": 16,
    "model.mamba_num_groups": 2,
    "model.num_moe_experts": 8,
    "model.moe_ffn_hidden_size": 64,
    "model.moe_shared_expert_intermediate_size": 128,
    "model.moe_router_topk": 2,
    "model.seq_length": 256,
    "mixed_precision": None,
    "model.bf16": False,
    "model.params_dtype": "float32",
    "model.pipeline_dtype": "float32",
    "optimizer.bf16": False,
    "optimizer.params_dtype": "float32",
    "train.global_batch_size": 16,
    "train.micro_batch_size": 16,
}
WIDE = {
    # nano3's widths, eight of its layers and a quarter of its experts: 2.9 billion parameters
    "model.hybrid_layer_pattern": "MEMEM*EM",
    "model.num_layers": 8,
    "model.num_moe_experts": 32,
    "model.seq_length": 8192,
    "model.expert_model_parallel_size": 1,
    "model.moe_token_dispatcher_type": "alltoall",
    "model.moe_flex_dispatcher_backend": None,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 1,
}


def make_data(directory: Path) -> None:
    """A tokenizer of 300 tokens and the interpreter's documentation, as a blend of one prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(topics[:20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(directory / "tokenizer")
    prefix = directory / PREFIX
    prefix.parent.mkdir()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(300))
    for text in topics:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    (directory / "weights.json").write_text(json.dumps({split: [[PREFIX, "1"]] for split in ("train", "valid")}))
    tokens = prefix.with_suffix(".bin").stat().st_size // 2
    parts = [{"source": "topics", "share": "1", "tokens": {"train": tokens, "valid": 0}}]
    (directory / "sealed.json").write_text(json.dumps({"measures": {"parts": parts}}))


def request_of(directory: Path, data: Path, overrides: dict, iterations: int, gpus: int) -> dict:
    """The request of both runs; paths below `directory`."""
    samples = iterations * overrides["train.global_batch_size"]
    return {
        "kind": "pretrain",
        "function": FUNCTION,
        "arguments": {},
        "hf_config": None,
        "peft": None,
        "overrides": overrides,
        "tokenizer": str(data / "tokenizer"),
        "data": {"blend": str(data), "cache": str(data / "index/cache"), "samples": samples},
        "init": None,
        "start": 0,
        "stream": None,
        "skip": 0,
        "horizon": iterations,
        "stop": iterations,
        "wanted": [],
        "save_interval": iterations,
        "checkpoints": str(directory / "checkpoints"),
        "scratch": str(directory / "scratch"),
        "metrics": str(directory / "metrics.jsonl"),
        "config": str(directory / "config"),
        "resources": {"nodes": 1, "gpus_per_node": gpus, "gpu": None},
        "keep": {"last": 2, "every": None},
        "guard": {"spike": 3.0, "patience": 20},
        "stop_file": str(directory / "stop"),
        "deadline": None,
    }


def theirs(request: dict) -> None:
    """Megatron-Bridge's own entry point with the configuration of `request`; the program of the other side."""
    from nemoflow.engines.megatron_bridge import train

    train.environment()
    if cpu.needed():
        cpu.enable()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    if cpu.needed():
        cpu.patch()
    from nemoflow.engines.megatron_bridge import config

    settings = config.build(request, None)
    settings.dataset.blend_per_split = [([str(Path(request["data"]["blend"]) / PREFIX)], [1.0]), None, None]
    settings.dataset.path_to_cache = str(Path(request["scratch"]) / "cache")
    settings.checkpoint.save = None
    settings.train.exit_interval = None
    pretrain(settings, forward_step)


def output_of(command: list[str]) -> str:
    """What a program writes. Raises NemoflowError, with the end of it, when it fails."""
    done = subprocess.run(
        command,
        env=training.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NemoflowError(f"{command} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def milliseconds(command: list[str], request: dict) -> list[float]:
    """Milliseconds per iteration of each logged interval but the first, of a run of `command`."""
    output = output_of(launch.launch(command, request["resources"]).command)
    return [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, or processes on a CPU")
    parser.add_argument("--overrides", type=Path, help="a JSON file of overrides")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.iterations < 2 * INTERVAL:
        parser.error(f"--iterations: {args.iterations}: the first {INTERVAL} do not count; take {2 * INTERVAL} or more")
    if args.theirs:
        theirs(json.loads(args.theirs.read_text(encoding="utf-8")))
        return
    overrides = (TOY if cpu.needed() else WIDE) | {
        "scheduler.lr_decay_iters": args.iterations,
        "scheduler.lr_warmup_iters": 1,
        "validation.eval_iters": 0,
        "logger.log_interval": INTERVAL,
    }
    if args.overrides:
        overrides |= json.loads(args.overrides.read_text(encoding="utf-8"))
    from nemoflow.engines import megatron_bridge

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        make_data(data)
        index = {
            "function": FUNCTION,
            "arguments": {},
            "hf_config": None,
            "overrides": megatron_bridge.index_overrides(overrides),
            "tokenizer": str(data / "tokenizer"),
            "blend": str(data),
            "samples": args.iterations * overrides["train.global_batch_size"],
            "out": str(data / "index"),
        }
        (data / "index").mkdir()
        (data / "index.json").write_text(json.dumps(index))
        output_of(megatron_bridge.index_command(data / "index.json"))
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(args.rounds):
            for side in times:
                directory = Path(temporary) / f"{side}-{number}"
                directory.mkdir()
                request = request_of(directory, data, overrides, args.iterations, args.gpus)
                path = directory / "request.json"
                path.write_text(json.dumps(request))
                own = [sys.executable, "-m", "benchmarks.throughput", "--theirs", str(path)]
                found = milliseconds(megatron_bridge.command(path) if side == "ours" else own, request)
                times[side] += found
                print(f"{side}: {', '.join(f'{ms:.0f}' for ms in found)} ms per iteration", flush=True)
    tokens = overrides["train.global_batch_size"] * overrides["model.seq_length"]
    for side, found in times.items():
        print(f"{side}: {1000 * tokens / statistics.median(found):,.0f} tokens/s")
    print(f"ratio: {statistics.median(times['theirs']) / statistics.median(times['ours']):.3f}")


if __name__ == "__main__":
    main()
