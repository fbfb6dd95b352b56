"""Folds the recipe's stages over a product, and keeps a manifest of each in the run's folder.

    runs/<name>/recipe.yaml  run.json  report.html ...
    runs/<name>/stages/00-load/      the network as it came: manifest.json, network/
    runs/<name>/stages/01-train/     one folder per stage, complete or absent
    runs/<name>/stages/02-distill.training/   what the trainings of a stage that is not complete have reached
    runs/<name>/controls/no_distillation/   another such folder: the run without teachers, if the recipe asks for it
    runs/<name>/controls/uniform_width/ ... and those of simpler networks that are as fast: see `controls`

A manifest's `key` hashes all that can change the stage's result: its settings, what the stages before it made, data,
seed, our code and the libraries. A stage whose key and files are still those of its manifest is not run again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import manifest, processes
from compress import recipe as recipes
from compress.allocator import memory_kept
from compress.data import open_data
from compress.errors import CompressError, GateError
from compress.pipeline.controls import run_controls
from compress.pipeline.facts import facts_of, now
from compress.pipeline.faults import own_folder
from compress.pipeline.fold import Fold, load_product
from compress.pipeline.notes import Notes
from compress.pipeline.preflight import opened_data
from compress.product import Data, Product
from compress.progress import LOG, Progress, logged
from compress.recipe import Recipe
from compress.recipe.control import NO_DISTILLATION, without_distillation
from compress.stages.benchmark import MEASURING
from compress.written import read_json, refuse_pipes, write_text

STARTED = ("name", "command", "recipe_hash", "compress", "python", "cpu", "device", "threads", "processes", "seed")
"""What the log says of a run as it begins; the rest is in `run.json`."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves."""

    folder: Path
    ran: list[str]
    resumed: list[str]
    control: Outcome | None = None
    """The same without distillation, where the recipe asks for it."""


def run_recipe(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    command: str,
    base: Path,
    device: torch.device | None = None,
    setup: bool = False,
    until: int | None = None,
    store: Path | None = None,
) -> Outcome:
    """Runs every stage that is not already in `folder`, in order.

    Relative paths of the recipe start at `base`; `setup` allows an environment of ours on a board. After the stage
    whose number is `until` the run pauses, and goes on from there another time. Runs with the same `store` share the
    stages that they have finished; nobody is to remove it meanwhile.
    Raises CompressError, at once where another process runs in `folder`; a stage that fails leaves no result behind,
    the stages before it stay, and its trainings go on from their last epoch next time. A stage whose verdict is FAIL is
    kept for the report, ends the run with a GateError, and runs again next time. A control that cannot be finished is a
    GateError as well: the run itself is complete.
    """
    with memory_kept(), contextlib.ExitStack() as stack:
        rank, world_size = stack.enter_context(processes.joined())
        processes.shared(lambda: stack.enter_context(own_folder(folder, progress)))
        shown = stack.enter_context(logged(folder / LOG, progress, rank))
        notes = Notes(shown)
        recipe = recipes.resolved(recipe, base)
        fold = Fold(
            recipe=recipe,
            folder=folder,
            data=opened_data(recipe, folder, notes, base),
            device=device or processes.own_device(),
            notes=notes,
            rank=rank,
            world_size=world_size,
            base=base,
            setup=setup,
            store=store,
        )
        fold.ask_network()
        outcome = _run_stages(fold, command, until)
        if fold.failed:
            raise GateError(*fold.failed)
        # A pause is made before what is timed; the control is not.
        timed = all(stage.use == "benchmark" for stage in recipe.stages[until:]) if until is not None else True
        if recipe.report.ablate_distillation and timed:
            outcome = replace(outcome, control=_without_distillation(fold, command))
        if recipe.report.asked and timed:
            wrong = run_controls(fold, lambda control: _run_stages(control, command))
            if wrong:
                raise GateError("report.controls", "; ".join(wrong), "the run itself is complete; run it again")
        return outcome


