"""`compress run`, `check`, `schema` and `doctor`: what takes a recipe."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from compress.cli import stopping
from compress.cli.console import (
    Overrides,
    RecipePath,
    Setup,
    messages,
    output,
    say,
    say_at_once,
    say_stopped,
    show_rows,
    speaks,
    warn,
)
from compress.cli.reports import show_summary
from compress.errors import CompressError, GateError
from compress.progress import LOG, JsonLines, Progress, RichProgress, Silent, logged
from compress.shown import without_secrets
from compress.tracking import TrackerName, following


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/<name of the recipe>.")] = None,
    setup: Setup = False,
    track: Annotated[
        list[TrackerName] | None, typer.Option(help="Follow the run there, too; again for both. Needs the extra.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the report's path at the end, and nothing before.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print lines of JSON, those of RUN/log.jsonl, instead of text.")
    ] = False,
) -> None:
    """Run a recipe, or go on with it where it stopped.

    Stages that are done and unchanged are not run again.
    """
    if quiet and as_json:
        raise typer.BadParameter("give one of --quiet and --json")
    stopping.watch(say_stopped)
    from compress import pipeline
    from compress import recipe as recipes
    from compress.report import write_report

    loaded = recipes.load(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    first, people = speaks(), not (quiet or as_json)
    progress: Progress = Silent()
    if first and as_json:
        progress = JsonLines(say_at_once)
    elif first and people:
        progress = RichProgress(output)
        output.print(f"[bold]{escape(loaded.name)}[/bold]: {escape(str(recipe))} -> {escape(str(folder))}")
        for note in recipes.notes(loaded):
            progress.note(note)
    began = time.perf_counter()
    command = shlex.join(without_secrets(["compress", *sys.argv[1:]]))  # a quoted one is not known any more
    failure: CompressError | None = None
    asked, settings = (track or []) if first else [], loaded.model_dump(mode="json")
    with following(asked, folder, loaded.name, settings, progress) as followed:
        try:
            pipeline.run_recipe(loaded, folder, followed, command=command, base=Path.cwd(), setup=setup)
        except GateError as error:  # the report shows what failed
            failure = error
        if first:
            path = write_report(folder)
            with logged(folder / LOG, followed) as told:
                told.event("report", path=str(path), seconds=time.perf_counter() - began)
    if not first:
        raise typer.Exit(1 if failure else 0)
    if people:
        show_summary(folder)
        seconds = time.perf_counter() - began
        output.print(f"{seconds:.0f} s   report: [bold]{escape(str(path))}[/bold]", soft_wrap=True)
    elif quiet:
        say(str(path))
    if failure is not None:
        raise failure


def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Say what a recipe would run, and every mistake in it."""
    from compress import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])
    say(f"{recipe}: no mistakes found")
    say(f"  preprocess: {recipes.preprocess_line(loaded)}")
    for line in recipes.describe(loaded):
        say(f"  {line}")
    for note in recipes.notes(loaded):
        warn("note", note)


def schema() -> None:
    """Print the JSON schema of recipes, for an editor."""
    from compress import recipe as recipes

    print(json.dumps(recipes.schema(), indent=1))


def doctor(
    subject: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe, or package.module:factory for a network without one.")
    ],
    overrides: Overrides = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the image, for a factory.")] = 224,
    classes: Annotated[
        int | None, typer.Option(min=2, help="Outputs, for a factory; default: those its network has.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time single layers and rewritten activations on this machine.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as JSON.")] = False,
) -> None:
    """Say what int8 will do to a network before it is trained.

    Exit status 1 if it cannot be quantized or exported.
    """
    from compress import doctor as doctors

    progress = RichProgress(messages)
    if ":" in subject and not Path(subject).exists():
        if overrides:
            raise CompressError("doctor", f"{overrides[0]} changes a recipe", "a factory takes --size and --classes")
        examined = doctors.from_factory(subject, progress, size=size, classes=classes)
    else:
        examined = doctors.from_recipe(Path(subject), overrides or [], progress, base=Path.cwd())
    diagnosis = doctors.examine_subject(examined, progress, measure=measure)
    if as_json:
        print(json.dumps(doctors.as_json(diagnosis), indent=1))
    else:
        for section in doctors.sections(diagnosis):
            output.print(f"\n[bold]{escape(section.title)}[/bold]")
            show_rows(section.rows)
            for line in section.lines:
                output.print(line, highlight=False, markup=False)
    if not diagnosis.ok:
        raise typer.Exit(1)
