"""TensorBoard: event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.extras import need
from compress.tracking import EPOCH, STAGE, figures, series


@dataclass
class TensorBoard:
    """Curves of losses, learning rates and throughput over epochs; figures of finished stages over their numbers."""

    writer: Any

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        place = series(facts)
        if kind == "epoch":
            self._scalars(f"{place}/", figures(facts, EPOCH), facts["epoch"])
        elif kind in ("stage_finished", "stage_resumed"):
            self._scalars("stages/", figures(facts, STAGE), _number(facts["stage"]), of=facts.get("of"))
            self._scalars(f"{place}/size_bytes/", dict(facts.get("files", {})), 0)
        self.writer.flush()

    def close(self, error: str | None) -> None:
        if error is not None:
            self.writer.add_text("ended by", error)
        self.writer.close()

    def _scalars(self, prefix: str, values: Mapping[str, float], step: int, *, of: str | None = None) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{of}/{prefix}{name}" if of else f"{prefix}{name}", value, step)


def _number(stage: str) -> int:
    """3 of `03-distill`."""
    digits = stage.partition("-")[0]
    return int(digits) if digits.isdigit() else 0


def open_tracker(folder: Path, name: str, recipe: Mapping[str, Any]) -> TensorBoard:
    """Appends to the run's event files. Raises CompressError where the package is missing."""
    need("tensorboard", "tensorboard", "--track tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoard(SummaryWriter(str(folder / "tensorboard")))
