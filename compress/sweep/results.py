"""What the cells of a sweep are worth: their figures, repetitions together, and which of them nothing else beats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError
from compress.report import read_report
from compress.sweep.matrix import Cell

Status = Literal["finished", "failed", "not finished"]
BETTER: dict[str, int] = {"accuracy": 1, "latency_ms": -1, "size_bytes": -1}
"""The three figures a network is chosen by: whether more of it is better, or less."""


@dataclass(frozen=True)
class Figures:
    """Of the file that the cell's own report speaks of in its headline."""

    file: str | None = None
    accuracy: float | None = None
    accuracy_of: str | None = None
    """`file`, or `torch` where no file was verified."""
    latency_ms: float | None = None
    """p50, batch 1."""
    size_bytes: int | None = None
    noisy: bool = False
    """Whether the benchmark called its comparison with the parent NOISY."""
    runtime: str | None = None
    machine: str = ""
    """The sentence that has to stand beside each latency."""
    conditions: str = ""
    task: str = "classification"
    """What `accuracy` is the score of."""


@dataclass(frozen=True)
class Result:
    """A cell as the sweep left it."""

    cell: Cell
    status: Status
    figures: Figures = Figures()
    error: str = ""
    """One line; empty where nothing went wrong."""


@dataclass(frozen=True)
class Spread:
    """A figure over repetitions."""

    mean: float
    deviation: float | None
    """Of a sample, with n - 1; None for one value."""
    least: float
    most: float
    count: int


@dataclass(frozen=True)
class Group:
    """Cells that differ in nothing but their seeds."""

    name: str
    setting: tuple[tuple[str, str], ...]
    cells: tuple[Result, ...]
    spreads: Mapping[str, Spread]
    """By figure, over the finished cells; a figure that one of them lacks is absent."""
    best: bool = False
    """Whether no other group is at least as good in every figure and better in one."""

    @property
    def finished(self) -> int:
        return sum(result.status == "finished" for result in self.cells)

    @property
    def noisy(self) -> bool:
        return any(result.figures.noisy for result in self.cells if result.status == "finished")


def figures(folder: Path) -> Figures:
    """What a cell's folder says, as its report reads it; all None where nothing was finished."""
    try:
        report = read_report(folder)
    except CompressError:
        return Figures()
    task = report["run"]["data"]["task"]
    named = [file for file in report["files"] if file["file"] == report["headline"]["file"]]
    if not named:
        networks = [stage["network"] for stage in report["stages"] if stage["network"]]
        accuracy = networks[-1]["accuracy"] if networks else None
        return Figures(accuracy=accuracy, accuracy_of="torch" if accuracy is not None else None, task=task)
    file = min(named, key=lambda one: one["timing"]["p50_ms"] if one["timing"] else float("inf"))
    machine = report["machine"] or {}
    return Figures(
        file=file["file"],
        accuracy=file["accuracy"],
        accuracy_of=file["accuracy_of"],
        latency_ms=file["timing"]["p50_ms"] if file["timing"] else None,
        size_bytes=file["size_bytes"],
        noisy=bool(file["pair"] and file["pair"]["verdict"] == "NOISY"),
        runtime=file["runtime"],
        machine=machine.get("statement", ""),
        conditions=machine.get("conditions", "") if file["timing"] else "",
        task=task,
    )


def grouped(results: Sequence[Result]) -> list[Group]:
    """Repetitions together, in the order of the matrix, with the best marked."""
    members: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        members.setdefault(result.cell.setting, []).append(result)
    groups = []
    for setting, cells in members.items():
        done = [result.figures for result in cells if result.status == "finished"]
        spreads = {}
        for name in BETTER:
            values = [getattr(one, name) for one in done]
            if values and None not in values:
                spreads[name] = spread([float(value) for value in values])
        groups.append(Group(group_name(cells), setting, tuple(cells), spreads))
    front = best([{name: one.mean for name, one in group.spreads.items()} for group in groups])
    return [
        Group(group.name, group.setting, group.cells, group.spreads, found)
        for group, found in zip(groups, front, strict=True)
    ]


def group_name(cells: Sequence[Result]) -> str:
    """The cells' name without their seed."""
    parts = [part for part in cells[0].cell.name.split("_") if not part.startswith("seed=")]
    return "_".join(parts) or "all seeds"


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), max(values), len(values))


def best(points: Sequence[Mapping[str, float]]) -> list[bool]:
    """Of each point whether none dominates it: is at least as good in every figure, and better in one.

    The figures are those that any point has; a point without all of them is compared with none.
    """
    names = [name for name in BETTER if any(name in point for point in points)]
    whole = [bool(names) and all(name in point for name in names) for point in points]

    def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        gains = [BETTER[name] * (one[name] - other[name]) for name in names]
        return min(gains) >= 0 and max(gains) > 0

    return [
        mine and not any(theirs and dominates(other, point) for other, theirs in zip(points, whole, strict=True))
        for point, mine in zip(points, whole, strict=True)
    ]


def as_json(groups: Sequence[Group], folder: Path) -> dict[str, Any]:
    """Groups and cells as JSON; `folder` is the sweep's."""
    return {
        "groups": [
            {
                "name": group.name,
                "values": dict(group.setting),
                "best": group.best,
                "noisy": group.noisy,
                "finished": group.finished,
                "of": len(group.cells),
                "figures": {
                    name: {
                        "mean": one.mean,
                        "deviation": one.deviation,
                        "least": one.least,
                        "most": one.most,
                        "count": one.count,
                    }
                    for name, one in group.spreads.items()
                },
                "cells": [result.cell.name for result in group.cells],
            }
            for group in groups
        ],
        "cells": [
            {
                "name": result.cell.name,
                "folder": (folder / result.cell.name).as_posix(),
                "values": dict(result.cell.values),
                "overrides": list(result.cell.overrides),
                "status": result.status,
                "error": result.error or None,
                "file": result.figures.file,
                "accuracy": result.figures.accuracy,
                "accuracy_of": result.figures.accuracy_of,
                "latency_ms": result.figures.latency_ms,
                "size_bytes": result.figures.size_bytes,
                "noisy": result.figures.noisy,
                "runtime": result.figures.runtime,
            }
            for group in groups
            for result in group.cells
        ],
    }
