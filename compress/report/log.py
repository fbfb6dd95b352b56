"""What a run's log says of its end, for a run that came to none: which stage ran, how far, and what stopped it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.progress import read_log as lines_of
from compress.report.parts import Epoch


@dataclass
class Log:
    running: str | None = None
    """The stage that had begun and not ended."""
    epochs: list[Epoch] = field(default_factory=list)
    """Of that stage's last training."""
    ended: str = ""
    """What stopped the run; "" where nothing told: it was killed, or it runs."""
    when: str | None = None
    """Of the last line."""
    key: Any = None
    """Of that stage: with the same one it goes on where it was."""


def read_log(path: Path) -> Log:
    """Empty where there is no log; lines that say something else than the log's own are passed over."""
    found = Log()
    with contextlib.suppress(OSError):
        for line in lines_of(path):
            _take(found, line)
    return found


def _take(found: Log, line: Mapping[str, Any]) -> None:
    kind, stage = line.get("event"), line.get("stage")
    facts = line.get("facts") if isinstance(line.get("facts"), Mapping) else {}
    assert isinstance(facts, Mapping)
    if "of" in facts or not isinstance(stage, (str, type(None))):  # a control's
        return
    found.when = line["time"] if isinstance(line.get("time"), str) else found.when
    if kind == "run_started":
        found.ended = ""
    elif kind == "stage_started":
        if stage != found.running or facts.get("key") != found.key:
            found.epochs = []
        found.running, found.key = stage, facts.get("key")
    elif kind in ("stage_finished", "stage_resumed"):
        found.running, found.epochs = None, []
    elif kind == "epoch":
        with contextlib.suppress(ValidationError):
            epoch = Epoch.model_validate(dict(facts))
            # A run that goes on repeats what it had not kept; another training of the stage begins at one.
            found.epochs = [one for one in found.epochs if one.epoch < epoch.epoch] + [epoch]
    elif kind == "error":
        found.ended = str(facts.get("text", "an error"))
    elif kind == "signal":
        found.ended = f"stopped by {facts.get('name', 'a signal')}"
    elif kind == "run_paused":
        found.ended = f"paused after {facts.get('after', 'a stage')}, as asked"
