"""Looks for the setting that makes a control as fast as the run's network: built, exported and timed, never trained."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import manifest
from compress.data import open_data
from compress.errors import ModelError
from compress.models import file_sha256
from compress.pipeline import equal
from compress.pipeline.compared import Shipped, stage_number
from compress.pipeline.fold import CONTROLS_FOLDER, Fold, load_product
from compress.pipeline.preflight import first_network
from compress.pipeline.timed import ratio
from compress.product import Data, Product, Run
from compress.progress import Progress, Silent
from compress.recipe import Recipe
from compress.recipe.control import Control
from compress.recipe.controlled import Controls
from compress.stages import StageSettings
from compress.stages.export import Export
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.targets import Machine, open_target
from compress.written import read_json, write_json

SEARCH_IMAGES = 32
"""For calibration: a file's time does not depend on its weights."""


def searched(
    name: str,
    make: Callable[[float], Control],
    limits: dict[str, float],
    whole: bool,
    run: Fold,
    asked: Controls,
    shipped: Shipped,
    told: Progress,
) -> list[equal.Tried]:
    """What was tried for a network as fast as the run's. Nothing is trained, and what was measured before counts."""
    path = run.folder / CONTROLS_FOLDER / "search" / f"{name}.json"
    key = manifest.key(
        run.code,
        [file_sha256(shipped.path), shipped.measuring.words, asked.tolerance, asked.searches],
        make(limits["start"]).recipe.model_dump(mode="json", exclude={"name"}),
        read_json(run.folder / Path(run.refs["parent"]).parent / manifest.NAME).get("key"),
        run.what_measures(),
    )
    kept = read_json(path)
    if kept.get("key") != key:
        kept = {"key": key, "ratios": {}, "shapes": {}}
    with contextlib.ExitStack() as stack:
        machines: list[Machine] = []

        def machine() -> Machine:
            """Opened when something has to be measured."""
            if not machines:
                opened = open_target(run.recipe.target, told, setup=run.setup, runtimes=(shipped.runtime,))  # type: ignore[arg-type]
                machines.append(stack.enter_context(opened))
            return machines[0]

        advance = stack.enter_context(told.steps("search for equal latency", asked.searches))

        def ratio_of(at: float) -> tuple[float, bool] | None:
            said = repr(at)
            if said in kept["shapes"]:
                shape = kept["shapes"][said]
                return None if shape is None else (kept["ratios"][shape], False)
            with tempfile.TemporaryDirectory(prefix="compress-") as folder:
                try:
                    product = _sketched(make(at), run, shipped, Path(folder), told)
                except (ModelError, ValidationError):
                    kept["shapes"][said] = None
                    return None
                candidate = product.files.get(shipped.name)
                if candidate is None:
                    raise ModelError("report.controls", f"it has no {shipped.name}", "")
                shape = _shape(product)
                kept["shapes"][said] = shape
                fresh = shape not in kept["ratios"]
                if fresh:
                    kept["ratios"][shape] = ratio(machine(), shipped, candidate)
                    advance(f"{_at(at, whole)}: {kept['ratios'][shape]:.3f} of the time")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
            return kept["ratios"][shape], fresh

        return equal.search(ratio_of, **limits, tolerance=asked.tolerance, most=asked.searches, whole=whole)


def _at(at: float, whole: bool) -> str:
    return f"{at:.0f} px" if whole else f"{at:.3f} of the multiply-adds"


def _sketched(control: Control, run: Fold, shipped: Shipped, folder: Path, told: Progress) -> Product:
    """The control's product as far as its speed goes: pruned, quantized and exported, and not trained.

    What goes before the parent is taken as the run left it. Raises ModelError.
    """
    small = control.recipe.preprocess != run.recipe.preprocess
    data = data_for(control.recipe, run) if small else run.data
    if small:
        product = Product(first_network(control.recipe, data, Silent(), run.base))
        after = 0
    else:
        parent = run.refs["parent"]
        alone: dict[str, Any] = {"network": parent, "parent": None, "float_network": None, "files": {}}
        product = load_product(run.folder, run.refs | alone)
        after = stage_number(parent)
    for number, stage in zip(control.numbers, control.recipe.stages, strict=True):
        quick = _untrained(stage, shipped) if number > after else None
        if quick is None:
            continue
        place = folder / f"{number:02d}-{stage.use}"
        place.mkdir()
        product = quick.apply(product, Run(place, data, run.device, run.recipe.seed, Silent(), "", stage=place.name))
    return product


def _untrained(stage: StageSettings, shipped: Shipped) -> Any:
    """The stage as far as it decides a file's speed; None where it does not. Not validated: it is no recipe's."""
    if isinstance(stage, Prune):
        rounds = stage.steps if stage.schedule is None else stage.schedule.steps
        plain = {"schedule": None, "steps": rounds, "sensitivity": False}
        return stage.model_copy(update=plain | {"finetune": None, "distill": None, "batchnorm_images": 0})
    if isinstance(stage, Quantize):
        quick = {"epochs": 0, "distill": None, "reestimate_batchnorm": False, "bias_correction": False}
        return stage.model_copy(update=quick | {"calibration_images": min(SEARCH_IMAGES, stage.calibration_images)})
    if isinstance(stage, Export):
        return stage.model_copy(update={"formats": (shipped.format,), "kinds": (shipped.kind,)})
    return None


def _shape(product: Product) -> str:
    """Equal for networks that differ in weights alone."""
    network = product.network
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.module.state_dict().items()]
    return hashlib.sha256(repr((shapes, network.structure.preprocess.size)).encode()).hexdigest()


def data_for(recipe: Recipe, run: Fold) -> Data:
    """The run's images at the size of a control's."""
    if recipe.preprocess == run.recipe.preprocess:
        return run.data
    data = open_data(recipe.data, recipe.preprocess, Silent(), run.base, run.data.fingerprint)
    return data if run.data.channels_last else data.in_nchw()
