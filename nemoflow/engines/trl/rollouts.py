"""GRPO and DAPO: prompts, what is sampled for them, and the rewards of that by the rows' environments."""

import json
import statistics
from pathlib import Path
from typing import Any

from nemoflow.engines.trl import USUAL
from nemoflow.environments.judge import Judge
from nemoflow.errors import NemoflowError


def rows(prompts: Path, agents: dict) -> list[dict]:
    """The rows to train on, all of `agents`.

    Raises NemoflowError naming file and line for one that cannot be trained on here.
    """
    file = prompts / "train.jsonl"
    if not file.is_file():
        raise NemoflowError(f"{file}: is missing; the prompts of an rl stage are expected there")
    found = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
                messages = row["responses_create_params"]["input"]
                plain = all(set(m) <= {"role", "content", "type"} and isinstance(m["content"], str) for m in messages)
                agent = row.get("agent_ref", {}).get("name")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise NemoflowError(f"{where}: no row in NeMo-Gym's layout: {error!r}") from None
            if not plain or row["responses_create_params"].get("tools"):
                raise NemoflowError(f"{where}: only messages of plain text are supported here, without tools")
            if agent not in agents:
                raise NemoflowError(
                    f"{where}: agent_ref.name: {agent!r} is of no environment of this stage, whose agents are "
                    f"{', '.join(sorted(agents))}; name its environment in data.environments"
                )
            if agents is USUAL and row.get("expected_answer") in (None, ""):
                raise NemoflowError(f"{where}: expected_answer is missing, which answers are compared with")
            found.append(row)
    if not found:
        raise NemoflowError(f"{file}: has no rows; there is nothing to train on")
    return found


class Rewards:
    """TRL's reward function of a stage. After each call `measured` says what the answers were worth.

    group: samples of one prompt, which stand side by side. An answer that could not be judged is given the mean of its
    group, so that its advantage is zero and those of the others are what they were; in a group without any other one,
    all are zero. overlong: (tokens, last tokens of them), DAPO's: an answer that ends within the last ones, or not at
    all, is punished by up to 1.
    """

    __name__ = "reward"

    def __init__(self, judge: Judge, group: int, overlong: tuple[int, int] | None):
        self.judge, self.group, self.measured = judge, group, {}
        self._punish = None
        if overlong and overlong[1]:
            from trl.rewards import get_soft_overlong_punishment

            self._punish = get_soft_overlong_punishment(*overlong)

    def __call__(self, completions: list, row: list[str], completion_ids: list, **_: Any) -> list[float]:
        asked = [json.loads(text) for text in row]
        found = self.judge.rewards([completion[0]["content"] for completion in completions], asked)
        agents = [each["agent_ref"]["name"] for each in asked]
        judged = {
            agent: [value for value, name in zip(found, agents, strict=True) if name == agent and value is not None]
            for agent in sorted(set(agents))
        }
        known = [value for value in found if value is not None]
        self.measured = {"reward": statistics.fmean(known) if known else None}
        if len(self.judge.environments) > 1:
            self.measured["rewards"] = {agent: statistics.fmean(values) for agent, values in judged.items() if values}
        if len(known) < len(found):
            self.measured["skipped"] = {a: n for a in judged if (n := agents.count(a) - len(judged[a]))}
        filled = list(found)
        for begin in range(0, len(found), self.group):
            others = [value for value in found[begin : begin + self.group] if value is not None]
            mean = statistics.fmean(others) if others else 0.0
            for i in range(begin, begin + self.group):
                filled[i] = mean if found[i] is None else found[i]
        if self._punish:
            punished = self._punish(completion_ids)
            filled = [value + less for value, less in zip(filled, punished, strict=True)]
        return filled


def make(base: type, request: Any, config: Any, order: Any, **arguments: Any) -> Any:
    """A trainer of class `base`. Its measured() is what the answers of a step were worth, close() ends the judge."""
    from datasets import Dataset

    agents = request.environments or USUAL
    found = rows(request.prompts, agents)
    groups = config.generation_batch_size // config.num_generations
    generations = -(-request.horizon * config.gradient_accumulation_steps // config.steps_per_generation)
    generations = -(-generations // config.num_iterations)
    data = Dataset.from_list(
        [
            {"prompt": [_message(m) for m in row["responses_create_params"]["input"]], "row": json.dumps(row)}
            for row in (found[i] for i in order(len(found), config.seed, groups * generations))
        ]
    )
    overlong = None
    if request.algorithm == "dapo":
        length = config.max_completion_length
        cache = request.overrides.get("dapo.overlong_cache", length // 5)
        overlong = length, cache
    judge = Judge(agents)
    rewards = Rewards(judge, config.num_generations, overlong)
    made = base(reward_funcs=rewards, train_dataset=data, args=config, **arguments)
    made.close = judge.close

    def measured(logs: dict) -> dict:
        if "reward" not in logs:
            return {}  # a step that reuses samples (num_iterations, steps_per_generation) has no rewards of its own
        tokens = round(logs["completions/mean_length"] * config.generation_batch_size)
        return {**rewards.measured, "reward_std": logs["reward_std"], "completion_tokens": tokens}

    made.measured = measured
    return made


def _message(message: dict) -> dict:
    return {"role": message["role"], "content": message["content"]}
