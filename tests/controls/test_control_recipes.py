"""Recipes of controls: as long a training, the same numbers, and one thing that differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.recipe import Recipe
from compress.recipe.control import (
    LIMIT,
    again,
    lower_resolution,
    mac_pruning,
    ptq_only,
    random_criterion,
    uniform_width,
)
from compress.recipe.controlled import CONTROLS, Controls

RECIPE = """
name: chain
model: {use: mobilenet_v2}
data: {use: digits}
preprocess: {size: 64, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 2}
  - {use: export}
  - {use: benchmark}
  - {use: prune, goal: {macs: 0.5}, criterion: {use: fisher}, round_to: 16, steps: 3, max_ratio: 0.6,
     finetune: {epochs: 2}, distill: {}}
  - {use: train, epochs: 4, distill: {teacher: {use: several, teachers: [parent, other]}}}
  - {use: prune, goal: {macs: 0.5}}
  - {use: distill, epochs: 3, lr: 0.01, cache: answers}
  - {use: quantize, epochs: 2, distill: {labels: 0.5}, only: [classifier.*]}
  - {use: knowledge}
  - {use: export, kinds: [float, int8]}
  - {use: verify}
  - {use: benchmark}
report: {controls: {seeds: 3}}
"""
PARENT = "runs/chain/stages/01-train/network"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "chain.yaml").write_text(RECIPE)
    return recipes.load(tmp_path / "chain.yaml")


def epochs(recipe: Recipe) -> int:
    """Of everything that trains."""
    total = 0
    for stage in recipe.stages:
        total += getattr(stage, "epochs", 0)
        if getattr(stage, "finetune", None):
            total += stage.finetune.epochs * stage.steps
    return total


def made(recipe: Recipe) -> dict:
    return {
        "uniform_width": uniform_width(recipe, 0.2),
        "mac_pruning": mac_pruning(recipe, 0.2),
        "random_criterion": random_criterion(recipe, 0.2),
        "lower_resolution": lower_resolution(recipe, 40, PARENT, 1),
        "ptq_only": ptq_only(recipe),
        "ours": again(recipe),
    }


def test_each_trains_as_long_and_keeps_its_numbers(recipe):
    before = {number: stage.use for number, stage in enumerate(recipe.stages, start=1)}
    for name, control in made(recipe).items():
        by_number = dict(zip(control.numbers, control.recipe.stages, strict=True))
        uses = [stage.use for stage in control.recipe.stages]
        assert not {"benchmark", "knowledge"} & set(uses), name
        assert uses[-2:] == ["export", "verify"], name
        assert control.recipe.report == recipes.ReportSettings(), name
        if name == "lower_resolution":  # the parent is trained already; 3 steps of 2 epochs are 6 epochs
            assert epochs(control.recipe) == epochs(recipe) - 2
            assert by_number[4].use == "train"
            assert by_number[4].epochs == 6
        elif name == "ptq_only":
            assert uses == ["train", "export", "quantize", "export", "verify"]
            assert by_number[8].epochs == 0
            assert by_number[8].distill is None
        else:
            assert epochs(control.recipe) == epochs(recipe), name
            assert all(stage.use == before[number] for number, stage in by_number.items()), name
        # It is a recipe like any other: it can be written, read and run by hand.
        again_read = Recipe.model_validate_json(json.dumps(control.recipe.model_dump(mode="json")))
        assert again_read == control.recipe, name


def test_pruning_differs_in_one_thing(recipe):
    own = [stage for stage in recipe.stages if stage.use == "prune"]
    for make, scope in ((uniform_width, "local"), (mac_pruning, "global")):
        stages = [stage for stage in make(recipe, 0.09).recipe.stages if stage.use == "prune"]
        assert [stage.scope for stage in stages] == [scope, scope]
        assert [stage.goal.macs for stage in stages] == pytest.approx([0.3, 0.3])  # of what each finds
        assert [stage.max_ratio for stage in stages] == [LIMIT, LIMIT]
        for stage, given in zip(stages, own, strict=True):
            for name in ("criterion", "round_to", "steps", "finetune", "distill", "images"):
                assert getattr(stage, name) == getattr(given, name), name
    chance = [stage for stage in random_criterion(recipe, 0.25).recipe.stages if stage.use == "prune"]
    assert [stage.criterion.use for stage in chance] == ["random", "random"]
    assert [stage.goal.macs for stage in chance] == pytest.approx([0.5, 0.5])
    assert chance[0].max_ratio == 0.6
    kept = [stage.goal for stage in random_criterion(recipe, None).recipe.stages if stage.use == "prune"]
    assert kept == [stage.goal for stage in own]


def test_smaller_images_have_the_parents_weights_and_the_parent_as_teacher(recipe):
    control = lower_resolution(recipe, 40, PARENT, 1)
    assert control.recipe.preprocess == recipe.preprocess.model_copy(update={"size": 40})
    assert control.recipe.model.weights == f"{PARENT}/weights.safetensors"
    assert 1 not in control.numbers
    assert "prune" not in [stage.use for stage in control.recipe.stages]
    by_number = dict(zip(control.numbers, control.recipe.stages, strict=True))
    saved = {"use": "saved", "path": PARENT}
    assert by_number[4].distill.teacher.model_dump() == saved
    several = by_number[5].distill.teacher.model_dump()["teachers"]
    assert [one["path"] for one in several] == [PARENT, "other"]
    assert by_number[7].teacher.model_dump() == saved
    assert by_number[7].cache is None
    assert by_number[8].distill.teacher.model_dump() == saved
    assert by_number[10].kinds == ("int8",)  # nothing is pruned, so there is no such float file


def test_other_ways_to_compress_count_too(tmp_path):
    stages = (
        "[{use: train}, {use: factorize, energy: 0.9}, {use: distill}, {use: quantize}, {use: export}, {use: verify}]"
    )
    recipe = change(RECIPE, f"stages={stages}", folder=tmp_path)
    assert [stage.use for stage in ptq_only(recipe).recipe.stages] == ["train", "quantize", "export", "verify"]
    assert again(recipe).recipe.stages[-2].kinds == recipe.stages[-2].kinds  # its float file is not the parent's
    with pytest.raises(RecipeError, match=r"report.controls: .*behind stages.1"):
        change(RECIPE, "stages=[{use: train}, {use: factorize, energy: 0.9}]", folder=tmp_path)


def change(recipe: str, *overrides: str, folder: Path) -> Recipe:
    (folder / "changed.yaml").write_text(recipe)
    return recipes.load(folder / "changed.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("report.controls={which: [best]}", "report.controls.which.0: "),
        ("report.controls={which: []}", "report.controls.which"),
        ("report.controls={sedes: 2}", "sedes"),
        ("report.controls={seeds: 0}", "report.controls.seeds"),
        ("report.controls=3", "report.controls"),
        ("target=emulated", "report.controls: .*times nothing"),
        ("stages=[{use: train}, {use: export}, {use: verify}]", "report.controls: no stage compresses the network"),
        ("stages=[{use: prune, goal: {macs: 0.5}}, {use: export}]", "report.controls: .*put `export` and `verify`"),
        ("stages=[{use: export}, {use: verify}, {use: quantize}]", "report.controls: .*behind stages.2"),
    ],
)
def test_what_cannot_be_compared_is_a_mistake_of_the_recipe(tmp_path, override, wrong):
    with pytest.raises(RecipeError, match=wrong):
        change(RECIPE, override, folder=tmp_path)


def test_a_control_that_is_named_and_has_no_room_is_a_mistake(tmp_path):
    short = "stages=[{use: prune, goal: {macs: 0.5}}, {use: train}, {use: export}, {use: verify}]"
    for name in ("ptq_only", "no_distillation"):
        with pytest.raises(RecipeError, match=f"report.controls.which: {name}: no stage"):
            change(RECIPE, short, f"report.controls={{which: [{name}]}}", folder=tmp_path)
    asked = change(RECIPE, short, "report.controls=true", folder=tmp_path)
    assert asked.report.asked == Controls()
    stages = [stage.model_dump(mode="json") for stage in asked.stages]
    assert [name for name in CONTROLS if not recipes.unsuited(name, stages)] == [
        "uniform_width", "lower_resolution", "random_criterion"
    ]  # fmt: skip
    assert any("controls make 3 more networks" in note for note in recipes.notes(asked))


def test_asking_changes_nothing_of_what_is_computed(tmp_path, recipe):
    assert recipes.recipe_hash(change(RECIPE, "report.controls=false", folder=tmp_path)) == recipes.recipe_hash(recipe)
    assert change(RECIPE, "report.controls=false", folder=tmp_path).report.asked is None


def test_the_schema_shows_it():
    report = recipes.schema()["$defs"]["ReportSettings"]["properties"]["controls"]
    kinds = {tuple(one.items()) for one in report["anyOf"]}
    assert (("type", "boolean"),) in kinds
    controls = recipes.schema()["$defs"]["Controls"]["properties"]
    assert set(controls) == {"which", "seeds", "tolerance", "searches"}
    assert all(one["description"] for one in controls.values())
