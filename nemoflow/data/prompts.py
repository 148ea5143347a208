"""Kind `prompts`: rows for RL in NeMo-Gym's layout, checked, completed and split, otherwise kept whole.

A row has `responses_create_params.input` (the prompt, as messages), `agent_ref.name` (the agent that answers, and with
it the environment that judges; NeMo-RL needs it) and at its top level the fields that environment's verifier reads.
Lines of JSON are passed on byte for byte; what becomes of Parquet rows stands in lines.py, of placeholders in
placeholders.py.
"""

import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from nemoflow.data.lines import lines, smallest
from nemoflow.data.placeholders import Placeholders, Unresolvable, number_of
from nemoflow.data.rows import Broken
from nemoflow.data.sources import open_source
from nemoflow.data.verifiers import check_fields, check_row
from nemoflow.errors import NemoflowError

FILES = {"train": "train.jsonl", "valid": "validation.jsonl"}

EVERY = 10.0
"""Seconds between two lines of progress."""


def split(agents: dict[str, np.ndarray], valid: str) -> set[int]:
    """The prompts to validate with, as hashes: of each agent the share `valid` with the smallest ones, rounded up.

    agents: agent -> hashes of its prompts, which may repeat. An agent always keeps a prompt to train and has one to
    validate with; with `valid` "0" there is no validation. A prompt of several agents is on one side for all.

    Raises NemoflowError for an agent that cannot be on both sides.
    """
    if not Fraction(valid):
        return set()
    chosen: set[int] = set()
    for name, hashes in sorted(agents.items()):
        held = smallest(hashes, valid).tolist()
        if not held:
            raise NemoflowError(
                f"environment {name} has one prompt only, which cannot be both trained and validated with; give it "
                'more prompts, leave it out, or set valid: "0"'
            )
        chosen.update(held)
    for name, hashes in sorted(agents.items()):
        if all(hash_ in chosen for hash_ in hashes.tolist()):
            raise NemoflowError(
                f"environment {name}: all its prompts stand in other environments too, and are chosen to validate "
                "with there; give it prompts of its own, or lower `valid`"
            )
    return chosen


class _Reader:
    """Reads the rows of all sources, completed and checked; the same every time."""

    def __init__(self, payload: dict, inputs: dict, progress: Callable[[str], None]):
        self._sources = [open_source(directory) for directory in inputs["sources"]]
        self._allowed = set(payload["allow_unresolved"])
        self._agents = payload["agents"]
        self._progress = progress
        self._shown = time.monotonic()
        keys = sorted(payload["placeholders"])
        sources = [open_source(directory) for directory in inputs.get("placeholder_sources", [])]
        self._placeholders = Placeholders(
            self._wanted() if keys else {},
            {key: payload["placeholders"][key]["template"] for key in keys},
            dict(zip(keys, sources, strict=True)),
        )

    def _wanted(self) -> dict[str, set[int]]:
        """The rows that placeholders point at, by `dataset`."""
        wanted: dict[str, set[int]] = defaultdict(set)
        for source in self._sources:
            for _, _, row in lines(source, Broken()):
                number = number_of(row.get("_hf_placeholder"))
                if number is not None and isinstance(row.get("dataset"), str):
                    wanted[row["dataset"]].add(number)
        return wanted

    def rows(self, what: str) -> Iterator[tuple[bytes, str, int]]:
        """Each usable row: its line, its agent, and a 64-bit hash of its prompt. `what` is done with them."""
        self.broken = Broken()
        self.resolved: Counter[str] = Counter()
        self.unresolved: Counter[str] = Counter()
        done = 0
        for source in self._sources:
            for place, line, row in lines(source, self.broken):
                done += 1
                if (now := time.monotonic()) - self._shown >= EVERY:
                    self._shown = now
                    self._progress(f"{what} rows: {done:,}")
                if row.get("_hf_placeholder"):
                    key = str(row.get("dataset"))
                    try:
                        row = self._placeholders.resolve(row)
                    except Unresolvable as error:
                        if key in self._allowed:
                            self.unresolved[key] += 1
                            continue
                        raise NemoflowError(
                            f"{place}: a placeholder that cannot be completed: {error}. Repair the data, or name "
                            f"{key!r} in allow_unresolved to leave such rows out"
                        ) from None
                    line = msgspec.json.encode(row)
                    self.resolved[key] += 1
                try:
                    check_row(row)
                    if self._agents:
                        self._check_environment(row, place)
                except ValueError as error:
                    self.broken.add(str(error), place)
                    continue
                prompt = msgspec.json.encode(row["responses_create_params"]["input"], order="sorted")
                yield line, row["agent_ref"]["name"], xxhash.xxh3_64_intdigest(prompt)

    def _check_environment(self, row: dict, place: str) -> None:
        """Raise ValueError for a row that lacks a field, NemoflowError for one of no environment of the stage."""
        agent = row["agent_ref"]["name"]
        if agent not in self._agents:
            raise NemoflowError(
                f"{place}: agent_ref.name: {agent!r} is of no environment of this stage, whose agents are "
                f"{', '.join(sorted(self._agents))}; add the environment to data.environments, or leave such rows out"
            )
        check_fields(row, self._agents[agent], agent)


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write train.jsonl and validation.jsonl from the rows of inputs["sources"], in order.

    `payload` is {"valid": share of each environment's prompts as an exact fraction, "max_broken", "placeholders":
    {`dataset` of a row: {"template": "dapo" or "skywork"}}, "allow_unresolved": [`dataset` values], "agents": {agent:
    {field: type}}, the stage's environments, {} when it names none};
    inputs["placeholder_sources"] are the placeholders' sources, in the order of their sorted keys. A row's split
    depends on its prompt: no prompt is both trained and validated on, and every environment is in both files.

    Rows are streamed, twice, and once more when there are placeholders. In memory are 8 bytes for each row, and the
    questions that placeholders point at.

    Returns {"rows": {"train", "validation"}, "agents": {agent: the same}, "resolved" and "unresolved": placeholder rows
    by `dataset`, "broken": rows left out by reason}.

    Raises NemoflowError naming file and row for a placeholder that cannot be completed, a row of no environment of the
    stage, and more than `max_broken` unusable rows; and when an environment cannot be in both files or nothing is left.
    """
    reader = _Reader(payload, inputs, progress)
    hashes: dict[str, array] = defaultdict(lambda: array("Q"))
    for _, agent, prompt in reader.rows("checked"):
        hashes[agent].append(prompt)
    usable = sum(map(len, hashes.values()))
    reader.broken.check(usable + reader.broken.count, payload["max_broken"])
    if not usable:
        raise NemoflowError(f"{inputs['sources'][0]}: there are no usable prompts")
    validated = split({agent: np.frombuffer(found, np.uint64) for agent, found in hashes.items()}, payload["valid"])

    counts = {agent: {"train": 0, "validation": 0} for agent in sorted(hashes)}
    with (out / FILES["train"]).open("wb") as train, (out / FILES["valid"]).open("wb") as valid:
        for line, agent, prompt in reader.rows("written"):
            held = prompt in validated
            (valid if held else train).write(line + b"\n")
            counts[agent]["validation" if held else "train"] += 1
    rows = {side: sum(count[side] for count in counts.values()) for side in ("train", "validation")}
    progress(f"{rows['train']:,} to train on, {rows['validation']:,} to validate, {len(counts)} environments")
    return {
        "rows": rows,
        "agents": counts,
        "resolved": dict(sorted(reader.resolved.items())),
        "unresolved": dict(sorted(reader.unresolved.items())),
        "broken": reader.broken.measures(),
    }
