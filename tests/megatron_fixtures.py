"""A tiny model of the nano3 architecture, a tokenizer and data for it, and runs of the trainer on them."""

import hashlib
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemoflow.engines.megatron_bridge import index_overrides

HERE = Path(__file__).parent
RECIPES = "megatron.bridge.recipes.nemotronh.nemotron_3_nano"

PRECISION = {
    "mixed_precision": None,
    "model.bf16": False,
    "model.params_dtype": "float32",
    "model.pipeline_dtype": "float32",
    "optimizer.bf16": False,
    "optimizer.params_dtype": "float32",
}
MODEL = {
    "model.hybrid_layer_pattern": "ME*M",
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 1,
    "model.kv_channels": 16,
    "model.mamba_num_heads": 4,
    "model.mamba_head_dim": 16,
    "model.mamba_state_dim": 8,
    "model.mamba_num_groups": 2,
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 32,
    "model.moe_shared_expert_intermediate_size": 32,
    "model.moe_router_topk": 2,
    "model.seq_length": 64,
}
PRETRAIN = {
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "optimizer.lr": 0.01,
    "optimizer.min_lr": 0.001,
    "scheduler.lr_decay_style": "WSD",
    "scheduler.lr_wsd_decay_style": "minus_sqrt",
    "scheduler.lr_decay_iters": 40,
    "scheduler.lr_wsd_decay_iters": 20,
    "scheduler.lr_warmup_iters": 3,
    "validation.eval_interval": 5,
    "validation.eval_iters": 2,
}
SFT = {
    "train.global_batch_size": 2,
    "optimizer.lr": 0.003,
    "scheduler.lr_warmup_iters": 1,
    "validation.eval_interval": 50,
    "validation.eval_iters": 2,
}


class Server:
    """A process with Megatron imported, that runs functions in forks."""

    def __init__(self, directory: Path):
        self.directory, self.count = directory, 0
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
            "OMP_NUM_THREADS": "1",
            "NEMOFLOW_CPU": "1",
            "NEMOFLOW_CPU_THREADS": "1",  # forks of a process that has used a thread pool would wait for its threads
        }
        self.log = directory / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "megatron_server.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def start(self, target: str, argument) -> tuple[int, Path, Path]:
        """Begin a job: the child's process id, its log, its result file."""
        self.count += 1
        log, result = self.directory / f"{self.count}.log", self.directory / f"{self.count}.json"
        job = {"target": target, "argument": argument, "log": str(log), "result": str(result)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = self.process.stdout.readline()
        assert pid, self.log.read_text()[-3000:]
        return int(pid), log, result

    def end(self) -> int:
        """Wait for the child: its exit code, negative after a signal."""
        return int(self.process.stdout.readline())

    def call(self, target: str, argument):
        """What `target` returns. The test fails with the child's log when it raises."""
        _, log, result = self.start(target, argument)
        code = self.end()
        assert code == 0, log.read_text()[-3000:]
        return json.loads(result.read_text())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


class Run:
    """A trajectory's directory and its request."""

    def __init__(self, server: Server, directory: Path, **request):
        self.server, self.directory = server, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.request = {
            "init": None,
            "start": 0,
            "skip": 0,
            "stream": None,
            "schedule_batch": None,
            "wanted": [],
            "save_interval": 1000,
            "checkpoints": str(directory / "checkpoints"),
            "scratch": str(directory / "scratch"),
            "metrics": str(directory / "metrics.jsonl"),
            "config": str(directory / "config"),
            **request,
        }

    def begin(self, **changes) -> tuple[int, Path]:
        """Start the trainer: its process id and log."""
        path = self.directory / "request.json"
        path.write_text(json.dumps(self.request | changes), encoding="utf-8")
        pid, log, _ = self.server.start("nemoflow.engines.megatron_bridge.train:main", [str(path)])
        return pid, log

    def train(self, **changes) -> "Run":
        """Run the trainer to its end, which must be a good one."""
        _, log = self.begin(**changes)
        code = self.server.end()
        assert code == 0, log.read_text()[-3000:]
        return self

    def fails(self, **changes) -> str:
        """The one line the trainer says when it refuses."""
        _, log = self.begin(**changes)
        code, text = self.server.end(), log.read_text()
        said = [line for line in text.splitlines() if line.startswith("nemoflow: error: ")]
        assert code == 1, text[-3000:]
        assert len(said) == 1, text[-3000:]
        return said[0]

    def kill_when(self, condition, **changes) -> None:
        """Start the trainer and kill its process group, with SIGKILL, as soon as `condition()` holds."""
        pid, log = self.begin(**changes)
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.001)
        os.killpg(pid, signal.SIGKILL)
        assert self.server.end() == -signal.SIGKILL, log.read_text()[-3000:]

    @property
    def checkpoints(self) -> Path:
        return Path(self.request["checkpoints"])

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    def lines(self) -> list[dict]:
        path = Path(self.request["metrics"])
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def digits(self) -> dict[int, tuple]:
        """Iteration -> loss, learning rate, gradient norm and tokens, as they were written."""
        return {e["iteration"]: (e["loss"], e["lr"], e["grad_norm"], e["tokens"]) for e in self.lines() if "loss" in e}

    def validation(self) -> dict[int, float]:
        return {e["iteration"]: e["valid_loss"] for e in self.lines() if "valid_loss" in e}


