"""Signs that a reinforcement learning is sick, in words, from its measurements.

A training that shows one goes on: what to do about it is for people to decide. Where a threshold has no source it is
our own.
"""

from statistics import fmean, median, pstdev

MISMATCH = 1.02
"""Above it NeMo-RL's guide (docs/guides/grpo.md) calls the difference between generation and training an error."""

STEPS = 3
"""In a row, before the mismatch counts: single steps with long answers pass it."""

SPIKE = 5
"""Times the median of the last 50 steps, for the KL divergence from the reference."""

COLLAPSE = 0.3
"""Of the entropy at the start."""

WINDOW = 20
"""Steps whose mean reward is compared with that of as many before."""


def signs(steps: list[dict]) -> dict[str, str]:
    """Sign -> what it says, of the newest of these steps; entries of metrics.jsonl, in order."""
    found = {}
    for name, look in (("mismatch", _mismatch), ("kl", _kl), ("entropy", _entropy)):
        if said := look([s[name] for s in steps if isinstance(s.get(name), int | float)]):
            found[name] = said
    return found | _environments(steps)


def _mismatch(values: list[float]) -> str | None:
    last = values[-STEPS:]
    if len(last) < STEPS or min(last) <= MISMATCH:
        return None
    return (
        f"generation and training disagree: probabilities of sampled tokens differ by {100 * (last[-1] - 1):.1f}%, "
        f"more than {100 * (MISMATCH - 1):.0f}% in {STEPS} steps in a row; vLLM and the trainer may compute the model "
        "differently (precision, router, kernels), and what is learned is then not what was sampled"
    )


def _kl(values: list[float]) -> str | None:
    before = values[-51:-1]
    if len(before) < 10 or values[-1] <= max(SPIKE * median(before), 1e-3):
        return None
    return (
        f"the KL from the reference leaps to {values[-1]:.4f}, {SPIKE} times its median {median(before):.4f} "
        "or more; the learning rate may be too high"
    )


def _entropy(values: list[float]) -> str | None:
    if len(values) < 2 * WINDOW:
        return None
    first, last = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
    if first <= 0 or last >= COLLAPSE * first:
        return None
    return (
        f"entropy collapses: {last:.3f} in the last {WINDOW} steps, {first:.3f} in the first; answers become the same, "
        "and there is less and less to learn from"
    )


def _environments(steps: list[dict]) -> dict[str, str]:
    last, before = steps[-WINDOW:], steps[-2 * WINDOW : -WINDOW]
    if len(before) < WINDOW:
        return {}
    means = [[s["reward"] for s in part if isinstance(s.get("reward"), int | float)] for part in (before, last)]
    if not all(means) or fmean(means[1]) <= fmean(means[0]):
        return {}
    found = {}
    for agent in sorted({name for s in last for name in s.get("rewards", {})}):
        earlier, later = (
            [s["rewards"][agent] for s in part if s.get("rewards", {}).get(agent) is not None]
            for part in (before, last)
        )
        if len(earlier) < WINDOW // 2 or len(later) < WINDOW // 2:
            continue
        noise = (pstdev(earlier) ** 2 / len(earlier) + pstdev(later) ** 2 / len(later)) ** 0.5
        fall = fmean(earlier) - fmean(later)
        if fall > max(0.01, 3 * noise):
            found[f"rewards.{agent}"] = (
                f"{agent} gets worse while the mean gets better: its reward fell from {fmean(earlier):.3f} to "
                f"{fmean(later):.3f} over {WINDOW} steps, the mean rose from {fmean(means[0]):.3f} to "
                f"{fmean(means[1]):.3f}"
            )
    return found
