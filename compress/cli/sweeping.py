"""`compress sweep`: a matrix of recipes on several workers."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from compress.cli.console import Overrides, RecipePath, Setup, output, say, show_rows, warn
from compress.errors import CompressError
from compress.shown import without_secrets


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="KEY=A,B,C", help="A setting and its values; again for more."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each combination, with seeds counted from the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; default sweeps/<name of the recipe>.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; they share the cores. Default: one for each core, or GPU.")
    ] = None,
    engine: Annotated[str, typer.Option(metavar="auto|ray|joblib", help="auto: Ray where it is installed.")] = "auto",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster that runs, or auto to look for it.")] = None,
    setup: Setup = False,
) -> None:
    """Run a recipe with every combination of settings.

    Goes on where it stopped; shows which results nothing else beats.
    """
    from compress.sweep import Asked, cells, failures, rows, run_sweep, said_of_best, statements
    from compress.sweep.display import shown

    matrix = cells(recipe, parameters or [], overrides or [], seeds)
    folder = out or Path("sweeps") / matrix[0].recipe.name
    what = f"{len(matrix)} runs of {recipe} -> {folder}"
    output.print(f"[bold]{escape(folder.name)}[/bold]: {escape(what)}", highlight=False)
    began = time.perf_counter()
    asked = Asked(
        recipe=recipe,
        cells=matrix,
        folder=folder,
        command=shlex.join(without_secrets(["compress", *sys.argv[1:]])),
        base=Path.cwd(),
        workers=workers,
        engine=engine,
        address=address,
        setup=setup,
    )
    with shown(output) as show:
        swept = run_sweep(asked, show)
    show_rows(rows(swept.groups))
    say(said_of_best(swept.groups))
    for statement in statements(swept.groups):
        say(statement)
    for name, error in failures(swept.groups):
        warn("failed", f"{name}: {error}")
    say(f"{time.perf_counter() - began:.0f} s   report: {folder / 'sweep.html'}")
    if swept.failed:
        way_out = "the lines above say why; the same command tries them again"
        raise CompressError(folder, f"{len(swept.failed)} of {len(matrix)} runs failed", way_out)
