"""Services that follow a run from outside: they hear its events, and cannot change or stop it.

To add one: a file whose `open_tracker(folder, name, recipe)` gives a `Tracker`, its name in `TrackerName`, one test.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from compress.errors import CompressError
from compress.progress import Progress, Several
from compress.shown import without_secrets


class TrackerName(StrEnum):
    """Each is the name of a file here."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


class Tracker(Protocol):
    """What a service is told of a run."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """An event of `compress.progress`, with its facts."""
        ...

    def close(self, error: str | None) -> None:
        """The run is over, for this time; `error` says what ended it early."""
        ...


@dataclass
class Follower:
    """Progress that a tracker sees, until its first failure: then a note says so, and the run goes on without it."""

    name: str
    tracker: Tracker
    complain: Callable[[str], None]
    failed: bool = field(default=False, init=False)

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: None

    def note(self, text: str) -> None:
        pass

    def event(self, kind: str, **facts: Any) -> None:
        self._try(lambda: self.tracker.event(kind, without_secrets(facts)))

    def close(self, error: str | None) -> None:
        self._try(lambda: self.tracker.close(without_secrets(error)))

    def _try(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as failure:
            self.failed = True
            self.complain(_gone(self.name, failure))


@contextlib.contextmanager
def following(
    names: Sequence[TrackerName], folder: Path, name: str, recipe: Mapping[str, Any], progress: Progress
) -> Iterator[Progress]:
    """`progress`, with the trackers of those names as listeners to the run called `name` in `folder`.

    Raises CompressError for a tracker whose package is missing; nothing else that a tracker does ends the run.
    """
    followers: list[Follower] = []
    for chosen in dict.fromkeys(names):
        opened = importlib.import_module(f"compress.tracking.{chosen}").open_tracker
        try:
            followers.append(Follower(chosen, opened(folder, name, without_secrets(dict(recipe))), progress.note))
        except CompressError:
            raise
        except Exception as failure:
            progress.note(_gone(chosen, failure))
    error: str | None = None
    try:
        yield Several([progress, *followers]) if followers else progress
    except BaseException as raised:
        error = "stopped" if isinstance(raised, KeyboardInterrupt) else str(raised)
        raise
    finally:
        for follower in followers:
            follower.close(error)


def _gone(name: str, failure: Exception) -> str:
    said = " ".join(str(failure).split())[:300]
    return f"{name} failed ({type(failure).__name__}: {said}); the run goes on without it"


def series(facts: Mapping[str, Any]) -> str:
    """Where the figures of an event belong: `01-train`, `03-distill/assistant 1`, `no_distillation/03-train`."""
    stage, training = str(facts.get("stage") or ""), str(facts.get("training") or "")
    parts = [str(facts.get("of") or ""), stage, "" if training == stage.partition("-")[2] else training]
    return "/".join(part for part in parts if part)


def figures(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Those of the facts that are numbers, in the order of `names`."""
    found = {name: facts[name] for name in names if name in facts}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


EPOCH = ("loss", "lr", "seconds", "images_per_second", "accuracy")
STAGE = ("accuracy", "params", "macs", "seconds")
"""Figures of the events `epoch` and `stage_finished`."""
