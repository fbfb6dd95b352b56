"""Runs the cells of a sweep on the workers of an engine, survives their deaths, and writes what came of it.

sweeps/<name>/macs=0.25_seed=0/     a run's folder for each cell: `compress run`, `report` and `show` read it
sweeps/<name>/shared/               finished stages by their keys, from which cells take what another has computed
sweeps/<name>/sweep.json  sweep.md  sweep.html
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from compress import __version__
from compress.errors import CompressError
from compress.locks import held
from compress.recipe.words import plain
from compress.shown import without_secrets
from compress.sweep.cell import LOG, Ended, Task, heard, work
from compress.sweep.joblib_engine import Joblib
from compress.sweep.matrix import Cell
from compress.sweep.page import as_html, as_markdown
from compress.sweep.ray_engine import Ray
from compress.sweep.results import Group, Result, Status, as_json, figures, grouped
from compress.sweep.steps import Step, steps
from compress.written import write_json, write_text

FORMAT = 1
"""Of sweep.json; goes up when a field changes its meaning."""
RETRIES = 2
"""How often a step begins again after its worker was lost."""
REFRESH_S = 0.25
STORE, STATUS, LOCK = "shared", "working", "lock"
ENGINES = ("auto", "ray", "joblib")


class Engine(Protocol):
    """Worker processes. Those that die lose their own task and no other."""

    name: str
    workers: int
    threads: int

    @property
    def version(self) -> str: ...

    def has_room(self) -> bool: ...

    def submit(self, task: Task) -> None: ...

    def ended(self, timeout_s: float) -> list[tuple[Task, Ended | None]]: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Asked:
    """What `compress sweep` was asked for."""

    recipe: Path
    cells: Sequence[Cell]
    folder: Path
    command: str
    base: Path
    workers: int | None = None
    """None: one for each core, or for each GPU."""
    engine: str = "auto"
    address: str | None = None
    """Of a Ray cluster that runs."""
    setup: bool = False


@dataclass
class Watched:
    """How a sweep goes, for whoever shows it."""

    cells: int
    workers: int
    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Cells that ended, and the line that says why."""
    working: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Cells at work, and the last word of each: `doing`, `done`, `total`, `said`, `pid`."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves."""

    folder: Path
    groups: Sequence[Group]

    @property
    def failed(self) -> list[Result]:
        return [result for group in self.groups for result in group.cells if result.status == "failed"]


def run_sweep(asked: Asked, show: Callable[[Watched], None] = lambda watched: None) -> Swept:
    """Runs what is not finished yet of every cell and writes the sweep's tables, also when it is stopped in between.

    A cell that fails is recorded and the others go on. Raises CompressError for what concerns them all: a folder that
    another sweep works in, an engine that is not installed.
    """
    folder = asked.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(folder, f"cannot be made ({error.strerror})", "choose another folder with --out") from error
    with held(folder / LOCK, place=folder, way_out="wait for it, or choose another folder with --out"):
        workers, threads = shares(asked.workers, len(asked.cells))
        engine = opened(asked.engine, workers, threads, asked.address)
        sweep = _Sweep(asked, engine, show)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            sweep.run()
        finally:
            try:
                engine.stop()
            finally:
                groups = _write(sweep, began)
    return Swept(folder, groups)


