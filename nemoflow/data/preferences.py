"""Kind `preferences`: pairs of answers to a prompt, one preferred, for DPO and reward models.

Rows come in the common layouts, by column names that `fields` may change:

    prompt: text or messages      chosen, rejected: text, a message, or messages
    prompt: text or messages      chosen, rejected: whole conversations that begin with the prompt (UltraFeedback)
                                  chosen, rejected: whole conversations that share their beginning (Tulu 3)
                                  chosen, rejected: "\n\nHuman: ...\n\nAssistant: ..." (Anthropic's HH)

and may have `system`, a text, and `tools`. Every row is written in the two layouts that trainers read:

    {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools": JSON text, if any,
     "context": [messages], "completions": [{"rank": 0, "completion": [messages]}, {"rank": 1, ...}]}

The first line is TRL's conversational format (DPOTrainer, RewardTrainer), the second NeMo-RL's PreferenceDataset, which
reads no tools. NeMo-RL's BinaryPreferenceDataset takes texts for answers only and does not read these files.
"""

import itertools
import json
import re
import time
from array import array
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from nemoflow.data.lines import lines, smallest, without_nulls
from nemoflow.data.rows import Broken
from nemoflow.data.sources import Source, open_source
from nemoflow.errors import NemoflowError

FILES = {"train": "train.jsonl", "valid": "validation.jsonl"}

EVERY = 10.0
"""Seconds between two lines of progress."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def pair(row: dict, fields: dict[str, str]) -> dict:
    """A row in one layout: {"prompt", "chosen", "rejected"}, each messages, and "tools", JSON text, if it has any.

    fields: prompt, chosen, rejected -> the row's own names for them.

    Raises ValueError with the reason when it is no pair of answers to one prompt.
    """
    chosen, rejected = (_messages(row, key, fields[key], "assistant") for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    if row.get(fields["prompt"]) is not None:
        prompt = _messages(row, "prompt", fields["prompt"], "user")
        if chosen[0] == rejected[0] and chosen[0]["role"] == "system" != prompt[0]["role"]:
            prompt = [chosen[0], *prompt]
    else:
        shared = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        prompt = [message for message, _ in shared]
    chosen, rejected = (_answer(key, prompt, found) for key, found in (("chosen", chosen), ("rejected", rejected)))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    system = row.get("system")
    if isinstance(system, str) and system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    tools = row.get("tools")
    if isinstance(tools, list):
        tools = json.dumps(tools, ensure_ascii=False)
    elif tools is not None and not isinstance(tools, str):
        raise ValueError("tools is neither a list nor its JSON")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})


def _messages(row: dict, key: str, name: str, role: str) -> list[dict]:
    """What stands in a column, as messages; a text is one of `role`."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name!r}")
    if isinstance(value, str):
        before, *turns = _TURN.split(value)
        if turns and not before.strip():
            value = [
                {"role": _ROLES[who], "content": said.strip()}
                for who, said in zip(turns[::2], turns[1::2], strict=True)
            ]
            if key == "prompt" and not value[-1]["content"]:
                value.pop()  # the "Assistant:" that the answer goes on from
        else:
            value = [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} is empty" if value == [] else f"{name!r} is neither text nor messages")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise ValueError(f"{name!r} has a message without a role")
    return [{**without_nulls(m), "content": "" if m.get("content") is None else m["content"]} for m in value]


def _answer(key: str, prompt: list[dict], found: list[dict]) -> list[dict]:
    """What follows the prompt."""
    begins = [{k: m[k] for k in ("role", "content")} for m in found[: len(prompt)]]
    if begins == [{k: m[k] for k in ("role", "content")} for m in prompt]:
        found = found[len(prompt) :]
    if not prompt or (found and found[0]["role"] != "assistant"):
        raise ValueError("chosen and rejected do not answer one prompt")
    if not any(map(_said, prompt)):
        raise ValueError("the prompt is empty")
    if not found or not _said(found[-1]):
        raise ValueError(f"{key} is empty")
    if found[-1]["role"] != "assistant":
        raise ValueError(f"{key} does not end in an answer")
    return found


