"""`compress report`, and what every run ends with."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from compress.cli.console import RunFolder, output, say, show_rows, warn


def report(
    folder: RunFolder,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a run's report again, from what its folder holds."""
    from compress.report import write_report

    path = write_report(folder)
    show_summary(folder)
    output.print(f"report: [bold]{escape(str(path))}[/bold]", soft_wrap=True)
    if show:
        _open(path)


def index(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Runs' folders, or folders of them, such as runs.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the page.")] = Path("index.html"),
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write one page over many runs.

    Their figures in a table that sorts, with links to their reports.
    """
    from compress.report import write_index

    path = write_index(runs, out)
    output.print(f"index: [bold]{escape(str(path))}[/bold]", soft_wrap=True)
    if show:
        _open(path)


def _open(path: Path) -> None:
    """In the user's browser; where there is none, for instance over ssh, a note says what to do."""
    import webbrowser

    shown = False
    with contextlib.suppress(webbrowser.Error, OSError):
        # Text browsers take over the terminal: `webbrowser` finds them where there is no display.
        shown = _has_display() and webbrowser.open(path.resolve().as_uri())
    if not shown:
        warn("note", f"no browser can be opened here: open {path.resolve()} where there is one")


def _has_display() -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def show_summary(folder: Path) -> None:
    from compress.report import summary_rows

    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = summary_rows(data)
    if not rows:
        return
    show_rows(rows)
    if data["machine"] and data["machine"]["statement"] not in data["warnings"]:
        say(data["machine"]["statement"])
    for warning in data["warnings"]:
        warn("warning", warning)
