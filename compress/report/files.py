"""The exported files of a run beside the parent's: accuracy, size, times, and which of them the headline speaks of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compress.report import wording
from compress.report.folder import RunFolder, Stage
from compress.report.parts import (
    Benchmark,
    Export,
    ExportedFile,
    Metrics,
    NetworkFigures,
    Pair,
    Pruning,
    Timing,
    Verification,
    VerifiedFile,
)

COMPRESSING = ("prune", "factorize", "sparsify", "cluster", "quantize")
"""Stages that take something away; the network before the first of them is the parent."""

KINDS = ("parent", "float", "float16", "int8_weights", "int8")
"""Of files, the more compressed the later."""

_M = TypeVar("_M", bound=Metrics)


def last(stages: list[Stage], kind: type[_M]) -> tuple[int, _M] | None:
    """Position and metrics of the last stage with such metrics."""
    for at in reversed(range(len(stages))):
        metrics = stages[at].metrics
        if type(metrics) is kind:
            return at, metrics
    return None


@dataclass(frozen=True)
class Parent:
    figures: NetworkFigures
    stage: str | None
    """None for a network that came with its weights."""


def parent_of(folder: RunFolder) -> Parent | None:
    """The network before anything was taken from it, None where the run does not say anything of it."""
    networks = {stage.manifest.folder: stage.manifest.network for stage in folder.stages if stage.manifest.network}
    for stage in reversed(folder.stages):
        named = stage.manifest.product.parent
        figures = networks.get(Path(named).parent.name) if named else None
        if named and figures:
            return Parent(figures, Path(named).parent.name)
    found = None
    for stage in folder.stages:
        manifest = stage.manifest
        if manifest.stage in COMPRESSING:
            if not found and isinstance(stage.metrics, Pruning):
                return Parent(NetworkFigures(macs=stage.metrics.macs_before), None)
            break
        if manifest.network:
            found = Parent(manifest.network, manifest.folder)
    return found


def _exports(stages: list[Stage]) -> dict[str, tuple[int, ExportedFile]]:
    """Every exported file by name, the later one where two have the same, with its stage's position."""
    found: dict[str, tuple[int, ExportedFile]] = {}
    for at, stage in enumerate(stages):
        if isinstance(stage.metrics, Export):
            found |= {name: (at, file) for name, file in stage.metrics.files.items()}
    return found


def _unchanged(stages: list[Stage], at: int) -> Callable[[str], bool]:
    """Whether the stage at that position had before it the file that the run ends with."""
    before, now = _exports(stages[:at]), _exports(stages)

    def same(name: str) -> bool:
        if name not in now:
            return not now  # a run without an export stage: nothing to compare with
        if name not in before:
            return False
        (then_at, then), (now_at, file) = before[name], now[name]
        return then_at == now_at or (file.sha256 is not None and then.sha256 == file.sha256)

    return same


def _made_from(kind: str, stages: list[Stage], parent: Parent | None) -> tuple[str | None, NetworkFigures | None]:
    """Stage and figures of the network that a file of that kind was made from, given the stages before its export."""
    if kind == "parent":
        return (parent.stage, parent.figures) if parent else (None, None)
    for stage in reversed(stages):
        manifest = stage.manifest
        network = manifest.network
        if network and not network.simulated and network.numbers.startswith("int8") == (kind == "int8"):
            return manifest.folder, manifest.network
    return None, None


