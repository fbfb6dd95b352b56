"""What became of a goal of speed: what was asked, foretold and measured, and what else was within reach."""

from __future__ import annotations

from typing import Any

from compress.report.folder import Stage
from compress.report.parts import Pruning


def speed_of(stages: list[Stage]) -> dict[str, Any] | None:
    """Of the last stage that pruned to a time; None where none did. Times are in microseconds."""
    for stage in reversed(stages):
        metrics = stage.metrics
        if isinstance(metrics, Pruning) and metrics.most_us is not None:
            found = metrics.model_dump(
                mode="json",
                include={"goal", "target", "runtime", "threads", "estimated", "parent_us", "whole_us", "most_us"}
                | {"predicted_us", "measured_us"},
            )
            parent_us = metrics.parent_us
            return found | {
                "stage": stage.manifest.folder,
                "off": _off(metrics.measured_us, metrics.most_us),
                "wrong": _off(metrics.predicted_us, metrics.measured_us),
                "rounds": [_round(one.model_dump(mode="json")) for one in metrics.rounds],
                "frontier": [
                    {"us": point.us, "speedup": parent_us and parent_us / point.us, "loss": point.loss}
                    for point in metrics.frontier
                ],
            }
    return None


def _off(found: float | None, wanted: float | None) -> float | None:
    return None if found is None or not wanted else found / wanted - 1


def _round(one: dict[str, Any]) -> dict[str, Any]:
    """A round with the way that was taken and the best of those that were not."""
    ways = [way for way in one["candidates"] if way["name"] == one["chosen"]]
    others = [way for way in one["candidates"] if way["name"] != one["chosen"]]
    return one | {"taken": ways[0] if ways else None, "next": others[0] if others else None}
