"""How a sweep goes, on a terminal: a live line for each worker and one for all; elsewhere a line for each run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from compress.sweep.sweep import Watched

WIDTH = 20
"""Of a bar, in characters."""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Watched], None]]:
    """What shows a sweep each time it is called; what has ended stays as a line."""
    said: set[str] = set()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(watched: Watched) -> None:
            for line in ended(watched):
                if line not in said:
                    said.add(line)
                    console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
            if console.is_terminal:
                texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines(watched)]
                live.update(Group(*texts), refresh=True)

        yield show


def ended(watched: Watched) -> list[str]:
    """A line for each run that has ended, and each note."""
    failed = [f"{name}   failed: {error}" for name, error in watched.failed.items()]
    return [f"note: {note}" for note in watched.notes] + [f"{name}   finished" for name in watched.finished] + failed


def lines(watched: Watched) -> list[str]:
    """A line for each worker, and one for all."""
    over = len(watched.finished) + len(watched.failed)
    failed = f", {len(watched.failed)} failed" if watched.failed else ""
    found = [f"{bar(over, watched.cells)} {over} of {watched.cells} runs{failed}"]
    found += [f"  {name}   {_doing(word)}" for name, word in watched.working.items()]
    return found + ["  idle"] * (watched.workers - len(watched.working))


def _doing(word: Mapping[str, Any]) -> str:
    if not word:
        return "begins"
    total, done = int(word.get("total", 0)), int(word.get("done", 0))
    parts = [str(word.get("doing", "")).strip(), bar(done, total) if total else "", str(word.get("said", ""))]
    return "   ".join(part for part in parts if part)


def bar(done: int, total: int) -> str:
    """`━━━━━━──────────────`"""
    full = round(WIDTH * min(done, total) / total) if total else 0
    return "━" * full + "─" * (WIDTH - full)
