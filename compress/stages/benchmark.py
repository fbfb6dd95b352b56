"""How fast the exported files run on the target, each against the parent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from compress.product import Product, Run
from compress.settings import Settings
from compress.stages.export import KINDS
from compress.targets import Runtime, target
from compress.targets.comparison import RUNTIMES, Comparison, compare, schedule


class Benchmark(Settings):
    use: Literal["benchmark"]
    runtimes: tuple[Runtime, ...] = Field(default=RUNTIMES, min_length=1)
    """Measured where the product has files for them."""
    threads: int = Field(default=1, ge=1)
    rounds: int = Field(default=4, ge=1)
    """Fresh processes per file, interleaved: parent, the others, parent again."""
    runs: int = Field(default=50, ge=1)
    """Least samples of each process."""
    min_s: float = Field(default=0.0, ge=0)
    """Least seconds of sampling of each process."""
    warmup_s: float = Field(default=0.2, ge=0)
    """Seconds of each process before its first sample; long enough for the clock to settle."""
    tolerance: float = Field(default=0.05, gt=0)
    """How far the parent against itself may be from 1 before a comparison is called NOISY."""

    def apply(self, product: Product, run: Run) -> Product:
        files = _in_order(product.files)
        options: dict[str, Any] = self.model_dump(exclude={"use"})
        total = len(schedule(files, runtimes=self.runtimes, rounds=self.rounds))
        with run.progress.steps("benchmark", total) as advance:
            comparison = compare(files, target=target(run.target), seed=run.seed, on_process=advance, **options)
        for note in _notes(self.runtimes, comparison):
            run.progress.note(note)
        (run.folder / "samples.json").write_text(json.dumps(comparison.samples), encoding="utf-8")
        metrics = {name: getattr(comparison, name) for name in ("conditions", "rows", "pairs")}
        return dataclasses.replace(product, metrics=metrics)


def _in_order(files: Mapping[str, Path]) -> dict[str, Path]:
    """Parent first: it is the baseline."""
    rank: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
    return {name: files[name] for name in sorted(files, key=lambda name: rank.get(Path(name).stem, len(KINDS)))}


def _notes(runtimes: tuple[Runtime, ...], comparison: Comparison) -> list[str]:
    measured = {row["runtime"] for row in comparison.rows}
    missing = [f"{runtime}: no file of its kind, not measured" for runtime in runtimes if runtime not in measured]
    noisy = [
        f"{pair['candidate']} on {pair['runtime']}: NOISY, {'; '.join(pair['reasons'])}"
        for pair in comparison.pairs
        if pair["verdict"] == "NOISY"
    ]
    return [*missing, *comparison.conditions["notes"], *noisy]
