"""`compress verify`, `bench` and `clean`: what files compute and how fast, and what that leaves on boards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.console import Setup, messages, say, show_rows, show_table
from compress.errors import CompressError, GateError
from compress.progress import RichProgress


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
    """Compare what files compute, and which layers differ.

    With each other, with their network, layer by layer.
    """
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
            show_table(rows.columns, rows.rows, rows.title)
        for line in headline(found):
            say(line)
    if not found.passed:
        raise GateError("verify", found.reason)


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
    """Time files on a machine, in turns.

    One fresh process after the other; on an emulated machine, instructions are counted.
    """
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
        show_rows(rows)
    for line in found.lines:
        say(line)


def clean(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A board as ssh://user@host[:port].")],
) -> None:
    """Remove from a board what measuring has left there.

    Models, results, the environment that --setup made.
    """
    from compress.targets.ssh import Ssh, parse

    parse(target)
    with Ssh(target, progress=RichProgress(messages)) as board:
        freed = board.remove()
    say(f"{target}: {freed / 1e6:.1f} MB removed")
