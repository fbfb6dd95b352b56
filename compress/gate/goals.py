"""What a run must hold against its baseline, in the words of Olive's metric goals.

Olive turns each goal into a bound on the metric (`olive/engine`, `resolve_goals`; the same here): with b the baseline's
value and s = 1 where more is better, -1 where less is,

    threshold                 value, whatever the baseline
    max-degradation           b - s * value
    min-improvement           b + s * value
    percent-max-degradation   b * (1 - s * value / 100)
    percent-min-improvement   b * (1 + s * value / 100)

and the metric must be as good as the bound or better. Values are in the metric's own unit: accuracy is a fraction, so
half a point is 0.005. Percentages have Olive's ranges.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import CompressError

THRESHOLD = "threshold"
TYPES = (THRESHOLD, "max-degradation", "min-improvement", "percent-max-degradation", "percent-min-improvement")


@dataclass(frozen=True)
class Metric:
    name: str
    more_is_better: bool
    unit: str
    group: str
    """What `--only` calls it."""

    @property
    def sign(self) -> int:
        return 1 if self.more_is_better else -1


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, "fraction of the images", "accuracy"),
        Metric("size", False, "bytes", "size"),
        Metric("latency", False, "ms, the median", "latency"),
        Metric("fps", True, "images per second", "latency"),
        Metric("speedup", True, "times the parent", "latency"),
    )
}
GROUPS = ("accuracy", "size", "parity", "latency")
"""Parity has no goal: the files compute what was trained, or they do not."""


@dataclass(frozen=True)
class Goal:
    metric: str
    type: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.type}={self.value:g}"

    @property
    def about(self) -> Metric:
        return METRICS[self.metric]

    @property
    def allows_loss(self) -> bool:
        """Whether missing it means that something got worse; the others ask for what may not be within reach."""
        return self.type.endswith("max-degradation")

    def bound(self, baseline: float) -> float:
        """The worst value that still holds."""
        sign = self.about.sign
        return {
            THRESHOLD: self.value,
            "max-degradation": baseline - sign * self.value,
            "min-improvement": baseline + sign * self.value,
            "percent-max-degradation": baseline * (1 - sign * self.value / 100),
            "percent-min-improvement": baseline * (1 + sign * self.value / 100),
        }[self.type]


DEFAULTS = (
    Goal("accuracy", "max-degradation", 0.005),
    Goal("size", "percent-max-degradation", 1.0),
    Goal("latency", "percent-max-degradation", 5.0),
)
"""Of the metrics for which neither the command nor the baseline names a goal."""


def parse(text: str, place: str = "--goal") -> Goal:
    """`accuracy:max-degradation=0.01`. Raises CompressError naming what is wrong in it."""
    metric, colon, rest = text.partition(":")
    kind, equals, number = rest.partition("=")
    metric, kind = metric.strip(), kind.strip()
    if not colon or not equals:
        raise CompressError(place, f"{text!r} is no goal", "write METRIC:TYPE=VALUE, such as latency:threshold=8.5")
    if metric == "parity":
        raise CompressError(place, "parity has no goal: verify's tolerances stand in the recipe", "leave it out")
    if metric not in METRICS:
        raise CompressError(place, f"no metric {metric!r}{_meant(metric, METRICS)}", f"known: {', '.join(METRICS)}")
    if kind not in TYPES:
        raise CompressError(place, f"no type of goal {kind!r}{_meant(kind, TYPES)}", f"known: {', '.join(TYPES)}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CompressError(place, f"{text!r}: {number!r} is no number")
    _check_range(Goal(metric, kind, value), place)
    return Goal(metric, kind, value)


def chosen(command: Sequence[Goal], baseline: Sequence[Goal], groups: Sequence[str]) -> list[Goal]:
    """The goals that hold: of each metric the command's, else the baseline's, else the default; of `groups` only.

    Raises CompressError for a goal of the command that `groups` leaves out.
    """
    for goal in command:
        if goal.about.group not in groups:
            raise CompressError(
                "--only", f"leaves out {goal.about.group}, which {goal} is about", "drop one of the two"
            )
    found = []
    for name, metric in METRICS.items():
        for source in (command, baseline, DEFAULTS):
            own = [goal for goal in source if goal.metric == name]
            if own:
                found += own if metric.group in groups else []
                break
    return found


def _check_range(goal: Goal, place: str) -> None:
    low, high = (-math.inf, math.inf) if goal.type == THRESHOLD else (0.0, math.inf)
    strict = goal.type.startswith("percent-")
    if strict and goal.about.more_is_better == (goal.type == "percent-max-degradation"):
        high = 100.0
    if goal.metric == "accuracy" and not strict:
        low, high = 0.0, 1.0
    inside = low < goal.value < high if strict else low <= goal.value <= high
    if not inside:
        hint = "; accuracy is a fraction, half a point is 0.005" if goal.metric == "accuracy" and not strict else ""
        raise CompressError(place, f"{goal}: the value must lie between {low:g} and {high:g}{hint}")


def _meant(word: str, known: Sequence[str] | dict[str, Metric]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
