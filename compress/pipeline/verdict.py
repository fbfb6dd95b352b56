"""Which of two networks is ahead, once their scores and their times are known; and how that is said."""

from __future__ import annotations

from compress.gate.replicated import Replicated


def judge(
    difference: Replicated,
    ratio: float | None,
    interval: list[float] | None,
    tolerance: float,
    *,
    made_equal: bool = False,
) -> str:
    """`win`, `tie`, `lose` or `trade` of our network against a control that takes `ratio` of its time.

    A score counts as different where neither images nor seeds explain it, a time where it is off by more than
    `tolerance` and its interval is without 1. Better in one and not worse in the other wins; better in one and worse in
    the other is a trade. A control that was `made_equal` is not beaten by speed alone: how fast it is was our choice.
    """
    score = 0 if not difference.real else 1 if difference.difference > 0 else -1
    speed = 0
    if ratio is not None and abs(ratio - 1) > tolerance and not (interval and interval[0] <= 1 <= interval[1]):
        speed = 1 if ratio > 1 else -1
    if speed > 0 and score == 0 and made_equal:
        return "tie"
    if score * speed < 0:
        return "trade"
    return {1: "win", 0: "tie", -1: "lose"}[score or speed]


def sentence(
    verdict: str, difference: Replicated, ratio: float | None, *, seeds: int, percent: bool, score: str
) -> str:
    """`loses by 1.2 points of accuracy at equal latency (...)`, without a stop."""
    by = abs(difference.difference)
    amount = f"{100 * by:.1f} points of {score}" if percent else f"{by:.3f} of {score}"
    how = f"images p {_p(difference.images_p)}"
    how += f", {seeds} seeds p {_p(difference.seeds_p)}" if difference.seeds_p is not None else ", one seed"
    faster = f"{100 * abs(ratio - 1):.0f}% {'slower' if ratio > 1 else 'faster'}" if ratio is not None else ""
    ahead = difference.difference > 0
    if verdict == "trade":
        return f"a trade: the control is {faster} and {amount} {'worse' if ahead else 'better'} ({how})"
    if difference.real:
        at = f"the control is {faster}" if ratio is not None and round(abs(ratio - 1), 2) > 0.02 else "equal latency"
        return f"{'wins' if verdict == 'win' else 'loses'} by {amount}, {at} ({how})"
    if verdict == "tie":
        other = f", and the control is {faster}" if ratio is not None and round(abs(ratio - 1), 2) > 0.02 else ""
        return f"a tie: {amount} {'ahead' if ahead else 'behind'} are within the noise{other} ({how})"
    return f"{'wins' if verdict == 'win' else 'loses'}: the control is {faster} and as good within the noise ({how})"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "below 0.0001"
