"""What a worker of a sweep does: one step of one cell, with a log in the cell's folder and a word on how it goes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.progress import RichProgress
from compress.shown import one_line, without_secrets
from compress.written import read_json, write_json

LOG = "log.txt"
EVERY_S = 0.5
"""Between two words on how it goes."""
GRACE_S = 3.0
"""For workers that were asked to end, before they are killed."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What tells libraries how many threads a worker has."""


@dataclass(frozen=True)
class Task:
    """A step, as it travels to a worker."""

    number: int
    """Of the step."""
    cell: str
    recipe: str
    """JSON."""
    folder: str
    base: str
    """Where relative paths of the recipe start."""
    store: str
    """Folder of the stages that the cells share."""
    status: str
    """File for a word on how it goes."""
    until: int | None
    command: str
    """What runs the cell alone."""
    threads: int
    setup: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    error: str = ""
    """One line; empty where nothing went wrong."""
    ran: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    """Stages that were finished already, here or in another cell."""
    seconds: float = 0.0


def work(task: Task) -> Ended:
    """Runs the step in this process, which works on nothing else; a mistake is returned, not raised."""
    began = time.perf_counter()
    with contextlib.suppress(ValueError):  # in another thread than the first, where signals do not arrive
        signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(task.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _logged(folder / LOG), _told(Path(task.status)) as tell:
            try:
                return _worked(task, folder, tell, began)
            except OSError:
                raise
            except Exception as fault:  # ours: one run less, and the others go on
                print(without_secrets(traceback.format_exc()))
                return Ended(f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}; see {folder / LOG}")
    except OSError as error:  # a full disk, a folder that may not be written
        return Ended(f"{error.filename or task.folder}: {error.strerror or error}")


def _worked(task: Task, folder: Path, tell: Callable[[dict[str, Any]], None], began: float) -> Ended:
    import torch
    from rich.console import Console

    from compress import pipeline
    from compress.recipe import Recipe
    from compress.report import write_report

    torch.set_num_threads(task.threads)
    os.chdir(task.base)  # the folder whose modules a factory may name
    progress = _Told(RichProgress(Console(file=sys.stdout, width=140)), tell)
    recipe = Recipe.model_validate_json(task.recipe)
    error = ""
    ran: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    try:
        outcome = pipeline.run_recipe(
            recipe,
            folder,
            progress,
            command=task.command,
            base=Path(task.base),
            setup=task.setup,
            until=task.until,
            store=Path(task.store),
        )
        ran, taken = tuple(outcome.ran), tuple(outcome.resumed)
    except CompressError as mistake:
        error = str(mistake)
        print(error)
    if task.until is None:
        with contextlib.suppress(CompressError):  # nothing finished: the cell's line says why
            write_report(folder)
    return Ended(error, ran, taken, time.perf_counter() - began)


@dataclass
class _Told:
    """Progress that is shown, and told to the sweep."""

    shown: RichProgress
    tell: Callable[[dict[str, Any]], None]
    label: str = field(default="", init=False)

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        done = 0
        self.tell({"doing": label, "done": 0, "total": total, "said": ""})
        with self.shown.steps(one_line(label), total) as shown:

            def advance(said: str) -> None:
                nonlocal done
                done += 1
                self.tell({"doing": label, "done": done, "total": total, "said": said})
                shown(one_line(said))

            yield advance

    def note(self, text: str) -> None:
        self.shown.note(one_line(text))

    def event(self, kind: str, **facts: Any) -> None:
        pass


@contextlib.contextmanager
def _told(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes a word on how it goes to `path`, now and then; the file is gone at the end."""
    last = 0.0
    path.parent.mkdir(parents=True, exist_ok=True)

    def tell(words: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now
            write_json(path, {"pid": os.getpid(), **words})

    tell({"doing": "begins", "done": 0, "total": 0, "said": ""})
    try:
        yield tell
    finally:
        path.unlink(missing_ok=True)


def heard(path: Path) -> dict[str, Any]:
    """The last word of a worker; empty where there is none."""
    return read_json(path)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Sends what this process and its libraries print to the end of `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def _interrupt(number: int, _: object) -> None:
    """Ends the step as Ctrl-C ends a run: everything is left in order, and what was begun is ended."""
    RichProgress.interrupted = number
    raise KeyboardInterrupt