def make_blend(data: Path, blend=(("a", "1/2"), ("b", "1/2"))) -> Path:
    """A blend's directory in data/blend, with what an index and training read of it."""
    directory = data / "blend" / "-".join(f"{name}{share.replace('/', '.')}" for name, share in blend)
    weights = {s: [[f"../../merge/{name}/{s}-00000", share] for name, share in blend] for s in ("train", "valid")}
    parts = [
        {"source": name, "share": share, "tokens": {s: tokens(data / "merge" / name / f"{s}-00000") for s in weights}}
        for name, share in blend
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "weights.json").write_text(json.dumps(weights))
    (directory / "sealed.json").write_text(json.dumps({"measures": {"parts": parts}}))
    return directory


def tokens(prefix: Path) -> int:
    """Tokens of 2 bytes in a .bin file."""
    return prefix.with_suffix(".bin").stat().st_size // 2


def make_index(server: Server, data: Path, directory: Path, blend: Path, samples: int, overrides: dict) -> dict:
    """Index caches in `directory`: a pretraining request's data."""
    request = {
        "function": f"{RECIPES}.nemotron_3_nano_pretrain_config",
        "overrides": index_overrides(overrides),
        "tokenizer": str(data / "tokenizer"),
        "blend": str(blend),
        "samples": samples,
        "out": str(directory),
    }
    directory.mkdir(parents=True)
    path = directory / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    assert server.call("nemoflow.engines.megatron_bridge.index:main", [str(path)]) == 0
    path.unlink()
    return {"blend": str(blend), "cache": str(directory / "cache"), "samples": samples}


def pretrain(server: Server, data: Path, directory: Path, /, blend=(("a", "1/2"), ("b", "1/2")), **request) -> Run:
    """A trajectory that reads the index of its blend, made on first use; many trajectories share one."""
    defaults = {
        "kind": "pretrain",
        "function": f"{RECIPES}.nemotron_3_nano_pretrain_config",
        "overrides": MODEL | PRECISION | PRETRAIN,
        "tokenizer": str(data / "tokenizer"),
        "start": 0,
        "horizon": 24,
        "stop": 24,
    }
    request = defaults | request
    if "data" not in request:
        request["data"] = index_of(server, data, blend, request)
    return Run(server, directory, **request)


def index_of(server: Server, data: Path, blend, request: dict) -> dict:
    """The index of a pretraining request's stage, made unless another has made it."""
    overrides = request["overrides"]
    samples = (request["horizon"] - request["start"]) * overrides["train.global_batch_size"]
    identity = json.dumps([blend, samples, index_overrides(overrides)], sort_keys=True).encode()
    index = data / "index" / hashlib.sha256(identity).hexdigest()[:12]
    place = make_blend(data, blend)
    if (index / "index.json").exists():
        return {"blend": str(place), "cache": str(index / "cache"), "samples": samples}
    return make_index(server, data, index, place, samples, overrides)


def sft(server: Server, data: Path, directory: Path, checkpoint: Path, **request) -> Run:
    defaults = {
        "kind": "sft",
        "function": f"{RECIPES}.nemotron_3_nano_sft_config",
        "overrides": PRECISION | SFT,
        "tokenizer": str(data / "tokenizer"),
        "data": {
            "train": str(data / "training.idx.parquet"),
            "valid": str(data / "validation.idx.parquet"),
            "pack_size": 64,
            "pad_multiple": 1,
        },
        "init": {"checkpoint": str(checkpoint), "at": int(checkpoint.name[5:]), "carry": "weights"},
        "horizon": 6,
        "stop": 6,
    }
    return Run(server, directory, **defaults | request)


def make_data(directory: Path) -> Path:
    """A tokenizer of 300 tokens, two merges of the interpreter's own documentation, packed chats."""
    import pyarrow
    import pyarrow.parquet
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:40]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(topics, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(directory / "tokenizer")

    for name, documents in (("a", topics[::2]), ("b", topics[1::2])):
        for split, part in (("train", documents[2:]), ("valid", documents[:2])):
            prefix = directory / "merge" / name / f"{split}-00000"
            prefix.parent.mkdir(parents=True, exist_ok=True)
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(300))
            for text in part:
                ids = [*tokenizer(text[:5000])["input_ids"], tokenizer.eos_token_id]
                builder.add_document(torch.tensor(ids), [len(ids)])
            builder.finalize(f"{prefix}.idx")

    rows: dict[str, list] = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
    for n in range(14):
        first, second = (tokenizer(text)["input_ids"][: 20 + n] for text in topics[2 * n : 2 * n + 2])
        rows["input_ids"].append(first + second)
        rows["loss_mask"].append([int(i > 5) for part in (first, second) for i in range(len(part))])
        rows["seq_start_id"].append([0, len(first)])
    types = {"input_ids": pyarrow.int32(), "loss_mask": pyarrow.int8(), "seq_start_id": pyarrow.int32()}
    for split, part in (("training", slice(4, None)), ("validation", slice(0, 4))):
        columns = {k: pyarrow.array(v[part], pyarrow.list_(types[k])) for k, v in rows.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"{split}.idx.parquet")
    return directory


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def straight(server, data, tmp_path_factory) -> Run:
    """Twenty-four iterations without an interruption; 6 and 10 kept besides the end."""
    return pretrain(server, data, tmp_path_factory.mktemp("straight"), wanted=[6, 10]).train()
