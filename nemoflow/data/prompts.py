"""Kind `prompts`: rows for RL in NeMo-Gym's layout, checked and split, otherwise passed through byte for byte.

A row has `responses_create_params.input` (the prompt, as messages), `agent_ref.name` (which environment answers and
judges it; NeMo-RL needs it) and the fields that environment's verifier reads.
"""

import json
from collections.abc import Callable
from pathlib import Path

from nemoflow.data.rows import Broken, Split, encodable, read, shards_of
from nemoflow.errors import NemoflowError

FILES = {"train": "train.jsonl", "valid": "validation.jsonl"}


def check_row(row: dict) -> None:
    """Raise ValueError with the reason when a row lacks what NeMo-RL or its verifier reads."""
    parameters = row.get("responses_create_params")
    messages = parameters.get("input") if isinstance(parameters, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("responses_create_params.input is not a non-empty list of messages")
    for i, message in enumerate(messages):
        # Items of another type (a tool's call or its output) are the Responses API's own and have no role.
        if not isinstance(message, dict) or (
            message.get("type", "message") == "message"
            and not (isinstance(message.get("role"), str) and message.get("content"))
        ):
            raise ValueError(f"responses_create_params.input[{i}] has no role or no content")
    agent = row.get("agent_ref")
    name = agent.get("name") if isinstance(agent, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("agent_ref.name is missing")
    if name.startswith("math") and row.get("expected_answer") in (None, ""):
        raise ValueError(f"expected_answer is missing, which agent {name} compares with")


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write train.jsonl and validation.jsonl from the rows of inputs["sources"], in order.

    `payload` is {"valid": share as an exact fraction, "max_broken"}. A row's split depends on its prompt alone, so no
    prompt is both trained and validated on.

    Returns {"rows": {"train", "validation"}, "agents": rows by agent, "broken": rows left out by reason}.

    Raises NemoflowError naming file and line when more than `max_broken` of the rows are unusable, or none is left.
    """
    split = Split(payload["valid"])
    broken = Broken()
    counts = dict.fromkeys(FILES, 0)
    agents: dict[str, int] = {}
    with (out / FILES["train"]).open("wb") as train, (out / FILES["valid"]).open("wb") as valid:
        files = {"train": train, "valid": valid}
        for shard in [shard for source in inputs["sources"] for shard in shards_of(source)]:
            for place, line, row in read(shard, broken):
                try:
                    check_row(row)
                    prompt = row["responses_create_params"]["input"]
                    content = encodable(json.dumps(prompt, ensure_ascii=False, sort_keys=True), "input").encode()
                except ValueError as error:
                    broken.add(str(error), place)
                    continue
                name = split.of(content)
                files[name].write(line.rstrip(b"\r\n") + b"\n")
                counts[name] += 1
                agents[row["agent_ref"]["name"]] = agents.get(row["agent_ref"]["name"], 0) + 1
    broken.check(sum(counts.values()) + broken.count, payload["max_broken"])
    if not counts["train"]:
        raise NemoflowError(f"{inputs['sources'][0]}: no row to train on; there are no usable prompts")
    progress(f"{counts['train']:,} to train on, {counts['valid']:,} to validate")
    return {
        "rows": {"train": counts["train"], "validation": counts["valid"]},
        "agents": dict(sorted(agents.items())),
        "broken": broken.measures(),
    }