def _said(message: dict) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _characters(messages: list[dict]) -> int:
    return sum(len(m["content"]) for m in messages if isinstance(m["content"], str))


class _Reader:
    """Reads the pairs of all sources; the same every time."""

    def __init__(self, sources: list[Source], fields: dict[str, str], progress: Callable[[str], None]):
        self._sources, self._progress = sources, progress
        self._fields = {key: fields.get(key, key) for key in ("prompt", "chosen", "rejected")}
        self._shown = time.monotonic()

    def pairs(self, what: str) -> Iterator[tuple[dict, int]]:
        """Each usable pair, and a 64-bit hash of its prompt. `what` is done with them."""
        self.broken = Broken()
        done = 0
        for source in self._sources:
            for place, _, row in lines(source, self.broken, {*self._fields.values(), "system", "tools"}):
                done += 1
                if (now := time.monotonic()) - self._shown >= EVERY:
                    self._shown = now
                    self._progress(f"{what} rows: {done:,}")
                try:
                    found = pair(row, self._fields)
                except ValueError as error:
                    self.broken.add(str(error), place)
                    continue
                yield found, xxhash.xxh3_64_intdigest(msgspec.json.encode(found["prompt"], order="sorted"))


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write train.jsonl and validation.jsonl from the rows of inputs["sources"], in order.

    `payload` is {"valid": share of the prompts as an exact fraction, "fields": {prompt, chosen, rejected: the columns'
    names, where not so}, "max_broken"}. Pairs with one prompt fall together: the prompts with the smallest hashes
    validate. Rows are streamed, twice; in memory are 8 bytes for each.

    Returns {"rows": {"train", "validation"}, "prompts": distinct ones, "characters": {prompt, chosen, rejected: {"all",
    "longest"}}, "chosen_longer": pairs whose chosen answer has more characters, "broken": rows left out by reason}.

    Raises NemoflowError naming file and row when more than `max_broken` of the rows are unusable, or none is left.
    """
    reader = _Reader([open_source(directory) for directory in inputs["sources"]], payload["fields"], progress)
    hashes = array("Q", (prompt for _, prompt in reader.pairs("checked")))
    reader.broken.check(len(hashes) + reader.broken.count, payload["max_broken"])
    if not hashes:
        raise NemoflowError(f"{inputs['sources'][0]}: there are no usable pairs")
    prompts = np.frombuffer(hashes, np.uint64)
    validated = set(smallest(prompts, payload["valid"]).tolist())
    if Fraction(payload["valid"]) and not validated:
        raise NemoflowError(
            f"{inputs['sources'][0]}: one prompt only, which cannot be both trained and validated with; give more, or "
            'set valid: "0"'
        )

    rows = {"train": 0, "validation": 0}
    characters = {key: {"all": 0, "longest": 0} for key in ("prompt", "chosen", "rejected")}
    longer = 0
    with (out / FILES["train"]).open("wb") as train, (out / FILES["valid"]).open("wb") as valid:
        for found, prompt in reader.pairs("written"):
            held = prompt in validated
            completions = [{"rank": i, "completion": found[key]} for i, key in enumerate(("chosen", "rejected"))]
            row = found | {"context": found["prompt"], "completions": completions}
            (valid if held else train).write(msgspec.json.encode(row) + b"\n")
            rows["validation" if held else "train"] += 1
            lengths = {key: _characters(found[key]) for key in characters}
            for key, length in lengths.items():
                characters[key]["all"] += length
                characters[key]["longest"] = max(characters[key]["longest"], length)
            longer += lengths["chosen"] > lengths["rejected"]
    progress(f"{rows['train']:,} pairs to train on, {rows['validation']:,} to validate")
    return {
        "rows": rows,
        "prompts": len(np.unique(prompts)),
        "characters": characters,
        "chosen_longer": longer,
        "broken": reader.broken.measures(),
    }
