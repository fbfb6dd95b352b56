"""What is said while a run works: shown, and kept for the manifest of the stage that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compress.progress import Progress


@dataclass
class Notes:
    """Passes notes on and keeps them for the manifest of the stage that runs."""

    shown: Progress
    kept: list[str] = field(default_factory=list)

    def steps(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        return self.shown.steps(label, total)

    def note(self, text: str) -> None:
        if text in self.kept:  # of another generation, peer or assistant
            return
        self.kept.append(text)
        self.shown.note(text)

    def event(self, kind: str, **facts: Any) -> None:
        self.shown.event(kind, **facts)


@dataclass(frozen=True)
class Prefixed:
    """Progress whose labels and notes begin with a word."""

    prefix: str
    shown: Progress

    def steps(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        return self.shown.steps(self.prefix + label, total)

    def note(self, text: str) -> None:
        self.shown.note(self.prefix + text)

    def event(self, kind: str, **facts: Any) -> None:
        self.shown.event(kind, of=self.prefix.rstrip(": "), **facts)
