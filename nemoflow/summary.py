"""What a sealed artifact measured, in a few words for people."""


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
    if "metrics" in found:
        metric, score = found["metric"], found["metrics"][found["metric"]]
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        return f"{metric} {score['value']:.3f}{error} of {found['samples']:,}"
    if "reward" in found:
        return f"reward {found['reward_first']:.2f} -> {found['reward']:.2f}"
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
    """Both in one line."""
    count = tokens(record)
    return ", ".join(part for part in (f"{count:,} tokens" if count is not None else "", result(record)) if part)
