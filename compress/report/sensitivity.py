"""How much each set of coupled layers minds losing channels, and each block being left out, as pruning measured it."""

from __future__ import annotations

from typing import Any

from compress.report.folder import Stage
from compress.report.parts import Pruning, Sensitivity


def sensitivity_of(stages: list[Stage]) -> dict[str, Any] | None:
    """Curves of the last stage that measured them, and its blocks; None where none did."""
    for stage in reversed(stages):
        metrics = stage.metrics
        if isinstance(metrics, Pruning) and (metrics.sensitivity or metrics.blocks):
            return {
                "stage": stage.manifest.folder,
                "by": _by(metrics.sensitivity),
                "sets": [_set(one) for one in metrics.sensitivity],
                "blocks": [block.model_dump(mode="json") for block in metrics.blocks],
            }
    return None


def _by(sets: list[Sensitivity]) -> str:
    """What the picture is coloured by: `kl`, or `accuracy` where nothing else was measured."""
    return "kl" if any(value is not None for one in sets for value in one.kl) or not sets else "accuracy"


def _set(one: Sensitivity) -> dict[str, Any]:
    """A set with its curve from wide to narrow; shares are of its units."""
    length = len(one.widths)
    kl = [*one.kl, *[None] * length][:length]
    accuracy = [*one.accuracy, *[None] * length][:length]
    points = sorted(zip(one.widths, kl, accuracy, strict=True), key=lambda point: -point[0])
    points = [point for point in points if point[0] <= one.units]
    kept = one.kept
    return {
        "name": one.name,
        "units": one.units,
        "kept": kept,
        "share": None if kept is None else kept / one.units,
        "curve": [{"width": width, "share": width / one.units, "kl": k, "accuracy": a} for width, k, a in points],
        "kl_at_kept": _at(points, kept, 1),
        "kl_at_half": _at(points, one.units / 2, 1),
        "accuracy_at_half": _at(points, one.units / 2, 2),
    }


def _at(points: list[tuple[int, float | None, float | None]], width: float | None, which: int) -> float | None:
    """What was measured at the width nearest to `width`; None without any within a sixth of the widest."""
    known = [(abs(point[0] - width), point[which]) for point in points if point[which] is not None] if width else []
    if not known:
        return None
    off, value = min(known, key=lambda pair: pair[0])
    assert isinstance(value, (int, float))
    return value if off <= max(1.0, points[0][0] / 6) else None
