"""Recipes to compare a recipe with: without its teachers, or with a simpler way to a network that is as fast.

Each is derived from the recipe, trains for as many epochs, and keeps the numbers of its stages, which decide seeds and
folders. What a control is free in (a share of multiply-adds, a size of images) is given here and found elsewhere, by
measuring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.recipe import COMPRESSES, Recipe, ReportSettings
from compress.stages import StageSettings
from compress.stages.distill import Distill
from compress.stages.train import Train
from compress.training import Fit

NO_DISTILLATION = "no_distillation"
"""The control's folder in `controls/` of the run."""


@dataclass(frozen=True)
class Control:
    """A recipe to compare another one with."""

    recipe: Recipe
    numbers: tuple[int, ...]
    """Of its stages in the other recipe, from 1: they decide seeds and folders, so that both are the same."""


def uniform_width(recipe: Recipe, share: float) -> Control:
    """Every layer that may be pruned loses the same share of its channels, until `share` of the multiply-adds is left.

    Which channels go, and to which multiples, the recipe says. Limits of single layers are its own method's: they
    stay where they keep a layer, and give way to `LIMIT` otherwise, or the network could not be as fast.
    """
    return _pruned(recipe, share, scope="local")


def mac_pruning(recipe: Recipe, share: float) -> Control:
    """Channels of all layers ranked together and removed until `share` of the multiply-adds is left.

    What everyone does who asks no board: the recipe's criterion and `round_to`, but none of its times.
    """
    return _pruned(recipe, share, scope="global")


def random_criterion(recipe: Recipe, share: float | None) -> Control:
    """The recipe with channels scored by lot; `share` of the multiply-adds is left where that is its goal.

    None leaves a goal that is a time as it is: the same machinery makes the network as fast.
    """
    stages = [
        stage
        | ({"criterion": {"use": "random"}} if stage["use"] == "prune" else {})
        | ({"goal": {"macs": _each(recipe, share)}} if stage["use"] == "prune" and share is not None else {})
        for stage in _stages(recipe)
    ]
    return _made(recipe, enumerate(stages, start=1))


def lower_resolution(recipe: Recipe, size: int, parent: str, number: int) -> Control:
    """Nothing is pruned and the images are smaller: `size` pixels on a side.

    `parent` is the folder of the network that stage `number` of the run left: the control begins with its weights and
    is taught by it at its own size. Training between steps of pruning stays, as a training of its own.
    """
    stages = []
    for at, given in enumerate(_stages(recipe), start=1):
        stage = _taught_by(given, parent)
        if stage["use"] == "prune":
            if not stage["finetune"]:
                continue
            schedule = stage.get("schedule")
            rounds = schedule.get("steps", 1) if schedule else stage["steps"]
            epochs = stage["finetune"]["epochs"] * rounds
            finetune = {name: value for name, value in stage["finetune"].items() if name in Fit.model_fields}
            stage = finetune | {"use": "train", "epochs": epochs, "distill": stage["distill"]}
        stages.append((at, stage))
    model = recipe.model.model_copy(update={"weights": f"{parent}/weights.safetensors"})
    preprocess = recipe.preprocess.model_copy(update={"size": size})
    return _made(recipe, [pair for pair in stages if pair[0] > number], model=model, preprocess=preprocess)


def ptq_only(recipe: Recipe) -> Control:
    """The parent, quantized without training; what trains before anything is compressed stays."""
    stages = list(enumerate(_stages(recipe), start=1))
    first = next(number for number, stage in stages if stage["use"] in COMPRESSES)
    asleep: dict[str, Any] = {"epochs": 0, "distill": None, "rewrite_activations": False, "only": []}
    return _made(
        recipe,
        [
            (number, stage | asleep if stage["use"] == "quantize" else stage)
            for number, stage in stages
            if number < first or stage["use"] not in ("train", "distill", *COMPRESSES[:-1])
        ],
    )


def again(recipe: Recipe) -> Control:
    """The recipe itself, for another seed."""
    return _made(recipe, enumerate(_stages(recipe), start=1))


LIMIT = 0.95
"""Largest share of a layer's channels that a control may take, where the recipe allows less."""
OF_PRUNING = (
    *("criterion", "round_to", "keep", "steps", "schedule", "images", "batchnorm_images", "finetune", "distill"),
)
"""What a control's pruning shares with the recipe's."""


