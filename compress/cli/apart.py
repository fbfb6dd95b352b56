"""Commands that open files of strangers in their own process: a runtime that crashes over one becomes a clear line.

onnxruntime and LiteRT are written in C++. A hostile or damaged file may end the process that opens it, and no exception
is ever seen.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from compress.errors import CompressError, RecipeError

CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
TASKS = Path("/proc/self/task")
PATIENCE_S = 0.7
"""From Ctrl-C to the end of a child that does not listen."""


def apart(command: Callable[..., None]) -> Callable[..., None]:
    """The command, done by a child process. What it raises is raised here; a crash is a CompressError."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        if not _may_fork():
            command(**arguments)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _work(command, arguments, writing)
        os.close(writing)
        said, ended = _wait(child, reading)
        if ended < 0 and signal.Signals(-ended) in CRASHES:
            problem = f"the runtime that reads it crashed ({signal.Signals(-ended).name})"
            raise CompressError(_files(arguments), problem, "the file is damaged or hostile: export it again")
        if ended < 0:
            problem = f"the process that reads it was ended by {signal.Signals(-ended).name}"
            raise CompressError(_files(arguments), problem, "is there enough memory? run it again")
        _raise(json.loads(said) if said else {}, ended)

    return guarded


def _may_fork() -> bool:
    """In a program of its own, that is, and while no other thread could hold a lock."""
    threads = len(list(TASKS.iterdir())) if TASKS.is_dir() else 0
    return threads == 1 and sys.stdout is sys.__stdout__


def _work(command: Callable[..., None], arguments: dict[str, Any], writing: int) -> NoReturn:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent, which passes it on: once
    told: dict[str, Any] = {}
    status = 0
    try:
        command(**arguments)
    except typer.Exit as ended:
        status = ended.exit_code
    except RecipeError as error:
        told, status = {"lines": error.lines}, 1
    except CompressError as error:
        told, status = {"place": error.place, "problem": error.problem, "way_out": error.way_out}, 1
    except OSError as error:
        told, status = {"errno": error.errno, "strerror": error.strerror, "filename": error.filename}, 1
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        show = getattr(error, "format_message", None)  # a wrong option
        if show is None:
            traceback.print_exc()
        told, status = ({} if show is None else {"usage": show()}), 1
    finally:
        os.write(writing, json.dumps(told, default=str).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, reading: int) -> tuple[bytes, int]:
    """What the child says of its end, and its exit status, or minus the signal that ended it."""
    try:
        with os.fdopen(reading, "rb") as stream:
            said = stream.read()
        return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # Ctrl-C, the end of the terminal
        os.kill(child, signal.SIGINT)
        until = time.monotonic() + PATIENCE_S
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > until:  # a runtime in the middle of a long computation hears no signal
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        raise


def _raise(told: dict[str, Any], status: int) -> None:
    if "lines" in told:
        raise RecipeError(told["lines"])
    if "place" in told:
        raise CompressError(told["place"], told["problem"], told["way_out"])
    if "errno" in told:
        raise OSError(told["errno"], told["strerror"], told["filename"])
    if "usage" in told:
        raise typer.BadParameter(told["usage"])
    if status:
        raise typer.Exit(status)


def _files(arguments: dict[str, Any]) -> str:
    """The files and folders that the command was given."""
    given = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return ", ".join(str(value) for values in given for value in values if isinstance(value, Path))
