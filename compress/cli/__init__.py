"""The command line: `compress run`, `check`, `schema`, `doctor`, `verify`, `bench`, `report`, `gate`, ...

One file for each group of commands; a command is a plain function there and a line below. Heavy libraries are imported
by the command that needs them: `--help` and a board's `bench` do without torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings

import typer
from rich.markup import escape
from typer.completion import completion_init

from compress.cli import (
    completing,
    judging,
    measuring,
    predicting,
    reports,
    running,
    runs,
    starting,
    stopping,
    sweeping,
)
from compress.cli.apart import apart
from compress.cli.console import messages, say_stopped, speaks
from compress.errors import CompressError, LostError
from compress.progress import RichProgress

INTERRUPTED = 130
"""What typer returns where it has caught Ctrl-C."""
app = typer.Typer(
    help="Shrinks a PyTorch vision network for an ARM board and proves that it did.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (
    starting.init,
    running.run,
    running.check,
    running.doctor,
    running.schema,
    apart(measuring.verify),
    measuring.bench,
    measuring.clean,
    predicting.latency,
    apart(judging.gate),
    judging.compare,
    sweeping.sweep,
    runs.ls,
    runs.show,
    reports.report,
    reports.index,
    completing.completion,
):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Runs the command line; a mistake the user can mend is one clear message and exit status 1."""
    with contextlib.suppress(ValueError):  # in another thread than the first, where signals do not arrive
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
    # Pillow's warning of an image that is too large to be one: data that cannot be read, not a line beside the others.
    # Its other warnings are of damage that it gets around.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("error", "Image size .* exceeds limit")
    if "_COMPRESS_COMPLETE" in os.environ:  # a shell asks
        completion_init()
    try:
        status = app(prog_name="compress", standalone_mode=False)
    except LostError as error:  # perhaps the process that speaks is the one that is lost
        _fail(str(error), 1, aloud=error.first)
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
        say_stopped()
        stopping.leave(128 + RichProgress.interrupted)
    sys.exit(status or 0)


def _interrupt(number: int = signal.SIGINT, _: object = None) -> None:
    """Ctrl-C, or the end of the terminal or the machine: everything is left in order, and what was begun is ended.

    Python drops the exception where it meets a finalizer or a callback: the next step raises it again.
    """
    if number == signal.SIGTERM and RichProgress.interrupted:  # torchrun's, which follows a Ctrl-C
        return
    RichProgress.interrupted = number
    stopping.heard()
    raise KeyboardInterrupt


def _fail(text: str, status: int, *, aloud: bool | None = None) -> None:
    if speaks() if aloud is None else aloud:
        messages.print(escape(text), style="red", highlight=False, soft_wrap=True)
    sys.exit(status)