def _pruned(recipe: Recipe, share: float, *, scope: str) -> Control:
    stages = []
    for number, stage in enumerate(_stages(recipe), start=1):
        if stage["use"] == "prune":
            kept = {name: stage[name] for name in OF_PRUNING if name in stage}
            goal = {"goal": {"macs": _each(recipe, share)}, "scope": scope}
            stage = {"use": "prune"} | kept | goal | {"max_ratio": max(LIMIT, stage.get("max_ratio", 0.0))}
        stages.append((number, stage))
    return _made(recipe, stages)


def _each(recipe: Recipe, share: float) -> float:
    """Of several stages that prune, each leaves the same share of what it finds."""
    return float(share ** (1 / sum(stage.use == "prune" for stage in recipe.stages)))


def _taught_by(stage: Mapping[str, Any], parent: str) -> dict[str, Any]:
    """The stage with a saved network in place of the run's parent as teacher, where it has that; nothing is cached."""

    def instead(teacher: Any) -> Any:
        if isinstance(teacher, Mapping) and isinstance(teacher.get("teachers"), Sequence):
            return {**teacher, "teachers": [instead(one) for one in teacher["teachers"]]}
        own = teacher == "parent" or (isinstance(teacher, Mapping) and teacher.get("use") == "parent")
        return {"use": "saved", "path": parent} if own else teacher

    if "teacher" in stage:
        return {**stage, "teacher": instead(stage["teacher"]), "cache": None}
    if stage.get("distill"):
        return {**stage, "distill": _taught_by(stage["distill"], parent)}
    return dict(stage)


def _stages(recipe: Recipe) -> list[dict[str, Any]]:
    return [stage.model_dump(mode="json") for stage in recipe.stages]


def _made(recipe: Recipe, stages: Any, **changes: Any) -> Control:
    """The recipe with those (number, stage), without what only the run itself needs. Raises ValidationError."""
    kept: list[tuple[int, dict[str, Any]]] = []
    changed, exported = False, None
    for number, stage in stages:
        if stage["use"] in ("benchmark", "knowledge"):  # all are timed together, and compared by their files
            continue
        if stage.get("sensitivity"):
            stage = stage | {"sensitivity": False}
        if stage["use"] == "export" and stage["kinds"] and not changed:
            stage = stage | {"kinds": [kind for kind in stage["kinds"] if kind != "float"]}
            if not stage["kinds"]:
                continue
        if stage["use"] == "export" and stage == exported:  # nothing is left that changed anything in between
            continue
        changed = changed or stage["use"] in COMPRESSES[:-1]
        if stage["use"] != "verify":
            exported = stage if stage["use"] == "export" else None
        kept.append((number, stage))
    said = recipe.model_copy(update={"report": ReportSettings(), **changes}).model_dump(mode="json")
    said["stages"] = [stage for _, stage in kept]
    return Control(Recipe.model_validate_json(json.dumps(said)), tuple(number for number, _ in kept))


def without_distillation(recipe: Recipe) -> Control:
    """Every `distill` stage trains on the labels, as long and as fast as it taught; other stages lose their `distill`.

    What belongs to a teacher goes with it: losses, the labels' weight (it becomes 1), a scheme, unlabeled images and
    `views`, so augmentations do not repeat. A scheme that trains in several rounds is replaced by one. Benchmarks that
    come after the first such stage are left out, and controls of the control.
    """
    stages: list[tuple[int, StageSettings]] = []
    changed = False
    for number, stage in enumerate(recipe.stages, start=1):
        alone = _alone(stage)
        changed = changed or alone is not stage
        if not (changed and stage.use == "benchmark"):
            stages.append((number, alone))
    control = recipe.model_copy(
        update={"stages": tuple(stage for _, stage in stages), "report": ReportSettings(ablate_distillation=False)}
    )
    # Not in silence: a recipe that its own validation refuses must not run.
    return Control(Recipe.model_validate_json(control.model_dump_json()), tuple(number for number, _ in stages))


def _alone(stage: StageSettings) -> StageSettings:
    """The stage without a teacher; the same object where it has none."""
    if isinstance(stage, Distill):
        return Train(use="train", **{name: getattr(stage, name) for name in Fit.model_fields})
    if getattr(stage, "distill", None) is not None:
        return stage.model_copy(update={"distill": None})
    return stage
