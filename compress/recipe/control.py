"""The same recipe without its teachers: what the compressed network would have become by the labels alone."""

from __future__ import annotations

from dataclasses import dataclass

from compress.recipe import Recipe, ReportSettings
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
