"""Simpler networks that are as fast as the run's own and were trained as long: made, timed together, judged.

    runs/<name>/controls/uniform_width/            a run's folder like any other
    runs/<name>/controls/uniform_width-2/          the same from the same parent, another seed
    runs/<name>/controls/ours-2/                   the run's own recipe, another seed
    runs/<name>/controls/search/uniform_width.json what was measured while its width was looked for
    runs/<name>/controls/times.json                all files, timed in turns in one session

What came of it stands in run.json under `equal_latency`; docs/controls.md describes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import processes
from compress import recipe as recipes
from compress.errors import CompressError, ModelError
from compress.pipeline import equal
from compress.pipeline.compared import OURS, Compared, Shipped, figure, one_line, shipped_file, stage_number
from compress.pipeline.fold import Fold
from compress.pipeline.judged import record, verdicts
from compress.pipeline.notes import Prefixed
from compress.pipeline.quick import data_for, searched
from compress.pipeline.timed import timed_together
from compress.progress import Progress
from compress.recipe.control import (
    Control,
    again,
    lower_resolution,
    mac_pruning,
    ptq_only,
    random_criterion,
    uniform_width,
    without_distillation,
)
from compress.recipe.controlled import CONTROLS, ControlName, Controls, worded
from compress.stages.prune import Prune
from compress.written import read_json

SEED_STEP = 1_000_000
"""Between the seeds of two trainings; within one, stages are 1000 apart."""
NARROWEST = 0.01
"""Share of multiply-adds below which no width is looked for."""
SMALLEST = 8

Go = Callable[[Fold], Any]
"""Takes a fold past every stage."""


def run_controls(run: Fold, go: Go) -> list[str]:
    """Makes the controls that the recipe of a finished run asks for; what went wrong with one, a line each.

    Every network, and every measurement on the way to it, is kept: another call goes on.
    """
    asked = run.recipe.report.asked
    assert asked is not None
    shipped = processes.shared(lambda: shipped_file(run))
    record(run, asked, shipped, [], None)
    ours = Compared(OURS, folds=[run])
    all_compared = [ours]
    wanted = [name for name in CONTROLS if name in (asked.which or CONTROLS)]
    for name in wanted:
        compared = Compared(name)
        compared.left_out = recipes.unsuited(name, [stage.model_dump(mode="json") for stage in run.recipe.stages])
        all_compared.append(compared)
        if compared.left_out:
            continue
        told = Prefixed(f"control {worded(name)}: ", run.notes.shown)
        try:
            control = _settled(name, run, asked, shipped, compared, told)
        except (ModelError, ValidationError) as error:
            compared.left_out = one_line(error)
            told.note(f"left out: {compared.left_out}")
            continue
        _train(compared, control, run, go, asked.seeds)
    if asked.seeds > 1:
        _train(ours, again(run.recipe), run, go, asked.seeds, first=1)
    times = processes.shared(lambda: timed_together(run, shipped, all_compared))
    record(run, asked, shipped, all_compared, times)
    for line in verdicts(read_json(run.folder / "run.json").get("equal_latency", {})) if run.rank == 0 else []:
        run.notes.shown.note(line)
    return [f"{worded(one.name)}: {line}" for one in all_compared for line in one.failed]


def _settled(
    name: ControlName, run: Fold, asked: Controls, shipped: Shipped, compared: Compared, told: Progress
) -> Control:
    """The control's recipe; what it is free in is found by measuring. Raises ModelError where there is none."""
    recipe = run.recipe
    if name == "ptq_only":
        return ptq_only(recipe)
    if name == "no_distillation":
        return without_distillation(recipe)
    by_macs = all("macs" in stage.goal.model_dump() for stage in recipe.stages if isinstance(stage, Prune))
    if name == "random_criterion" and not by_macs:  # its goal is a time already
        return random_criterion(recipe, None)
    shrink = {"uniform_width": uniform_width, "mac_pruning": mac_pruning, "random_criterion": random_criterion}
    if name in shrink:
        make: Callable[[float], Control] = partial(shrink[name], recipe)
        reached = figure(run, "macs") / figure(run, "macs", "parent")
        limits = {"start": reached, "low": NARROWEST, "high": 1 - 1e-6, "power": 1.3}
        setting, whole = "macs", False
    else:
        parent = run.refs["parent"]
        where = _from(run.base, run.folder / parent)
        number = stage_number(parent)
        size = recipe.preprocess.size
        make = lambda at: lower_resolution(recipe, round(at), where, number)  # noqa: E731
        first = _first_size(run, size)
        limits = {"start": first, "low": min(SMALLEST, size), "high": size - 1, "power": 0.5}
        setting, whole = "size", True
        if size - 1 < SMALLEST:
            raise ModelError("report.controls", f"images of {size} pixels leave no smaller ones", "")
    found = processes.shared(lambda: searched(name, make, limits, whole, run, asked, shipped, told))
    best = equal.nearest(found)
    if best is None:
        raise ModelError("report.controls", "no setting of it gives a network that can be exported", "")
    compared.search = found
    compared.setting = {setting: round(best.at) if whole else best.at}
    return make(best.at)


def _first_size(run: Fold, size: int) -> int:
    """Where to begin: multiply-adds grow with the area."""
    share = figure(run, "macs") / figure(run, "macs", "parent")
    return max(SMALLEST, min(size - 1, round(size * share**0.5)))


def _train(compared: Compared, control: Control, run: Fold, go: Go, seeds: int, first: int = 0) -> None:
    """Runs the control once for each seed; what fails is kept, and the others go on."""
    for seed in range(first, seeds):
        name = compared.name if seed == 0 else f"{compared.name}-{seed + 1}"
        words = worded(compared.name) + (f", seed {seed + 1}" if seeds > 1 else "")
        prefix = f"{words}: " if compared.name == OURS else f"control {words}: "
        seeds_from = (stage_number(run.refs["parent"]) + 1, seed * SEED_STEP)
        fold = run.beside(control, name, prefix, data=data_for(control.recipe, run), reseeded=seeds_from)
        try:
            go(fold)
        except ModelError as error:
            compared.failed.append(one_line(error))
            if not compared.folds:  # what cannot be trained once cannot be trained again
                return
            continue
        except CompressError as error:
            compared.failed.append(one_line(error))
            continue
        if fold.failed:
            compared.failed.append(": ".join(fold.failed[:2]))
            fold.notes.note(compared.failed[-1])
        compared.folds.append(fold)


def _from(base: Path, folder: Path) -> str:
    """The folder as a recipe in `base` says it."""
    folder, base = folder.absolute(), base.absolute()
    return folder.relative_to(base).as_posix() if folder.is_relative_to(base) else str(folder)
