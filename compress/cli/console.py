"""What commands write to: results on stdout, progress and messages on stderr; and the arguments they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from compress.cli.completing import recipe_files, run_folders, settings_of_recipe
from compress.shown import visible, without_secrets

WIDE = None if sys.stdout.isatty() else 140
"""Columns of tables in logs and pipes; a terminal says its own."""


class Shown(Console):
    """A console without secrets, on which names of files and classes cannot act as a terminal's commands."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(without_secrets(segment.text)), segment.style)


output, messages = Shown(width=WIDE), Shown(stderr=True)

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, such as recipes/mobilenetv2_arm.yaml.", autocompletion=recipe_files
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to it: seed=1 stages.train.epochs=3",
        autocompletion=settings_of_recipe,
    ),
]
Setup = Annotated[
    bool,
    typer.Option(help="Let a board have a virtual environment with numpy and a runtime, in a folder of its own."),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run's folder, such as runs/mobilenetv2_arm.", autocompletion=run_folders),
]


def speaks() -> bool:
    """False in all but the first of torchrun's processes."""
    return os.environ.get("RANK", "0") == "0"


def say_stopped() -> None:
    """Says that the command was stopped, and where the next one begins."""
    resumable = sys.argv[1:2] in (["run"], ["sweep"])
    goes_on = "; the same command goes on from the last finished epoch" if resumable else ""
    if speaks():
        messages.print(f"stopped{goes_on}", style="red", highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Prints a line as it is: no markup, no colours of numbers, no folding."""
    output.print(line, highlight=False, markup=False, soft_wrap=True)


def say_at_once(line: str) -> None:
    """Prints a line for a program that follows, which must not wait until a buffer is full."""
    print(line, flush=True)


def warn(kind: str, text: str) -> None:
    """Prints `kind: text` in yellow."""
    output.print(f"{kind}: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def show_rows(rows: Sequence[Mapping[str, str]], title: str | None = None) -> None:
    """A table of rows with equal keys, its header; nothing where there are none."""
    if rows:
        show_table(list(rows[0]), [list(row.values()) for row in rows], title)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table with its header, and a title above it."""
    table = Table(*columns, title=title and escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    output.print(table)
