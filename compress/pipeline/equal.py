"""What setting of a control makes it as fast as another network: a search that measures as seldom as it can."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

AGAIN = 8
"""Settings looked at for each that may be measured: those of the same widths cost nothing, impossible ones little."""


@dataclass(frozen=True)
class Tried:
    at: float
    """The setting."""
    ratio: float
    """The control's time over that wanted."""

    @property
    def off(self) -> float:
        return abs(math.log(self.ratio))


def search(
    ratio_of: Callable[[float], tuple[float, bool] | None],
    *,
    start: float,
    low: float,
    high: float,
    power: float,
    tolerance: float,
    most: int,
    whole: bool = False,
) -> list[Tried]:
    """Settings in [low, high] that were tried for a time as wanted, in their order; the time rises with the setting.

    `ratio_of` gives the time over that wanted and whether it had to be measured for it; None where there is no such
    control. `start` is tried first; a time is taken to grow like setting ** (1 / power), as far as the last two do not
    say otherwise, until both sides are known; then the bracket is cut where a line through its ends says, but at least
    a tenth from either. Ends when `tolerance` is met, after `most` measurements, or where nothing is left to try.
    `whole`: settings are whole numbers.
    """
    tried: list[Tried] = []
    seen: set[float] = set()
    below, above = Tried(low, 0.0), Tried(high, math.inf)  # an end that was not tried has no time
    at: float | None = _placed(start, low, high, seen, whole)
    measured = 0
    for _ in range(AGAIN * most):
        if at is None or measured >= most:
            break
        seen.add(at)
        found = ratio_of(at)
        if found is not None:
            ratio, fresh = found
            measured += fresh
            tried.append(Tried(at, ratio))
            if abs(ratio - 1) <= tolerance:
                break
            if ratio > 1:
                above = tried[-1] if at <= above.at else above
            else:
                below = tried[-1] if at >= below.at else below
        at = _placed(_next(below, above, tried, power, at), below.at, above.at, seen, whole)
    return tried


def nearest(tried: list[Tried]) -> Tried | None:
    """The setting whose time came closest; the slower of two as close."""
    return min(tried, key=lambda one: (one.off, -one.ratio)) if tried else None


def _next(below: Tried, above: Tried, tried: list[Tried], power: float, at: float) -> float:
    if below.ratio > 0 and above.ratio < math.inf:
        part = -math.log(below.ratio) / (math.log(above.ratio) - math.log(below.ratio))
        return below.at * (above.at / below.at) ** min(0.9, max(0.1, part))
    if not tried:  # nothing was possible yet: towards the middle
        return (below.at + above.at) / 2 if at != (below.at + above.at) / 2 else (at + above.at) / 2
    if len(tried) > 1 and tried[-1].ratio != tried[-2].ratio:
        found = math.log(tried[-1].at / tried[-2].at) / math.log(tried[-1].ratio / tried[-2].ratio)
        power = min(4.0, max(0.3, found))
    return float(tried[-1].at * (1 / tried[-1].ratio) ** power)


def _placed(at: float, low: float, high: float, seen: set[float], whole: bool) -> float | None:
    """The setting nearest to `at` in the bracket that was not seen; None where the bracket is used up."""
    at = min(max(at, low), high)
    if whole:
        ring = sorted(range(math.ceil(low), math.floor(high) + 1), key=lambda other: (abs(other - at), other))
        return next((float(other) for other in ring if other not in seen), None)
    if at not in seen:
        return at
    middle = math.sqrt(low * high)
    return middle if middle not in seen and (high / low) > 1.002 else None
