"""What is compared: one file of the run, and one of each control, each with all its seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import manifest
from compress.errors import CompressError, ModelError
from compress.pipeline import equal
from compress.pipeline.fold import Fold
from compress.stages.benchmark import Benchmark
from compress.stages.export import KINDS
from compress.targets import Measuring
from compress.targets.agent import SUFFIXES
from compress.written import read_json

OURS = "ours"


@dataclass(frozen=True)
class Shipped:
    """The file that is compared, and how it is timed."""

    name: str
    """`int8.onnx`"""
    path: Path
    runtime: str
    measuring: Measuring

    @property
    def format(self) -> str:
        return Path(self.name).suffix[1:]

    @property
    def kind(self) -> str:
        return Path(self.name).stem


@dataclass
class Compared:
    """One control, or the run's own network, with all its seeds."""

    name: str
    left_out: str = ""
    """Why there is no such control."""
    setting: dict[str, float] = field(default_factory=dict)
    """What the search found: `macs`, a share, or `size`, in pixels."""
    search: list[equal.Tried] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Why a training of it did not come to its end, or whose files differ."""


def shipped_file(run: Fold) -> Shipped:
    """The run's most compressed file, in the runtime in which it was fastest, or else the first."""
    stage = next((s for s in reversed(run.recipe.stages) if isinstance(s, Benchmark)), Benchmark(use="benchmark"))
    options = stage.model_dump(exclude={"use", "cores", "accuracy_images", "sustained_minutes"})
    cores = stage.cores if isinstance(stage.cores, str) else ",".join(map(str, stage.cores))
    files: dict[str, str] = run.refs["files"]
    for kind in reversed(KINDS):
        own = {SUFFIXES[Path(name).suffix]: name for name in files if Path(name).stem == kind}
        readable = [runtime for runtime in stage.runtimes if runtime in own]
        if not readable:
            continue
        rows = {row["runtime"]: row["p50_ms"] for row in _timed(run.folder) if row["file"] in own.values()}
        runtime = min(readable, key=lambda name: rows.get(name, float("inf")))
        measuring = Measuring(**(options | {"runtimes": (runtime,)}), cores=cores, seed=run.recipe.seed)
        return Shipped(own[runtime], run.folder / files[own[runtime]], runtime, measuring)
    raise ModelError("report.controls", "no exported file is of a kind that is timed", "export onnx or tflite")


def _timed(folder: Path) -> list[dict[str, Any]]:
    """The rows of the run's last benchmark."""
    labels = [label for label in read_json(folder / "run.json").get("stages", []) if label.endswith("-benchmark")]
    found = read_json(folder / "stages" / labels[-1] / manifest.NAME) if labels else {}
    rows: list[dict[str, Any]] = found.get("metrics", {}).get("rows", [])
    return rows


def figure(fold: Fold, name: str, role: str = "network") -> int:
    """Of a network of the fold's product: `macs`, `params`."""
    found: int = read_json(fold.folder / Path(fold.refs[role]).parent / manifest.NAME)["network"][name]
    return found


def stage_number(network: str) -> int:
    """Of the stage that left it: `stages/01-train/network`."""
    return int(Path(network).parent.name.partition("-")[0])


def one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(str(one["msg"]) for one in error.errors())
    if isinstance(error, CompressError):
        return "; ".join(filter(None, (str(error.problem), str(error.way_out))))
    return " ".join(str(error).split())