def shares(workers: int | None, cells: int) -> tuple[int, int]:
    """(workers, threads of each): together no more threads than there are cores, and at least one each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        workers = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else cores
    workers = max(1, min(workers, cells))
    return workers, max(1, cores // workers)


def opened(name: str, workers: int, threads: int, address: str | None) -> Engine:
    """The engine by its name; `auto` is Ray where that is installed, else joblib. Raises CompressError."""
    if name not in ENGINES:
        raise CompressError(f"--engine {plain(name)}", "no such engine", f"take one of {', '.join(ENGINES)}")
    if name == "joblib" and address is not None:
        raise CompressError(f"--address {plain(address)}", "belongs to Ray", "leave it out, or take --engine ray")
    if name == "ray" or address is not None or (name == "auto" and importlib.util.find_spec("ray")):
        return Ray(work, workers, threads, address)
    return Joblib(work, workers, threads)


@dataclass
class _Sweep:
    """A sweep in progress: which steps are over, which may begin."""

    asked: Asked
    engine: Engine
    show: Callable[[Watched], None]
    steps: list[Step] = field(init=False)
    watched: Watched = field(init=False)
    waiting: list[int] = field(init=False)
    working: set[int] = field(default_factory=set, init=False)
    over: set[int] = field(default_factory=set, init=False)
    lost: dict[int, int] = field(default_factory=dict, init=False)
    """How often the worker of a step was lost."""
    errors: dict[int, str] = field(default_factory=dict, init=False)
    """By cell."""

    def __post_init__(self) -> None:
        self.steps = steps([cell.recipe for cell in self.asked.cells])
        self.waiting = list(range(len(self.steps)))
        self.watched = Watched(len(self.asked.cells), self.engine.workers)

    def run(self) -> None:
        while self.waiting or self.working:
            self._submit()
            for task, ended in self.engine.ended(REFRESH_S):
                self._take(task.number, ended)
            names = {number: self._cell(number).name for number in sorted(self.working)}
            self.watched.working = {name: heard(self._status(number)) for number, name in names.items()}
            self.show(self.watched)

    def _submit(self) -> None:
        """Whatever may begin, in the order of the tree; a step that is timed only when nothing else works or waits."""
        for number in list(self.waiting):
            step = self.steps[number]
            if not self.engine.has_room() or (step.after is not None and step.after not in self.over):
                continue
            if step.alone and (self.working or any(not self.steps[other].alone for other in self.waiting)):
                break
            self.waiting.remove(number)
            self.working.add(number)
            self.engine.submit(self._task(number))

    def _task(self, number: int) -> Task:
        step, asked, cell = self.steps[number], self.asked, self._cell(number)
        folder = asked.folder / cell.name
        words = without_secrets(["compress", "run", str(asked.recipe), *cell.overrides, "--out", str(folder)])
        return Task(
            number=number,
            cell=cell.name,
            recipe=cell.recipe.model_dump_json(),
            folder=str(folder.absolute()),
            base=str(asked.base.absolute()),
            store=str((asked.folder / STORE).absolute()),
            status=str(self._status(number).absolute()),
            until=step.until,
            command=shlex.join(words),
            threads=self.engine.threads,
            setup=asked.setup,
            alone=step.alone,
        )

    def _take(self, number: int, ended: Ended | None) -> None:
        """What a step came to: over, begun again because its worker is lost, or failed with all that waits for it."""
        self.working.discard(number)
        step, name = self.steps[number], self._cell(number).name
        if ended is None:
            self.lost[number] = self.lost.get(number, 0) + 1
            doing = str(heard(self._status(number)).get("doing", "")).strip()
            what = "its worker was killed" + (f" in {doing}" if doing else "")
            if self.lost[number] <= RETRIES:
                self.watched.notes.append(f"{name}: {what}; it goes on from its last finished epoch")
                self.waiting.insert(0, number)
                return
            log = self.asked.folder / name / LOG
            ended = Ended(f"{what}, {self.lost[number]} times by now; out of memory? try fewer --workers; see {log}")
        self._status(number).unlink(missing_ok=True)
        self.over.add(number)
        if ended.error:
            self._fail(number, ended.error)
        elif step.until is None:
            self.watched.finished.append(name)

    def _fail(self, number: int, error: str) -> None:
        """The step's cell failed, and every cell that was to take what the step computes."""
        first, name = self.steps[number].cell, self._cell(number).name
        fallen = {number}
        self._record(first, error)
        for other in range(number + 1, len(self.steps)):
            step = self.steps[other]
            if step.after in fallen:
                fallen.add(other)
                if step.cell != first:
                    self._record(step.cell, f"it begins with what {name} failed in")
        self.waiting = [other for other in self.waiting if other not in fallen]

    def _record(self, cell: int, error: str) -> None:
        if cell not in self.errors:
            self.errors[cell] = error
            self.watched.failed[self.asked.cells[cell].name] = error

    def _cell(self, number: int) -> Cell:
        return self.asked.cells[self.steps[number].cell]

    def _status(self, number: int) -> Path:
        return self.asked.folder / STATUS / f"{number}.json"


def _write(sweep: _Sweep, began: str) -> list[Group]:
    """The sweep's figures as JSON, Markdown and a page; the groups they are of."""
    asked, watched = sweep.asked, sweep.watched
    for path in (asked.folder / STATUS).glob("*.json"):
        path.unlink()
    results = []
    for number, cell in enumerate(asked.cells):
        status: Status = "not finished"
        if cell.name in watched.finished:
            status = "finished"
        elif number in sweep.errors:
            status = "failed"
        done = figures(asked.folder / cell.name) if status == "finished" else None
        result = Result(cell, status, error=without_secrets(sweep.errors.get(number, "")))
        results.append(result if done is None else replace(result, figures=done))
    groups = grouped(results)
    facts: dict[str, Any] = without_secrets(
        {
            "format": FORMAT,
            "name": asked.folder.name,
            "recipe": asked.recipe.as_posix(),
            "command": asked.command,
            "compress": __version__,
            "started": began,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "engine": {
                "name": sweep.engine.name,
                "version": sweep.engine.version,
                "workers": sweep.engine.workers,
                "threads": sweep.engine.threads,
            },
            "notes": watched.notes,
        }
        | as_json(groups, asked.folder)
    )
    write_json(asked.folder / "sweep.json", facts)
    write_text(asked.folder / "sweep.md", as_markdown(facts, groups))
    write_text(asked.folder / "sweep.html", as_html(facts, groups))
    return groups
