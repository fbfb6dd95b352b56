"""Long work on a terminal, in a log, and as events that programs read.

Work reports to a `Progress`: bars and notes are for people, events for programs. `RUN/log.jsonl` holds both as lines of
JSON; docs/following.md tells its fields.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from compress.errors import CompressError
from compress.shown import without_secrets

LOG = "log.jsonl"
"""A run's log, in its folder."""
LEVELS = {"error": "error", "signal": "warning"}
"""Of events; all others are `info`."""


class Progress(Protocol):
    """Where long work shows itself."""

    def steps(self, label: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar of `total` steps; the callable advances it by one and shows a short text such as `loss 0.31`."""
        ...

    def note(self, text: str) -> None:
        """One sentence the user should read; the pipeline keeps it in the stage's manifest too."""
        ...

    def event(self, kind: str, **facts: Any) -> None:
        """Something that programs follow: `epoch`, `stage_started`, ... with JSON values; people see nothing of it."""
        ...


class RichProgress:
    """A live bar on a terminal; one line per finished piece of work everywhere."""

    interrupted = 0
    """The signal that asked to stop."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        began, last = time.perf_counter(), ""
        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[said]}"), TimeElapsedColumn(), TimeRemainingColumn()]
        live = self.console.is_terminal
        with Bars(*columns, console=self.console, transient=True, disable=not live) as bars:
            task = bars.add_task(escape(label), total=total, said="")

            def advance(said: str) -> None:
                nonlocal last
                stop_if_asked()
                last = said
                bars.update(task, advance=1, said=escape(said))

            yield advance
        line = f"  {label}   {last}   {time.perf_counter() - began:.1f} s"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"  note: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def event(self, kind: str, **facts: Any) -> None:
        pass


class Silent:
    """Progress that nobody sees: of torchrun's other processes, and in tests."""

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: stop_if_asked()

    def note(self, text: str) -> None:
        pass

    def event(self, kind: str, **facts: Any) -> None:
        pass


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt where a signal asked to stop and Python dropped its exception on the way."""
    if RichProgress.interrupted:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Several:
    """Progress that several see, in their order."""

    shown: Sequence[Progress]

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        with contextlib.ExitStack() as stack:
            advances = [stack.enter_context(progress.steps(label, total)) for progress in self.shown]

            def advance(said: str) -> None:
                for each in advances:
                    each(said)

            yield advance

    def note(self, text: str) -> None:
        for progress in self.shown:
            progress.note(text)

    def event(self, kind: str, **facts: Any) -> None:
        for progress in self.shown:
            progress.event(kind, **facts)


@dataclass
class JsonLines:
    """Progress as lines of JSON, given to `write` one by one: time, level, event, stage, facts."""

    write: Callable[[str], None]
    stage: str | None = field(default=None, init=False)
    """The folder of the stage that runs."""

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        began, last = time.perf_counter(), ""

        def advance(said: str) -> None:
            nonlocal last
            stop_if_asked()
            last = said

        yield advance
        self.event("work", label=label, steps=total, said=last, seconds=round(time.perf_counter() - began, 3))

    def note(self, text: str) -> None:
        self.event("note", text=text)

    def event(self, kind: str, **facts: Any) -> None:
        if kind in ("stage_started", "stage_resumed"):
            self.stage = facts.get("stage")
        stage = facts.pop("stage", self.stage)
        time_utc = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        level = LEVELS.get(kind, "info")
        line = {"time": time_utc, "level": level, "event": kind, "stage": stage, "facts": _plain(facts)}
        said = json.dumps(without_secrets(line), ensure_ascii=False, allow_nan=False)
        self.write(said.encode(errors="backslashreplace").decode())  # names of files may be no UTF-8
        if kind in ("stage_finished", "stage_resumed"):
            self.stage = None


@dataclass
class LogFile:
    """Appends lines to a file, each as one write: a kill cuts the last line at most, and the next begins a new one.

    Where the file cannot be written, `complain` hears it once and the lines are dropped: a log is not worth a run.
    Lines wait until the file's folder exists.
    """

    path: Path
    complain: Callable[[str], None]
    waiting: list[str] = field(default_factory=list, init=False)
    descriptor: int | None = field(default=None, init=False)
    broken: bool = field(default=False, init=False)

    def write(self, line: str) -> None:
        if self.broken:
            return
        self.waiting.append(line)
        try:
            if self.descriptor is None and self.path.parent.is_dir():
                self.descriptor = self._open()
            while self.descriptor is not None and self.waiting:
                os.write(self.descriptor, f"{self.waiting.pop(0)}\n".encode())
        except OSError as error:
            self.broken = True
            self.complain(f"{self.path}: cannot be written ({error.strerror}); the run goes on without its log")

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def _open(self) -> int:
        cut = _is_cut(self.path)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if cut:
            os.write(descriptor, b"\n")
        return descriptor


def _is_cut(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # none, or an empty one
        return False


@contextlib.contextmanager
def logged(path: Path, progress: Progress, rank: int = 0) -> Iterator[Progress]:
    """`progress`, whose notes and events the file keeps too: also the error or the signal that ends the work.

    Of torchrun's processes only the first one speaks.
    """
    if rank != 0:
        yield Silent()
        return
    log = LogFile(path, progress.note)
    both = Several([progress, JsonLines(log.write)])
    try:
        yield both
    except CompressError as error:
        both.event("error", text=str(error), place=error.place, problem=error.problem, way_out=error.way_out)
        raise
    except KeyboardInterrupt:
        both.event("signal", name=signal.Signals(RichProgress.interrupted or signal.SIGINT).name)
        raise
    except Exception as error:
        both.event("error", text=f"{type(error).__name__}: {error}")
        raise
    finally:
        log.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log, oldest first; those that a kill cut short are left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def _plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become texts, paths too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
