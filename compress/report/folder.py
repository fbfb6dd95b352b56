"""A run's folder, read: `run.json`, `recipe.yaml` and one `manifest.json` per finished stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from compress.errors import CompressError
from compress.progress import LOG
from compress.report.log import Log, read_log
from compress.report.parts import METRICS, Manifest, Metrics, Part, RunDescription, Training
from compress.written import refuse_pipes

NO_DISTILLATION = "no_distillation"
"""The control that was trained like the run, but without teachers."""


class RunFolderError(CompressError):
    """A folder that cannot be reported on: no run, nothing finished yet, or a file that does not say what it should."""


@dataclass(frozen=True)
class Stage:
    """A manifest with the metrics of its stage read."""

    manifest: Manifest
    metrics: Metrics


@dataclass(frozen=True)
class RunFolder:
    run: RunDescription
    stages: list[Stage]
    unfinished: list[str]
    """Stages that the run names and that left no manifest."""
    recipe: str | None
    """The resolved recipe's text."""
    log: Log
    planned: list[str]
    """Stages that the recipe names and that have not ended."""
    undistilled: RunFolder | None = None
    """The same without teachers, as far as it got; None where it was not asked for or left nothing."""


def read_folder(path: Path) -> RunFolder:
    """The run in `path`. Raises RunFolderError, in one line, with the file and the field that is wrong."""
    if not (path / "run.json").is_file():
        raise RunFolderError(path, "not a run folder: it has no run.json", "give the folder that `compress run` wrote")
    refuse_pipes(path)
    run = _read(path / "run.json", RunDescription)
    folders = run.stages
    if folders is None:
        folders = sorted(manifest.parent.name for manifest in path.glob("stages/*/manifest.json"))
    manifests = {name: path / "stages" / name / "manifest.json" for name in folders}
    if not manifests:
        raise RunFolderError(
            path, "no stage of this run has ended", "run its recipe again: it goes on where it stopped"
        )
    stages = [_stage(manifest) for manifest in manifests.values() if manifest.is_file()]
    if not stages:
        raise RunFolderError(path, "none of its stages left a manifest", "run its recipe again")
    recipe = path / "recipe.yaml"
    return RunFolder(
        run=run,
        stages=stages,
        unfinished=[name for name, manifest in manifests.items() if not manifest.is_file()],
        recipe=_text(recipe) if recipe.is_file() else None,
        log=read_log(path / LOG),
        planned=_planned(recipe, [stage.manifest.stage for stage in stages]),
        undistilled=_control(path / "controls" / NO_DISTILLATION) if NO_DISTILLATION in run.controls else None,
    )


def _planned(recipe: Path, ended: list[str]) -> list[str]:
    """Of a resolved recipe, which a killed run may have left in any state; `ended` are the stages by their use."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages = YAML(typ="safe", pure=True).load(recipe.read_text(encoding="utf-8"))["stages"]
        uses = [str(stage["use"]) for stage in stages]
    except (OSError, ValueError, TypeError, LookupError, RecursionError, YAMLError):
        return []
    # Counted, not compared by number: the control without teachers leaves numbers out.
    return [
        f"{number:02d}-{use}" for number, use in enumerate(uses, start=1) if uses[:number].count(use) > ended.count(use)
    ]


def _control(path: Path) -> RunFolder | None:
    """None for a control that was stopped before its first stage ended."""
    begun = (path / "run.json").is_file() and _read(path / "run.json", RunDescription).stages
    return read_folder(path) if begun else None


def _stage(path: Path) -> Stage:
    manifest = _read(path, Manifest)
    metrics = _check(path, METRICS.get(manifest.stage, Training), manifest.metrics, prefix="metrics.")
    return Stage(manifest=manifest, metrics=metrics)


_Part = TypeVar("_Part", bound=Part)


def _read(path: Path, kind: type[_Part]) -> _Part:
    try:
        # A number that JSON does not know (NaN, Infinity) stays a word and fails where a number is wanted.
        content = json.loads(_text(path), parse_constant=str)
    except json.JSONDecodeError as error:
        raise RunFolderError(path, f"not JSON: {error.msg} in line {error.lineno}", "run its recipe again") from error
    return _check(path, kind, content)


def _check(path: Path, kind: type[_Part], content: Any, prefix: str = "") -> _Part:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = prefix + ".".join(map(str, first["loc"]))
        raise RunFolderError(path, f"{place or 'the file'}: {first['msg']}", "run its recipe again") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(path, f"cannot be read: {error}") from error
