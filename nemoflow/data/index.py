"""Kind `index`: the order in which a stage reads its blend, written down before any GPU is held.

    blend        relative link to the blend the order is of
    cache/       the engine's index caches; no path stands in them, so that they serve in any store
    index.json   {"samples": {"train", "valid"}}

The engine's own program makes them (its `index_command`), so that training finds what it would have built.
"""

import collections
import ctypes
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from nemoflow.engines import engine
from nemoflow.errors import NemoflowError
from nemoflow.launch import HERE, Launch, once
from nemoflow.progress import EVERY
from nemoflow.store import dump, read_json, write_atomically
from nemoflow.training import ending, environment, reason

MAX_PREFIXES = 100
"""Megatron-Core's blending compares all prefixes for every sample, on one processor."""

MAX_EPOCHS = "4"
"""Repeating text more often than this is worth little (Muennighoff et al., arXiv:2305.16264)."""

PROGRESS_PREFIX = "nemoflow: progress: "
"""How the engine's program marks a line for people."""

_KEPT_LINES = 1000
_PR_SET_PDEATHSIG = 1


def epochs(parts: list[dict], tokens: int) -> dict[str, Fraction]:
    """How often each source of a blend is read when `tokens` are read of it all, exactly.

    `parts` as in a blend's measures: [{"source": label, "share": exact fraction, "tokens": {"train": n}}].
    """
    return {part["source"]: tokens * Fraction(part["share"]) / part["tokens"]["train"] for part in parts}


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None], launch: dict) -> dict:
    """Write the order of payload["samples"] training samples, and of the engine's validation set.

    launch      "reads": samples that the stage reads, where it stops before its horizon; "max_epochs": how often a
                source may be read; "cluster": where the engine's program runs

    Returns {"samples": {"train", "valid"}, "epochs": {source: of payload["samples"], rounded to 1/1000}}.

    Raises NemoflowError, before anything is built, for a source read too often, a blend of too many files, and an
    unknown sequence length; later with what the engine's program says.
    """
    driver, blend = engine(payload["engine"]), inputs["data"].resolve()
    read = _checked_epochs(payload, driver.sequence_length(payload["overrides"]), blend, launch)
    _check_prefixes(blend)
    # From where the artifact will be, one level above the directory it is made in.
    (out / "blend").symlink_to(Path("..", "..", blend.parent.name, blend.name))
    request = out / "request.json"
    request_of_engine = {
        "function": payload.get("function"),
        "arguments": payload.get("arguments", {}),
        "hf_config": payload.get("hf_config"),
        "overrides": payload["overrides"],
        "tokenizer": str(inputs["tokenizer"].resolve()),
        "blend": str(blend),
        "samples": payload["samples"],
        "out": str(out.resolve()),
    }
    write_atomically(request, dump(request_of_engine))
    progress(f"indexing {payload['samples']:,} samples")
    _run(once(driver.index_command(request.resolve()), launch.get("cluster", HERE)), progress)
    request.unlink()
    samples = read_json(out / "index.json")["samples"]
    return {"samples": samples, "epochs": {source: round(float(n), 3) for source, n in read.items()}}


def _checked_epochs(payload: dict, length: int | None, blend: Path, launch: dict) -> dict[str, Fraction]:
    if length is None:
        raise NemoflowError(
            "the overrides do not say the sequence length, so nobody can tell how often a source would be read; "
            "write model.seq_length"
        )
    parts = read_json(blend / "sealed.json")["measures"]["parts"]
    limit = Fraction(launch.get("max_epochs", MAX_EPOCHS))
    tokens = launch.get("reads", payload["samples"]) * length
    read = epochs(parts, tokens)
    worst = max(parts, key=lambda part: read[part["source"]])
    if (often := read[worst["source"]]) > limit:
        own, share = worst["tokens"]["train"], Fraction(worst["share"])
        times, most = math.ceil(often * 1000) / 1000, math.floor(limit * own / tokens * 10000) / 10000
        raise NemoflowError(
            f"data.blend.{worst['source']}: would be read {times} times, and max_epochs is {limit}: the "
            f"stage reads {tokens:,} tokens, {float(share * tokens):,.0f} of them from this source (share {share}), "
            f"which has {own:,}; give it a share of at most {most}, raise data.max_epochs, "
            "or train on fewer tokens"
        )
    return epochs(parts, payload["samples"] * length)


def _check_prefixes(blend: Path) -> None:
    for split, prefixes in json.loads((blend / "weights.json").read_text(encoding="utf-8")).items():
        if len(prefixes) > MAX_PREFIXES:
            raise NemoflowError(
                f"{blend}/weights.json: {split} has {len(prefixes)} files, and at most {MAX_PREFIXES} are blended: "
                "Megatron compares all of them for every sample, and every process opens all of them; blend fewer or "
                "larger sources"
            )


def _run(started: Launch, progress: Callable[[str], None]) -> None:
    """Run the engine's program to its end; its output goes to this process's, which is the log."""
    print("$", started, flush=True)
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not write on beside the next attempt
        if os.getppid() != parent:
            os._exit(1)

    kept: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    shown = time.monotonic()
    with (
        subprocess.Popen(
            started.command,
            env=environment() | started.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
        ) as child,
        ending(child),
    ):
        for line in child.stdout:
            print(line, end="", flush=True)
            kept.append(line.rstrip("\n"))
            if line.startswith(PROGRESS_PREFIX) and time.monotonic() - shown >= EVERY:
                shown = time.monotonic()
                progress(line.removeprefix(PROGRESS_PREFIX).strip())
        code = child.wait()
    if code:
        raise NemoflowError(reason(list(kept), "indexing") or f"indexing failed with exit code {code}")
