"""Make a stage's index caches: python -m nemoflow.engines.megatron_bridge.index REQUEST.json

Through the code that training opens them with, without a model, on a machine without a GPU. The request (every path
absolute):
    function    dotted name of a recipe function of Megatron-Bridge
    overrides   {"section.key": value}: at least those that the order depends on
    tokenizer   directory of a Hugging Face tokenizer
    blend       directory with weights.json: {split: [[prefix relative to this directory, exact weight], ...]}
    samples     how many training samples the stage reads
    out         directory to write to: cache/, and index.json with {"samples": {"train", "valid"}}

Lines on stdout that start with "nemoflow: progress: " are for people. Foreseeable failures are one line on stderr,
starting with "nemoflow: error: ", and exit code 1.
"""

import gc
import json
import sys
from fractions import Fraction
from pathlib import Path

from nemoflow import cpu
from nemoflow.engines.megatron_bridge.train import environment, program
from nemoflow.errors import NemoflowError

VALID_EPOCHS = 4
"""Reading the same text again says nothing new; a small source with a large share is read again a few times all the
same, so that all sources can be compared."""


def run(request: dict) -> None:
    """Write the caches. Raises NemoflowError for settings that cannot be, or a blend drawn from too unevenly."""
    environment()
    gc.disable()  # as in train.py
    if cpu.needed():
        cpu.enable()
    from megatron.bridge.data.utils import get_dataset_provider
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    if cpu.needed():
        cpu.patch()
    from nemoflow.engines.megatron_bridge import config, data

    gc.enable()
    out, blend = Path(request["out"]), Path(request["blend"])
    cache = out / "cache"
    placed = {"blend": str(blend), "cache": str(cache)}
    settings = config.prepare({**request, "kind": "pretrain", "data": placed, "init": None})
    dataset = settings.dataset
    dataset.fast_cache_load = dataset.defer_npy_index_mmap = False  # they take caches for granted
    dataset.finalize()
    dataset.tokenizer = build_tokenizer(settings.tokenizer)
    samples = {"train": request["samples"], "valid": config.valid_samples(settings)}
    check_validation(samples["valid"], settings.model.seq_length, blend)

    blends = [b for b in dataset.blend_per_split if b]
    total = sum(len(prefixes) + (len(prefixes) > 1) for prefixes, _ in blends)
    met = 0

    def say(_) -> None:
        nonlocal met
        met += 1
        print(f"nemoflow: progress: index {met} of {total}", flush=True)

    make = data.provider(data.indexed(get_dataset_provider(dataset), blend, say), 0, samples["train"], samples["valid"])
    try:
        make(None, dataset)
    except IndexError as error:
        if "mid_level_dataset_surplus" not in str(error):
            raise
        raise NemoflowError(
            f"{blend}: drawing by weight takes more samples from a source than were set aside for it; raise "
            f"dataset.mid_level_dataset_surplus, now {dataset.mid_level_dataset_surplus}, in the overrides"
        ) from None
    text = json.dumps({"samples": samples}, indent=1) + "\n"
    (out / "index.json").write_text(text, encoding="utf-8")


def check_validation(samples: int, length: int, blend: Path) -> None:
    """Raise NemoflowError when one evaluation would read a source's held-out text more than VALID_EPOCHS times.

    samples, length: of the validation set, and tokens of a sample.
    """
    for part in json.loads((blend / "sealed.json").read_text(encoding="utf-8"))["measures"]["parts"]:
        held, wanted = part["tokens"]["valid"], samples * length * Fraction(part["share"])
        if wanted > VALID_EPOCHS * held:
            most = int(VALID_EPOCHS * held / Fraction(part["share"]) / length)
            raise NemoflowError(
                f"validation.eval_iters: one evaluation reads {samples:,} samples of {length:,} tokens, and so the "
                f"{held:,} tokens held out of {part['source']} {float(wanted / held):.1f} times: take at most {most:,} "
                "samples (validation.eval_iters x validation.eval_global_batch_size, which is the training batch where "
                "it is not set), or raise held_out.valid"
            )


def main(arguments: list[str]) -> int:
    return program(run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