def _run_stages(fold: Fold, command: str, until: int | None = None) -> Outcome:
    """Takes the product past every stage; the fold knows whether one of them failed."""
    folder, recipe = fold.folder, fold.recipe
    processes.shared(lambda: _make(folder))
    processes.shared(lambda: refuse_pipes(folder))
    facts = facts_of(fold, command)
    fold.record(facts)
    processes.shared(lambda: write_text(folder / "recipe.yaml", recipes.dump(recipe, masked=True)))
    fold.notes.event("run_started", pid=os.getpid(), base=fold.base, **{name: facts[name] for name in STARTED})
    ran: list[str] = []
    resumed: list[str] = []
    for index, stage in enumerate((None, *recipe.stages)):
        label = f"{fold.number(index):02d}-{stage.use if stage else 'load'}"
        (resumed if fold.step(index, stage, label) else ran).append(label)
        fold.record(facts | {"stages": sorted([*ran, *resumed])})
        if fold.failed:
            break
        if index == until and until < len(recipe.stages):
            fold.notes.event("run_paused", after=label, ran=ran, resumed=resumed)
            return Outcome(folder, ran, resumed)
    # A control is named only now: the one in the folder may be of another recipe until it has been gone through again.
    controls = [NO_DISTILLATION] if recipe.report.ablate_distillation and not fold.failed else []
    ended = {"finished": now(), "seconds": fold.seconds, "stages": sorted([*ran, *resumed]), "controls": controls}
    facts |= ended
    fold.record(facts)
    processes.shared(lambda: manifest.forget_others(folder / "stages", facts["stages"]))
    if not fold.failed:  # nothing is left to go on with
        processes.shared(lambda: shutil.rmtree(folder / MEASURING, ignore_errors=True))
    fold.notes.event("run_finished", seconds=fold.seconds, ran=ran, resumed=resumed, passed=not fold.failed)
    return Outcome(folder, ran, resumed)


def _without_distillation(run: Fold, command: str) -> Outcome:
    """The same recipe without teachers, in a folder of its own. What does not differ is copied from the run's."""
    control = without_distillation(run.recipe)
    fold = run.beside(control, NO_DISTILLATION, "control: ")
    try:
        outcome = _run_stages(fold, command)
    except CompressError as error:
        raise GateError(f"control {NO_DISTILLATION}: {error.place}", error.problem, error.way_out) from error
    if fold.failed:  # of files that nobody ships: the run's own passed
        fold.notes.note(": ".join(fold.failed[:2]))
    return outcome


def open_run(folder: Path, progress: Progress, base: Path) -> tuple[Recipe, Product, Data]:
    """Recipe, last product and data of a run's folder. Raises CompressError where nothing was exported."""
    refuse_pipes(folder)
    facts = read_json(folder / "run.json")
    try:
        return _opened(folder, facts, progress, base)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = f"its files do not say what they should ({type(error).__name__}: {error})"
        raise CompressError(folder, problem, "run its recipe again") from error


def _opened(folder: Path, facts: dict[str, Any], progress: Progress, base: Path) -> tuple[Recipe, Product, Data]:
    places = (folder / "stages" / name for name in sorted(facts.get("stages", [])))
    finished = [found for place in places if (found := manifest.read(place))]
    if not finished:
        raise CompressError(folder, "not a run with a finished stage", "give the folder that `compress run` wrote")
    refs = finished[-1]["product"]
    if not refs["files"]:
        raise CompressError(folder, "has no exported files", "add `export` to the recipe's stages")
    loaded = recipes.load(folder / "recipe.yaml", [])
    data = open_data(loaded.data, loaded.preprocess, progress, base, facts["data"]["fingerprint"])
    return loaded, load_product(folder, refs), data


def _make(folder: Path) -> None:
    try:
        (folder / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(folder, f"cannot be made ({error.strerror})", "choose another folder with --out") from error
