"""Times of the run's file and of its controls', always in turns on the recipe's target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import manifest
from compress.models import file_sha256
from compress.pipeline.compared import OURS, Compared, Shipped
from compress.pipeline.fold import CONTROLS_FOLDER, Fold
from compress.pipeline.notes import Prefixed
from compress.targets import Comparison, Machine, asking, open_target
from compress.written import read_json, write_json

SEARCH_ROUNDS = 3


def ratio(machine: Machine, shipped: Shipped, candidate: Path) -> float:
    """The candidate's time over the shipped file's, measured in turns."""
    measuring = replace(shipped.measuring, rounds=min(SEARCH_ROUNDS, shipped.measuring.rounds))
    files = {f"{OURS}/{shipped.name}": shipped.path, f"control/{shipped.name}": candidate}
    (pair,) = asking.compare(machine, files, measuring).pairs
    return float(1 / pair["speedup"])


def timed_together(run: Fold, shipped: Shipped, compared: list[Compared]) -> dict[str, Any]:
    """All networks' files in one session, in turns with the run's own; networks of one shape are timed once."""
    files: dict[str, Path] = {f"{OURS}/{shipped.name}": shipped.path}
    of: dict[str, str] = {}
    shapes: dict[str, str] = {}
    parent = f"parent.{shipped.format}"
    for one in compared:
        for fold in one.folds:
            place = fold.refs["files"].get(shipped.name)
            if place is None:
                continue
            label = f"{fold.folder.name if fold is not run else OURS}/{shipped.name}"
            known = shapes.setdefault(shapes_of(fold), label)
            of[label] = known
            files.setdefault(known, fold.folder / place)
    if parent in run.refs["files"]:
        files[f"parent/{parent}"] = run.folder / run.refs["files"][parent]
    path = run.folder / CONTROLS_FOLDER / "times.json"
    machine_facts = run.what_measures()
    key = manifest.key(
        {name: file_sha256(file) for name, file in files.items()}, shipped.measuring.words, machine_facts
    )
    kept = read_json(path)
    if kept.get("key") == key:
        run.notes.shown.note("controls: the times are those of an earlier call, of the same files on the same machine")
        return kept | {"of": of}
    path.parent.mkdir(parents=True, exist_ok=True)
    told = Prefixed("controls: ", run.notes.shown)
    if len(files) < 2:
        return {"key": key, "rows": [], "pairs": [], "conditions": {}, "of": of}
    with (
        open_target(run.recipe.target, told, setup=run.setup, runtimes=(shipped.runtime,)) as machine,  # type: ignore[arg-type]
        told.steps("benchmark", len(shipped.measuring.slots(files))) as advance,
    ):
        found: Comparison = asking.compare(
            machine, files, shipped.measuring, journal=path.with_suffix(".jsonl"), on_process=advance, on_note=told.note
        )
    times = {"key": key, "rows": found.rows, "pairs": found.pairs, "conditions": found.conditions, "of": of}
    write_json(path, times)
    return times


def shapes_of(fold: Fold) -> str:
    """Equal for networks that differ in weights alone: precision, size of images, and every layer's shape."""
    found = read_json(fold.folder / Path(fold.refs["network"]).parent / manifest.NAME)["network"]
    shapes = [(one["name"], one["inputs"], one["outputs"], one["groups"]) for one in found["layers"]]
    return repr((found["precision"], fold.recipe.preprocess.size, shapes))
