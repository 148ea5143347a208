"""Train a stage with Megatron-Bridge, pretraining or SFT: python -m nemoflow.engines.megatron_bridge.train REQUEST.json

On GPUs started by torchrun or srun, one process per GPU; on a machine without any, one process with the device shim.

The request (every path absolute):
    kind            "pretrain" or "sft"
    function        dotted name of a recipe function of Megatron-Bridge, and its keyword `arguments`
    hf_config       null, or the content of a Hugging Face config.json: the model of functions that ask the hub for one
    overrides       {"section.key": value}
    tokenizer       directory of a Hugging Face tokenizer
    data            pretrain: {"blend": directory, "cache": directory of its index caches (index.py), "samples": how
                    many training samples they have}; both are only read
                    sft: {"train": file, "valid": file or null, "pack_size": tokens, "pad_multiple": what the lengths
                    of sequences were padded to}, of packed parquet
    init            null, or {"checkpoint": .../iter_0000060, "at": 60,
                    "carry": "all", "weights+optimizer" or "weights"}
    start           iteration the stage begins after: init's `at` under carry all, else 0
    skip            iterations after `start` that are counted, and not trained
    stream          samples that had been consumed where the data's order began; null: where the stage begins
    schedule_batch  global batch size by which the schedule's iterations count; null: the stage's own
    horizon, stop   iteration at which schedule and data end; iteration after which this run leaves, with a checkpoint
    wanted          iterations to keep a checkpoint of, besides every `save_interval`-th
    wanted_directory  optional: a directory whose file names are more of them, looked at after every iteration
    checkpoints     directory to save in, and to go on from
    scratch         sft: directory for what upstream might write
    metrics         file to append {"iteration", "loss", "lr", "grad_norm", "seconds", "tokens", "tokens_per_second",
                    "tflops_per_gpu", on GPUs "memory_gb"}, {"iteration", "valid_loss", in pretraining "valid_losses":
                    {source: loss}} and {"iteration", "save_seconds"} to, a line each; `tokens` counts those of this
                    stage, in SFT the padding included. Its directory gets TensorBoard's, and trackers', files
    config          file for the resolved configuration, written at the first start and compared with later
    resolved        optional: file for this run's
    keep            optional: {"last", "every"}: the newest checkpoints to keep, never fewer than two, and those of
                    which iterations' multiples, besides the wanted ones; without it all are kept
    guard           optional: {"spike", "patience"}: end when the loss has been above `spike` (null: never) times its
                    running median for `patience` iterations; for a loss that is no number it ends always
    deadline        optional: when the job is ended from outside, in seconds since the epoch
    stop_file       optional: a path; when something is there, save and leave

A run that leaves before `stop`, to be gone on with, says why in one line on stdout, starting with "nemoflow:
unfinished: ", and exits with 0.

Foreseeable failures are one line on stderr, starting with "nemoflow: error: ", and exit code 1.
"""

import errno
import gc
import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from nemoflow import cpu
from nemoflow.engines.megatron_bridge import checkpoints
from nemoflow.errors import NemoflowError

CHECKS = ("runtime_config_update", "init_num_microbatches_calculator", "_check_and_set")
"""Functions in which Megatron checks a configuration, the last a saved schedule against today's: what they raise is a
mistake in the recipe."""

FULL_BYTES = 2**26
"""A disk with less space than this, under a checkpoint that could not be written, is full."""


def main(arguments: list[str]) -> int:
    return program(run, arguments)


def program(run: Callable[[dict], None], arguments: list[str]) -> int:
    """The exit code of a program that does what the request file, its only argument, says."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        run(request)
    except NemoflowError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's exception of checkpoints is no Exception
        known = explain(error, request)
        if known is None:
            raise
        return _fail(known)
    return 0


def _fail(message: str) -> int:
    sys.stdout.flush()
    print(f"nemoflow: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 1


def explain(error: BaseException, request: dict) -> str | None:
    """What a foreseeable exception of the libraries means, in one sentence; None for any other."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    for each in seen:
        if isinstance(each, NemoflowError):
            return str(each)
        full = getattr(each, "errno", None) == errno.ENOSPC or "No space left on device" in str(each)
        if full or _filled(each, request):
            return f"no space left on the disk of {_written(request)}; free some and run again"
        if getattr(each, "errno", None) == errno.EDQUOT:
            return f"disk quota exceeded at {_written(request)}; free some and run again"
        if isinstance(each, AssertionError | ValueError | RuntimeError) and _passed(each, CHECKS):
            return f"overrides: Megatron-Bridge refuses this configuration: {each or type(each).__name__}"
    return None


def _written(request: dict) -> str:
    return request.get("checkpoints") or request["out"]


