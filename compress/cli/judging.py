"""`compress gate` and `compare`: a run against a baseline, or another run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from compress.cli.console import RunFolder, messages, output, say, show_rows, warn
from compress.progress import RichProgress
from compress.shown import without_secrets


def gate(
    folder: RunFolder,
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
    command = without_secrets(shlex.join(["compress", *sys.argv[1:]]))
    if summary is not None:
        summary.write_text(gates.markdown(judgement, command), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(gates.as_json(judgement, command), indent=1) + "\n", encoding="utf-8")
    show_rows(gates.rows(judgement))
    for line in [*gates.reasons(judgement), *gates.conditions(judgement), gates.headline(judgement)]:
        say(line)
    raise typer.Exit(judgement.exit_status)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder or a baseline's JSON.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, which is held against the first.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything compared as JSON.")] = False,
) -> None:
    """Show what two runs, or a baseline and a run, differ in."""
    from compress import gate as gates

    first, second = gates.read(a), gates.read(b)
    if as_json:
        print(json.dumps(gates.comparison_json(first, second), indent=1))
    elif markdown:
        say(gates.comparison_markdown(first, second))
    else:
        show_rows(gates.comparison_rows(first, second))
        for note in gates.comparison_notes(first, second):
            warn("note", note)
