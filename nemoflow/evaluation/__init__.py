"""Kind `eval`: a Hugging Face export asked the questions of one task, by EleutherAI's lm-evaluation-harness.

    results.json     what the harness found: metrics with their errors, and the task's settings as they were resolved
    samples.jsonl    a line per question in the harness's own form: `doc` the row, `arguments` what was asked, `resps`
                     what the model said, `filtered_resps` what of it counts, `target` and the metrics

The questions come from source artifacts, so a job reaches no network. Everything the harness draws by lot is seeded.
The model is asked by a process of its own, python -m nemoflow.evaluation JOB OUT, where the harness and torch are.
"""

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from nemoflow.conversion import converting
from nemoflow.errors import NemoflowError
from nemoflow.launch import HERE

HARNESS = "0.4.13"
"""Version of lm-eval. Its tasks, prompts and metrics define the result, so it is part of every identity."""

BATCH = 8
"""Questions asked at once, unless the recipe says otherwise."""

ARGUMENTS = {
    "hf": ("device", "max_cpu_memory", "max_memory_per_gpu", "offload_folder", "parallelize"),
    "vllm": (
        "cpu_offload_gb",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "enable_expert_parallel",
        "enforce_eager",
        "gpu_memory_utilization",
        "max_num_batched_tokens",
        "max_num_seqs",
        "tensor_parallel_size",
    ),
}
"""Backend -> those of its arguments that say where and how fast it computes, and not what."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait sleep, or a busy machine is several times slower
    "OMP_WAIT_POLICY": "PASSIVE",
    # Errors of metrics other than means are drawn in this process and not in one for each processor
    "DISABLE_MULTIPROC": "1",
}


def check_arguments(backend: str, arguments: dict) -> None:
    """Raise NemoflowError for an argument of a backend that is unknown, or that would define the result."""
    for key in arguments:
        if key not in ARGUMENTS[backend]:
            raise NemoflowError(
                f"arguments.{key}: nothing that says where backend {backend} computes, and only that can be set: "
                f"{', '.join(ARGUMENTS[backend])}"
            )


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], launch: dict) -> dict:
    """`evaluate` in a process of its own, in the cluster's container if it has one."""
    model = inputs["model"]
    job = {"payload": payload, "model": str(model), "sources": [*map(str, inputs["sources"])], "launch": launch}
    progress(f"asks the questions of {payload['task']['name']}")
    converting("nemoflow.evaluation", model, json.dumps(job), out, cluster=launch.get("cluster", HERE))
    measures = out / "measures.json"
    found = json.loads(measures.read_text(encoding="utf-8"))
    measures.unlink()
    return found


def evaluate(payload: dict, inputs: dict, out: Path, launch: dict) -> dict:
    """Write results.json and samples.jsonl.

    payload: {"task": {"name", "text": own task file, or None for one of the harness's}, "data": {split: source},
    "fewshot", "limit", "chat", "harness": version}. inputs: {"model": an export's directory, "sources": directories in
    the order of the sorted splits}. launch: "backend", "batch_size" and "arguments", which change nothing but speed.

    Returns {"metric": the task's first one, "metrics": {name: {"value", "stderr" or None}}, "samples": questions}.

    Raises NemoflowError before the model is loaded for a missing backend, data that does not suit the task, a chat
    without template; later for a model that cannot be loaded, or a metric that is no number.
    """
    _check(payload, inputs["model"], launch)
    os.environ.update(_ENVIRONMENT)  # before the libraries are imported, which read it then
    from nemoflow.evaluation import harness

    splits = dict(zip(sorted(payload["data"]), inputs["sources"], strict=True))
    task = harness.load_task(payload, splits)
    print(f"asks {harness.check_questions(task, payload['limit']):,} questions", flush=True)
    model = harness.load_model(inputs["model"], launch)
    found = harness.evaluate(task, model, payload)
    (out / "results.json").write_text(_dump(found["results"]), encoding="utf-8")
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(_dump(sample, indent=None) for sample in found["samples"])
    return found["measures"]


def _dump(value: dict, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, default=_text) + "\n"


def _text(value: Any) -> str:
    """What JSON has not, the same in every process: a function by its name, not by where it lies in memory."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


def _check(payload: dict, model: Path, launch: dict) -> None:
    """What can be known without importing anything. Raises NemoflowError."""
    try:
        version = metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        raise NemoflowError("lm-eval is not installed here; see envs/README.md") from None
    if version != payload["harness"]:
        raise NemoflowError(
            f"this evaluation is defined by lm-eval {payload['harness']}, here is {version}; install that one "
            "(make install), or plan it anew"
        )
    if launch.get("backend") == "vllm":
        try:
            metadata.version("vllm")
        except metadata.PackageNotFoundError:
            raise NemoflowError("backend: vllm is not installed here; install it, or write backend: hf") from None
    if payload["chat"] and not (model / "chat_template.jinja").exists():
        config = model / "tokenizer_config.json"
        if not (config.exists() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))):
            raise NemoflowError(f"chat: {model} has no chat template; write chat: false")