def _filled(error: BaseException, request: dict) -> bool:
    """Whether Megatron's writer failed, which only tells the class of its error, and left next to no space."""
    return "Worker failure: " in str(error) and shutil.disk_usage(_written(request)).free < FULL_BYTES


def _passed(error: BaseException, functions: tuple[str, ...]) -> bool:
    """Whether `error` was raised in, or below, a function with one of these names."""
    return any(frame.name in functions for frame in traceback.extract_tb(error.__traceback__))


def run(request: dict) -> None:
    """Train until `stop`, from the newest complete checkpoint of the stage, else from its init, else from nothing."""
    started = time.time()
    own, first = Path(request["checkpoints"]), os.environ.get("RANK", "0") == "0"
    if first:
        own.mkdir(parents=True, exist_ok=True)
        for left in checkpoints.remove_incomplete(own):
            print(f"removed {left}: its save was interrupted", flush=True)
    complete = checkpoints.states(own)
    init, reached = request["init"], max(complete, default=request["start"])
    if complete and reached >= request["stop"]:
        return
    if complete:
        load = complete[reached]
    else:
        load = Path(init["checkpoint"]) if init else None
    if load:
        checkpoints.check(load)
    if request.get("peft") and init:
        checkpoints.check(Path(init["checkpoint"]))  # the base of adapters is read at every start
    if first:
        forget(Path(request["metrics"]), after=reached if complete else None)

    environment()
    gc.disable()  # the imports make a million objects and no garbage: looking for some costs a sixth of their time
    if cpu.needed():
        cpu.enable()
    # Everything from here on imports Megatron, which takes seconds and must follow the shim.
    import megatron.bridge.training.pretrain as trainer
    import torch
    from megatron.bridge.training.gpt_step import forward_step

    if cpu.needed():
        cpu.patch()
    from nemoflow.engines.megatron_bridge import carry, config, data, loop, meters, peft, tracking, watch

    gc.enable()
    gc.freeze()

    peft.patch(request)
    settings = config.build(request, load)
    if first:
        config.record(settings, Path(request["config"]), Path(r) if (r := request.get("resolved")) else None)

    consumed, batch = 0, settings.train.global_batch_size
    if init and init["carry"] != "weights":
        state = torch.load(Path(init["checkpoint"]) / "train_state.pt", weights_only=True)
        step = int(state["step"])
        if step != init["at"]:
            raise NemoflowError(f"{init['checkpoint']}: the checkpoint says iteration {step}, not {init['at']}")
        consumed = int(state["consumed_train_samples"]) if init["carry"] == "all" else 0
    stream = consumed if request["stream"] is None else request["stream"]
    end = consumed + (request["horizon"] - request["start"]) * batch
    sources = meters.Sources(meters.sources(Path(request["data"]["blend"])) if request["kind"] == "pretrain" else {})
    make, valid = trainer.get_dataset_provider(settings.dataset), config.valid_samples(settings)
    length = end - stream
    if request["kind"] == "pretrain":
        length = request["data"]["samples"]
        fits(request, stream + length - end, batch)
        make = data.indexed(make, Path(request["data"]["blend"]), data.must_be_built)
    make = data.provider(make, stream, length, valid, sources.tagged)
    trainer.get_dataset_provider = lambda _: make
    hooks = loop.Hooks(request, reached, consumed + request["skip"] * batch, valid)
    carried = carry.Carry(request, load)
    carried.patch()
    watching = watch.Watch(request, reached, started)
    tracking.guard(reached)
    trainer.train = loop.train_between(trainer.train, hooks, watching)
    trainer.pretrain(settings, sources.watching(forward_step), callbacks=[carried, watching, sources, hooks])


def fits(request: dict, spare: int, batch: int) -> None:
    """Raise NemoflowError unless the index ends where the stage's horizon does, less what fills no `batch`, in samples.

    spare: samples that the index has after the horizon.
    """
    if 0 <= spare < batch:
        return
    samples = request["data"]["samples"]
    raise NemoflowError(
        f"the index has {samples} samples, and until iteration {request['horizon']} the stage reads {samples - spare} "
        f"of them in batches of {batch}: the frozen stage and its checkpoint do not belong together"
    )


def environment() -> None:
    """What must be set before the libraries are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # data, tokenizer and model are files; nothing is fetched here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a shared machine many times slower
    if "MASTER_PORT" not in os.environ:  # not under torchrun: two runs on a machine must not share the default port
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def forget(metrics: Path, after: int | None) -> None:
    """Drop what was measured after iteration `after` (None: everything), and a line cut off by a kill."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if after is not None and json.loads(line)["iteration"] <= after]
    if kept != lines:
        temporary = metrics.with_name(f".{metrics.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.rename(metrics)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
