"""The command line: `compress run`, `check`, `schema`, `doctor`, `verify`, `bench`, `report`, `gate`, ...

Heavy libraries are imported by the command that needs them: `--help` and a board's `bench` do without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.errors import CompressError, GateError
from compress.progress import RichProgress, Silent

app = typer.Typer(
    help="Shrinks a PyTorch vision network for an ARM board and proves that it did.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
WIDE = None if sys.stdout.isatty() else 140
"""Columns of tables in logs and pipes; a terminal says its own."""
output, messages = Console(width=WIDE), Console(stderr=True)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/mobilenetv2_arm.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it: seed=1 stages.train.epochs=3")
]
Setup = Annotated[
    bool,
    typer.Option(help="Let a board have a virtual environment with numpy and a runtime, in a folder of its own."),
]


def main() -> None:
    """Runs the command line; a mistake the user can mend is one clear message and exit status 1."""
    with contextlib.suppress(ValueError):  # in another thread than the first, where signals do not arrive
        signal.signal(signal.SIGINT, _interrupt)
        if "WORLD_SIZE" not in os.environ:  # torchrun ends its processes itself
            signal.signal(signal.SIGTERM, _interrupt)
            signal.signal(signal.SIGHUP, _interrupt)
    try:
        status = app(standalone_mode=False)
    except CompressError as error:
        _fail(str(error), 1)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}", 1)
    except Exception as error:
        show = getattr(error, "format_message", None)  # a wrong option or argument
        if show is None:
            raise
        _fail(show(), 2)
    if status == INTERRUPTED:  # typer has caught Ctrl-C
        goes_on = "; the same command goes on from the last finished epoch" if sys.argv[1:2] == ["run"] else ""
        _fail(f"stopped{goes_on}", 128 + RichProgress.interrupted)
    sys.exit(status or 0)


def _interrupt(number: int = signal.SIGINT, _: object = None) -> None:
    """Ctrl-C, or the end of the terminal or the machine: everything is left in order, and what was begun is ended.

    Python drops the exception where it meets a finalizer or a callback: the next step raises it again.
    """
    RichProgress.interrupted = number
    raise KeyboardInterrupt


def _fail(text: str, status: int) -> None:
    if _speaks():
        messages.print(escape(text), style="red", highlight=False, soft_wrap=True)
    sys.exit(status)


def _speaks() -> bool:
    """False in all but the first of torchrun's processes."""
    return os.environ.get("RANK", "0") == "0"


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/<name of the recipe>.")] = None,
    setup: Setup = False,
) -> None:
    """Run a recipe, or go on with it: stages that are done and unchanged are not run again."""
    from compress import pipeline
    from compress import recipe as recipes
    from compress.report import write_report

    loaded = recipes.load(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    first = _speaks()
    progress = RichProgress(output) if first else Silent()
    if first:
        output.print(f"[bold]{escape(loaded.name)}[/bold]: {escape(str(recipe))} -> {escape(str(folder))}")
        for note in recipes.notes(loaded):
            progress.note(note)
    began = time.perf_counter()
    command = shlex.join(["compress", *sys.argv[1:]])
    failure: CompressError | None = None
    try:
        pipeline.run_recipe(loaded, folder, progress, command=command, base=Path.cwd(), setup=setup)
    except GateError as error:  # the report shows what failed
        failure = error
    if not first:
        raise typer.Exit(1 if failure else 0)
    path = write_report(folder)
    _show_summary(folder)
    output.print(f"{time.perf_counter() - began:.0f} s   report: [bold]{escape(str(path))}[/bold]", soft_wrap=True)
    if failure is not None:
        raise failure


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Say what a recipe would run, and every mistake in it, without running it."""
    from compress import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])
    output.print(f"{recipe}: no mistakes found", highlight=False, markup=False, soft_wrap=True)
    for line in recipes.describe(loaded):
        output.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    for note in recipes.notes(loaded):
        output.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    from compress import recipe as recipes

    print(json.dumps(recipes.schema(), indent=1))


@app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN | FILE...", help="A run's folder, or files of one network.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="For files: a folder or zip of images, or a .npy of real-valued ones.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images at most.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    tolerance_lsb: Annotated[
        int | None, typer.Option(min=0, help="Of int8 outputs; default 1, or the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of synthetic images.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything compared as JSON instead of tables.")
    ] = False,
) -> None:
    """Compare what files compute: with each other, with their network, layer by layer."""
    from compress.verification import Tolerances, tables, verify_files
    from compress.verification.tables import headline

    progress = RichProgress(messages)
    if len(paths) == 1 and paths[0].is_dir():
        from compress import pipeline
        from compress.stages.verify import Verify

        if images is not None:
            way_out = "leave it out, or name files"
            raise CompressError("--images", "a run is verified on its own evaluation images", way_out)
        loaded, product, data = pipeline.open_run(paths[0], progress, Path.cwd())
        stage = next((s for s in reversed(loaded.stages) if isinstance(s, Verify)), Verify(use="verify"))
        changes = {"threads": threads} | ({} if tolerance_lsb is None else {"tolerance_lsb": tolerance_lsb})
        found = stage.model_copy(update=changes).verify(product, data, progress, limit)
    else:
        tolerances = Tolerances() if tolerance_lsb is None else Tolerances(lsb=tolerance_lsb)
        found = verify_files(
            paths, images=images, limit=limit, threads=threads, tolerances=tolerances, seed=seed, progress=progress
        )
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        for rows in tables(found):
            table = Table(*rows.columns, title=escape(rows.title), title_justify="left")
            for row in rows.rows:
                table.add_row(*map(escape, row))
            output.print(table)
        for line in headline(found):
            output.print(line, highlight=False, markup=False, soft_wrap=True)
    if not found.passed:
        raise GateError("verify", found.reason)


@app.command()
def bench(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help=".onnx and .tflite files; the first of each kind is the baseline."),
    ],
    target: Annotated[
        str, typer.Option(help="local, a board as ssh://user@host[:port], or emulated[:cortex-a53|a72|a76].")
    ] = "local",
    threads: Annotated[str, typer.Option(metavar="N|auto", help="auto: one per core of the fastest kind.")] = "1",
    cores: Annotated[str, typer.Option(metavar="auto|any|N,N", help="Which cores; auto: the fastest.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per file, interleaved.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Least samples of each process.")] = 50,
    min_s: Annotated[float, typer.Option(min=0, help="Least seconds of sampling of each process.")] = 0.0,
    sustain_minutes: Annotated[
        float, typer.Option(min=0, help="Instead: each file without a pause, minute after minute.")
    ] = 0.0,
    setup: Setup = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything measured as JSON instead of a table.")
    ] = False,
) -> None:
    """Time files on a machine, interleaved, one fresh process after the other; count them on an emulated one."""
    from compress import benching

    progress = RichProgress(messages)
    asked = benching.Asked(
        files=files,
        target=target,
        threads=threads,
        cores=cores,
        rounds=rounds,
        runs=runs,
        min_s=min_s,
        sustain_minutes=sustain_minutes,
        setup=setup,
    )
    found = benching.bench(asked, progress)
    if as_json:
        print(json.dumps(found.values, indent=1))
        return
    for rows in found.tables:
        _show_rows(rows)
    for line in found.lines:
        output.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def clean(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A board as ssh://user@host[:port].")],
) -> None:
    """Remove from a board what measuring has left there: models, results, the environment that --setup made."""
    from compress.targets.ssh import Ssh, parse

    parse(target)
    with Ssh(target, progress=RichProgress(messages)) as board:
        freed = board.remove()
    output.print(f"{target}: {freed / 1e6:.1f} MB removed", highlight=False, markup=False, soft_wrap=True)


@app.command()
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
    """Say what int8 will do to a network before it is trained; exit status 1 if it cannot be quantized or exported."""
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
            _show_rows(section.rows)
            for line in section.lines:
                output.print(line, highlight=False, markup=False)
    if not diagnosis.ok:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/mobilenetv2_arm.")],
) -> None:
    """Write a run's report again, from what its folder holds."""
    from compress.report import write_report

    path = write_report(folder)
    _show_summary(folder)
    output.print(f"report: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


@app.command()
def gate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/mobilenetv2_arm.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the run is judged against: a baseline's JSON.")
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: make the run the baseline, in a folder of its own.")
    ] = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:TYPE=VALUE", help="Such as accuracy:max-degradation=0.01; again for more. See docs/gate.md."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART,PART", help="Judge only these of accuracy, size, parity, latency.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the baseline's files and the run's now, in turns, on --target.")
    ] = False,
    target: Annotated[str, typer.Option(help="With --measure: local, or ssh://user@host[:port].")] = "local",
    threads: Annotated[int, typer.Option(min=1, help="With --measure.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="With --measure: fresh processes per file, in turns.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="With --measure: least samples of each process.")] = 50,
    min_s: Annotated[float, typer.Option(min=0, help="With --measure: least seconds of sampling of each.")] = 0.0,
    tolerance: Annotated[
        float, typer.Option(min=0.001, help="How far what did not change may be off before times are NOISY.")
    ] = 0.05,
    summary: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write what a job's summary shows.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was judged.")
    ] = None,
) -> None:
    """Judge a run against a baseline. Exit status: 0 ACCEPT, 3 REGRESSION, 4 INFEASIBLE, 5 NOISY; 1 for an error."""
    from compress import gate as gates

    if (baseline is None) == (write_baseline is None):
        raise typer.BadParameter("give one of --baseline FILE and --write-baseline FILE")
    progress = RichProgress(messages)
    if write_baseline is not None:
        made = gates.make_baseline(folder, write_baseline, goal or [])
        output.print(f"baseline: [bold]{escape(made.place)}[/bold], judges {', '.join(made.shipped)}", soft_wrap=True)
        return
    assert baseline is not None
    what = gates.asked(goal or [], only, tolerance)
    if measure:
        from compress.targets import Measuring, open_target

        how = Measuring(threads=threads, rounds=rounds, runs=runs, min_s=min_s, tolerance=tolerance)
        with open_target(target, progress) as machine:
            judgement = gates.gate(folder, baseline, what, machine=machine, measuring=how, progress=progress)
    else:
        judgement = gates.gate(folder, baseline, what, progress=progress)
    command = shlex.join(["compress", *sys.argv[1:]])
    if summary is not None:
        summary.write_text(gates.markdown(judgement, command), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(gates.as_json(judgement, command), indent=1) + "\n", encoding="utf-8")
    _show_rows(gates.rows(judgement))
    for line in [*gates.reasons(judgement), *gates.conditions(judgement), gates.headline(judgement)]:
        output.print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(judgement.exit_status)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder or a baseline's JSON.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, which is held against the first.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything compared as JSON.")] = False,
) -> None:
    """Show what two runs, or a baseline and a run, differ in: accuracy, times, size."""
    from compress import gate as gates

    first, second = gates.read(a), gates.read(b)
    if as_json:
        print(json.dumps(gates.comparison_json(first, second), indent=1))
    elif markdown:
        print(gates.comparison_markdown(first, second))
    else:
        _show_rows(gates.comparison_rows(first, second))
        for note in gates.comparison_notes(first, second):
            output.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _show_summary(folder: Path) -> None:
    from compress.report import summary_rows

    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = summary_rows(data)
    if not rows:
        return
    _show_rows(rows)
    if data["machine"] and data["machine"]["statement"] not in data["warnings"]:
        output.print(data["machine"]["statement"], highlight=False, markup=False)
    for warning in data["warnings"]:
        output.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def _show_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """A table of rows with equal keys, its header; nothing where there are none."""
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(escape, row.values()))
        output.print(table)


if __name__ == "__main__":
    main()
