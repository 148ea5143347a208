"""What a sealed artifact measured, and what its training took, in a few words for people."""

from nemoflow.errors import NemoflowError


def _measures(record: dict) -> dict:
    """An artifact's measures; of shards, which are measured one by one, their sums."""
    found = record["measures"]
    if record.get("kind") == "shards" and "shards" in found:
        return {key: sum(shard[key] for shard in found["shards"]) for key in ("documents", "tokens")}
    return found


def tokens(record: dict) -> int | None:
    """Tokens to train on in data, trained on in a state; None where there are none."""
    found = _measures(record)
    found = found.get("tokens", found.get("train"))  # of all splits; packed chats measure each split apart
    return found.get("train", found.get("tokens")) if isinstance(found, dict) else found


def result(record: dict) -> str:
    """Loss or reward of a state, score of an evaluation, otherwise how much there is of what."""
    found = _measures(record)
    if record.get("kind") == "select":
        return f"iteration {found['at']}: {found['metric']} {found['values'][str(found['at'])]:.4g}"
    if "metrics" in found:
        metric, score = found["metric"], found["metrics"][found["metric"]]
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        return f"{metric} {score['value']:.3f}{error} of {found['samples']:,}"
    if "reward" in found:
        return f"reward {found['reward_first']:.2f} -> {found['reward']:.2f}"
    if "accuracy" in found:
        return f"preference accuracy {found['accuracy_first']:.2f} -> {found['accuracy']:.2f}"
    if "valid_loss" in found:
        return f"valid loss {found['valid_loss_first']:.2f} -> {found['valid_loss']:.2f}"
    if "loss" in found:
        return f"loss {found['loss']:.2f}"
    found = found | {k: v for k, v in found.get("train", {}).items() if k == "chats"}
    counted = {
        k: found[k]
        for k in ("documents", "chats", "rows", "parameters", "vocab_size", "files", "samples")
        if k in found
    }
    numbers = {k: v["train"] if isinstance(v, dict) else v for k, v in counted.items()}
    return ", ".join(f"{v:,} {'tokens known' if k == 'vocab_size' else k}" for k, v in list(numbers.items())[:1])


def line(record: dict) -> str:
    """Both in one line. Raises NemoflowError for measures that are not as artifacts of this kind have them."""
    try:
        count = tokens(record)
        return ", ".join(part for part in (f"{count:,} tokens" if count is not None else "", result(record)) if part)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        place = f"{record['kind']}/{record['label']}-{record['identity']}"
        wrong = f"{place}: its record is damaged: measures are not what they should be; restore it"
        raise NemoflowError(wrong) from None


def hardware(attempts: list[dict]) -> str:
    """What attempts of run.json ran on: "16 x NVIDIA H200", or "CPU"; empty where they do not say."""
    found = [
        device if device == "CPU" else f"{attempt.get('gpus', 1):,} x {device}"
        for attempt in attempts
        if (device := attempt.get("device"))
    ]
    return ", ".join(dict.fromkeys(found))


def gpu_hours(attempts: list[dict], at: int | None = None) -> float | None:
    """GPU-hours of a training's attempts, up to iteration `at`; None where none of them ran on GPUs.

    An attempt that went on beyond `at` counts in proportion to its iterations, one that does not say how long it took
    for nothing.
    """
    hours = [
        attempt["gpus"] * attempt["seconds"] / 3600 * _share(attempt, at)
        for attempt in attempts
        if attempt.get("device", "CPU") != "CPU" and "seconds" in attempt
    ]
    return sum(hours) if hours else None


def _share(attempt: dict, at: int | None) -> float:
    begun, reached = attempt.get("from", 0), attempt.get("reached", 0)
    if at is None or reached <= at:
        return 1.0 if at is None or begun < at or begun == reached == at else 0.0
    return max(0, at - begun) / (reached - begun)
