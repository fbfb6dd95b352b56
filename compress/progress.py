"""Long work on a terminal, and in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress(Protocol):
    """Where long work shows itself."""

    def steps(self, label: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar of `total` steps; the callable advances it by one and shows a short text such as `loss 0.31`."""
        ...

    def note(self, text: str) -> None:
        """One sentence the user should read; the pipeline keeps it in the stage's manifest too."""
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
                if self.interrupted:
                    raise KeyboardInterrupt
                last = said
                bars.update(task, advance=1, said=escape(said))

            yield advance
        line = f"  {label}   {last}   {time.perf_counter() - began:.1f} s"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"  note: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


class Silent:
    """Progress that nobody sees: of torchrun's other processes, and in tests."""

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: None

    def note(self, text: str) -> None:
        pass
