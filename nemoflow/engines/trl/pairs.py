"""DPO and reward models: pairs of answers, one preferred."""

import json
from pathlib import Path
from typing import Any

from nemoflow.errors import NemoflowError


def rows(preferences: Path) -> list[dict]:
    """The pairs to train on: {"prompt", "chosen", "rejected"}, each messages.

    Raises NemoflowError naming file and line for one that cannot be trained on here.
    """
    file = preferences / "train.jsonl"
    if not file.is_file():
        raise NemoflowError(f"{file}: is missing; the preferences of an rl stage are expected there")
    found = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            row = json.loads(line)
            if row.get("tools"):
                raise NemoflowError(f"{file}:{number}: only messages of plain text are supported here, without tools")
            found.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
    if not found:
        raise NemoflowError(f"{file}: has no rows; there is nothing to train on")
    return found


def make(base: type, request: Any, config: Any, order: Any, **arguments: Any) -> Any:
    """A trainer of class `base`, TRL's DPOTrainer or RewardTrainer, on the pairs in the order that the seed gives."""
    from datasets import Dataset

    found = rows(request.preferences)
    needed = request.horizon * config.per_device_train_batch_size * config.gradient_accumulation_steps
    data = Dataset.from_list([found[i] for i in order(len(found), config.seed, needed)])
    made = base(train_dataset=data, args=config, **arguments)
    made.close = lambda: None
    made.measured = _measured
    return made


def _measured(logs: dict) -> dict:
    """Share of the pairs whose preferred answer is rewarded more, and by how much. DPO's rewards are implicit, beta
    times the log ratio to the reference model, and so all zero before the first step.
    """
    named = {"rewards/accuracies": "accuracy", "accuracy": "accuracy", "rewards/margins": "margin", "margin": "margin"}
    return {name: logs[key] for key, name in named.items() if key in logs}


def sequence_classifier(config: Any) -> type:
    """The class of a model with one score at its end, for reward models.

    transformers has one for most architectures, and for NemotronH only its parts: there it is put together here.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForSequenceClassification

    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    if config.model_type != "nemotron_h":
        raise NemoflowError(
            f"model: transformers has no {config.model_type} with a score at its end; rm cannot train it"
        )
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHPreTrainedModel

    return type("NemotronHForSequenceClassification", (GenericForSequenceClassification, NemotronHPreTrainedModel), {})
