"""The package in a notebook: run recipes; open data and networks, prune, teach, save. Settings are those of a recipe.

from compress import api

api.run("recipes/mobilenetv2_arm.yaml", "seed=1")

data = api.data("photographs.zip", size=96)
parent = api.load("runs/mine/stages/01-train/network")
student = api.prune(parent, data, macs=0.33)
student = api.distill(student, parent, data, epochs=10, losses=[{"use": "kd", "temperature": 4.0}])
api.save(student, "student")
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from rich.console import Console

from compress import checkpoint, measures
from compress import recipe as recipes
from compress.data import DataSettings, open_data
from compress.errors import DataError, GateError, RecipeError
from compress.pipeline import run_recipe
from compress.product import Data, Network, Preprocess, Product, Run
from compress.progress import Progress, RichProgress
from compress.recipe.explain import explain
from compress.recipe.words import dotted
from compress.report import write_report
from compress.settings import Settings
from compress.stages.distill import Distill
from compress.stages.prune import Prune

S = TypeVar("S", bound=BaseModel)


class _Source(Settings):
    data: DataSettings
    preprocess: Preprocess = Preprocess()


def data(path: str | Path | None = None, *, progress: Progress | None = None, **settings: Any) -> Data:
    """Labelled images: a folder or zip with one folder per class, or another source of `data` (`use="digits"`).

    `size`, `mean`, `std` and `crop` are those of `preprocess`; the rest goes to the source. Raises RecipeError for a
    setting that is none, DataError for images that cannot be read.
    """
    preprocess = {name: settings.pop(name) for name in Preprocess.model_fields if name in settings}
    source = {"use": "folder", **settings} | ({} if path is None else {"path": str(path)})
    chosen = _checked(_Source, {"data": source, "preprocess": preprocess})
    return open_data(chosen.data, chosen.preprocess, progress or _progress(), Path.cwd())


def run(
    recipe: str | Path, *overrides: str, folder: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the recipe's run, finished and with its report; as `compress run` with the same words.

    `overrides` are `"stages.train.epochs=3"`; relative paths start at the current directory. Stages that are done and
    unchanged are not run again. Raises CompressError, GateError where a stage's verdict is FAIL.
    """
    loaded = recipes.load(Path(recipe), overrides)
    place = Path("runs") / loaded.name if folder is None else Path(folder)
    command = shlex.join(["compress", "run", str(recipe), *overrides, "--out", str(place)])
    try:
        run_recipe(loaded, place, progress or _progress(), command=command, base=Path.cwd())
    except GateError:  # the report shows what failed
        write_report(place)
        raise
    write_report(place)
    return place


def load(folder: str | Path) -> Network:
    """The network in a folder that `save` or a run wrote. Raises ModelError."""
    return checkpoint.load(Path(folder))


def save(network: Network, folder: str | Path) -> None:
    """Writes structure and weights into `folder`: JSON and safetensors, no pickle."""
    checkpoint.save(network, Path(folder))


def score(network: Network, data: Data) -> float:
    """What the task is judged by, on the evaluation split: top-1 accuracy, mean average precision, or R2; 1 is best."""
    return measures.score(network.module, data.batches("evaluation", batch_size=64), torch.device("cpu"), data.task)


def accuracy(network: Network, data: Data) -> float:
    """Top-1 accuracy in [0, 1] on the evaluation split. Raises DataError where images have no class."""
    if data.task != "classification":
        raise DataError("data", f"are for {data.task}, where there is no accuracy", "ask `score`")
    return score(network, data)


def prune(
    network: Network, data: Data, *, macs: float, seed: int = 0, progress: Progress | None = None, **settings: Any
) -> Network:
    """The network without its least important channels, at `macs` of its multiply-adds; see the stage `prune`."""
    stage = _checked(Prune, {"use": "prune", "goal": {"macs": macs}, **settings})
    return _applied(stage, Product(network), data, seed, progress)


def distill(
    student: Network, teacher: Network, data: Data, *, seed: int = 0, progress: Progress | None = None, **settings: Any
) -> Network:
    """The student, taught by the network it was made from; see the stage `distill` for settings.

    For a teacher that the student was not made from, give its folder: `teacher="folder"` beside the parent. The
    networks that were given stay as they are. Raises RecipeError for a setting that is none.
    """
    stage = _checked(Distill, {"use": "distill", **settings})
    return _applied(stage, Product(student, teacher), data, seed, progress)


def _applied(stage: Prune | Distill, product: Product, data: Data, seed: int, progress: Progress | None) -> Network:
    with tempfile.TemporaryDirectory() as folder:
        surroundings = Run(
            folder=Path(folder),
            data=data,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            seed=seed,
            progress=progress or _progress(),
            recipe_hash="",
            stage=stage.use,
        )
        torch.manual_seed(seed)
        return stage.apply(product, surroundings).network


def _checked(kind: type[S], settings: Mapping[str, Any]) -> S:
    """The settings as a recipe would have them. Raises RecipeError with one sentence per mistake."""
    try:
        return kind.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        mistakes = explain(kind, error.errors(include_url=False), settings)
        raise RecipeError([f"{dotted(keys)}: {problem}" for keys, problem in mistakes]) from None


def _progress() -> Progress:
    return RichProgress(Console(stderr=True))