def files_of(stages: list[Stage], parent: Parent | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every exported file in every runtime it was timed in, and a sentence per figure that a later export made void."""
    verification, benchmark = last(stages, Verification), last(stages, Benchmark)
    verified, timed, pairs, stale = {}, [], [], []
    if verification:
        at, same = verification[0], _unchanged(stages, verification[0])
        verified = {name: file for name, file in verification[1].files.items() if same(name)}
        stale += [_stale(stages[at], name) for name in verification[1].files if not same(name)]
    if benchmark:
        at, same = benchmark[0], _unchanged(stages, benchmark[0])
        timed = [row for row in benchmark[1].rows if same(row.file)]
        pairs = [pair for pair in benchmark[1].pairs if same(pair.baseline) and same(pair.candidate)]
        names = dict.fromkeys(row.file for row in benchmark[1].rows)
        stale += [_stale(stages[at], name) for name in names if not same(name)]

    exports = _exports(stages) or {row.file: (len(stages), _as_timed(row)) for row in timed}
    found: list[dict[str, Any]] = []
    for name, (at, file) in exports.items():
        own = [row for row in timed if row.file == name]
        entry = _file(name, file, verified.get(name), *_made_from(file.kind, stages[:at], parent))
        found += [entry | {"runtime": row.runtime, "timing": timing_of(row)} for row in own] or [entry]
    found = [entry | _against_parent(entry, found, parent, pairs) for entry in found]
    order = {kind: place for place, kind in enumerate(KINDS)}
    found.sort(key=lambda file: (order.get(file["kind"], len(order)), file["runtime"] or "", file["file"]))
    return found, stale


def _as_timed(row: Timing) -> ExportedFile:
    """What a benchmark says of a file that no stage of the run exported."""
    return ExportedFile(format=Path(row.file).suffix.lstrip("."), kind=row.kind, size_bytes=row.size_bytes)


def _file(
    name: str, file: ExportedFile, verified: VerifiedFile | None, stage: str | None, network: NetworkFigures | None
) -> dict[str, Any]:
    """An exported file with its accuracy: measured on it, or else that of the torch network it was made from."""
    measured: VerifiedFile | NetworkFigures | None = None
    source = None
    if verified and verified.accuracy is not None:
        measured, source = verified, "file"
    elif network and network.accuracy is not None:
        measured, source = network, "torch"
    return {
        "file": name,
        "kind": file.kind,
        "format": file.format,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "stage": stage,
        "numbers": _numbers(file.kind, network),
        "runtime": verified.runtime if verified else None,
        "accuracy": measured and measured.accuracy,
        "accuracy_of": source,
        "images": measured and measured.images,
        "timing": None,
    }


def _numbers(kind: str, network: NetworkFigures | None) -> str | None:
    """What the kind of a file does not say of the numbers it computes in."""
    if kind in wording.KINDS:
        return f"{wording.kind(kind)}, computes in float32"
    mixed = kind == "int8" and network is not None and network.numbers != "int8"
    return network.numbers if network and mixed else None


def _against_parent(
    file: dict[str, Any], files: list[dict[str, Any]], parent: Parent | None, pairs: list[Pair]
) -> dict[str, Any]:
    """How far a file is from the parent's file, or in accuracy from the torch parent where only one was verified."""
    base = counterpart(file, files)
    if base and base["accuracy_of"] == file["accuracy_of"]:
        origin, accuracy = base["file"], base["accuracy"]
    else:
        origin, accuracy = "torch parent", parent.figures.accuracy if parent else None
    difference = minus(file["accuracy"], accuracy)
    alone = [(other["file"], other["runtime"]) for other in files].count((file["file"], file["runtime"])) == 1
    return {
        "difference": difference,
        "difference_from": None if difference is None else origin,
        "times_smaller": over(base["size_bytes"], file["size_bytes"]) if base else None,
        "pair": _pair(file, base, pairs, any_threads=alone),
    }


def _stale(stage: Stage, name: str) -> str:
    return f"{stage.manifest.folder} measured {name} before it was exported anew: its figures are left out"


def timing_of(row: Timing) -> dict[str, Any]:
    """A row's figures with its frames per second and its spread, (p90 - p50) / p50."""
    timing = row.model_dump(mode="json", exclude={"file", "kind", "runtime", "size_bytes", "sha256"})
    timing["fps"] = 1000 / row.p50_ms
    timing["spread"] = None if row.p90_ms is None else (row.p90_ms - row.p50_ms) / row.p50_ms
    return timing


def counterpart(file: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The parent's file to compare with: the same format, and where both were timed the same runtime and threads."""
    same = [other for other in files if other["kind"] == "parent" and other["format"] == file["format"]]
    timed = [other for other in same if session(other) == session(file)]
    return next(iter(timed or same), None)


def session(file: dict[str, Any]) -> tuple[Any, ...] | None:
    return file["timing"] and (file["runtime"], file["timing"]["threads"])


def _pair(
    file: dict[str, Any], base: dict[str, Any] | None, pairs: list[Pair], *, any_threads: bool
) -> dict[str, Any] | None:
    """The speed-up over the parent: measured in turns, or else the ratio of the medians, which has no interval.

    A pair that does not name its threads counts only where `any_threads` says that there is one row it can mean.
    """
    if file["kind"] == "parent" or not file["timing"] or not base or session(base) != session(file):
        return None
    wanted = (file["file"], base["file"], file["runtime"])
    threads = {file["timing"]["threads"], None} if any_threads else {file["timing"]["threads"]}
    for pair in pairs:
        if (pair.candidate, pair.baseline, pair.runtime) == wanted and pair.threads in threads:
            return pair.model_dump(mode="json", exclude={"candidate", "runtime", "threads"}) | {"by": "turns"}
    return {
        "baseline": base["file"],
        "speedup": base["timing"]["p50_ms"] / file["timing"]["p50_ms"],
        "interval": None,
        "aa_ratio": None,
        "verdict": None,
        "by": "ratio of medians",
    }


def best_of(files: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The file the headline speaks of, and the parent's file beside it.

    The most compressed kind, in the runtime where it is fastest; without a benchmark, one whose accuracy was measured.
    """
    kinds = [kind for kind in reversed(KINDS) if any(file["kind"] == kind for file in files)]
    if not kinds:
        return None, None
    best = min(
        (file for file in files if file["kind"] == kinds[0]),
        key=lambda file: (file["timing"]["p50_ms"] if file["timing"] else math.inf, file["accuracy_of"] != "file"),
    )
    return best, counterpart(best, files)


def minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def over(value: float | None, other: float | None) -> float | None:
    return None if not value or not other else value / other
