"""Ctrl-C that is heard at once.

Python hears a signal between two steps of its own. One step may be the backward pass of a large batch, or an exporter
at work on a whole network, and take many seconds. A thread waits beside it, and where Python has not heard the signal
in time it ends the process, as SIGKILL would: a run goes on after that too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from compress import locks

PATIENCE_S = 0.5
_heard = threading.Event()


def heard() -> None:
    """Called by the signals' handler: from here on the process ends by itself, and in order."""
    _heard.set()


def watch(say: Callable[[], None]) -> None:
    """Ends the process where a signal is not heard; `say` is called before. For the main thread of a program."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except ValueError:  # another thread than the first
        return
    threading.Thread(target=_wait, args=(reader, say), name="stopping", daemon=True).start()


def leave(status: int) -> NoReturn:
    """Ends a process that has been left in order: Python would free its memory first, for seconds."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def _wait(reader: int, say: Callable[[], None]) -> None:
    while number := os.read(reader, 1):
        ours = getattr(signal.getsignal(number[0]), "__module__", None) == "compress.cli"
        if ours and not _heard.wait(PATIENCE_S):
            with contextlib.suppress(Exception):
                say()
            _end_children()
            locks.give_back()
            os._exit(128 + number[0])


def _end_children() -> None:
    for tasks in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in tasks.read_text().split():
                os.kill(int(pid), signal.SIGTERM)
