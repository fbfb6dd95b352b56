"""What of a recipe is refused because its data have no classes, or have them, and what may stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet, randomized
from pictured import pictured, spots, squares

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.losses import LossSettings
from compress.pipeline.preflight import refuse_unsuited
from compress.product import Network, Product, Run, Structure
from compress.recipe.explain import kinds, uses
from compress.schemes import SchemeSettings
from compress.teaching import Taught
from compress.teaching.objective import objective

DATA = {
    "classification": "{use: csv, path: t.csv, holdout: 0.2}",
    "multi_label": "{use: csv, path: t.csv, holdout: 0.2, task: multi_label, label: [cat, dog]}",
    "regression": "{use: csv, path: t.csv, holdout: 0.2, task: regression, label: [age]}",
}
HEAD = """\
name: task
model: {{use: mobilenet_v2}}
data: {data}
stages:
  - {{use: train, epochs: 1}}
  - {{use: prune, goal: {{macs: 0.5}}}}
  - {stage}
"""


def mistakes(tmp_path: Path, task: str, stage: str) -> list[str]:
    path = tmp_path / "demo.yaml"
    path.write_text(HEAD.format(data=DATA[task], stage=stage), encoding="utf-8")
    try:
        recipes.load(path)
    except RecipeError as error:
        return [line.partition(": ")[2] for line in error.lines]
    return []


@pytest.mark.parametrize(
    ("task", "stage", "expected"),
    [
        (
            "multi_label",
            "{use: distill, losses: [{use: kd}]}",
            "losses.0: `kd` makes no sense in a multi-label",
        ),
        ("multi_label", "{use: distill, losses: [{use: mse}]}", "stages.2.losses.0: `mse` makes no sense"),
        (
            "regression",
            "{use: distill, losses: [{use: fitnets}, {use: dkd}]}",
            "losses.1: `dkd` makes no sense",
        ),
        (
            "regression",
            "{use: distill, losses: [{use: l2, on: probabilities}]}",
            "`l2` on probabilities makes",
        ),
        (
            "regression",
            "{use: quantize, distill: {losses: [{use: binary_kd}]}}",
            "distill.losses.0: `binary_kd`",
        ),
        ("classification", "{use: distill, losses: [{use: binary_kd}]}", "`binary_kd` makes no sense with one class"),
        ("classification", "{use: distill, losses: [{use: mse}]}", "suitable: activation_boundary"),
        ("regression", "{use: distill, scheme: {use: mutual}}", "suitable: assistants, born_again, netaug"),
        ("multi_label", "{use: knowledge}", "stages.2: `knowledge` compares classes"),
        ("multi_label", "{use: distill, label_smoothing: 0.1}", "stages.2.label_smoothing: is for classes"),
        ("classification", "{use: distill, huber: 1}", "stages.2.huber: is for a regression's numbers"),
        (
            "regression",
            "{use: distill, teacher: {use: several, teachers: [parent, a/network]}}",
            "stages.2.teacher.of: a mean of probabilities is one of classes: set `of: logits`",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line_with_what_would(tmp_path, task, stage, expected):
    (line,) = mistakes(tmp_path, task, stage)
    assert expected in line


@pytest.mark.parametrize(
    ("task", "stage"),
    [
        ("multi_label", "{use: distill, losses: [{use: binary_kd}, {use: attention}]}"),
        ("multi_label", "{use: distill, scheme: {use: born_again}}"),
        ("regression", "{use: distill, losses: [{use: mse}, {use: l2}], huber: 1}"),
        ("regression", "{use: distill, teacher: {use: several, teachers: [parent, a/network], of: logits}}"),
        ("classification", "{use: distill, losses: [{use: kd}], label_smoothing: 0.1}"),
        *((task, "{use: distill}") for task in DATA),
    ],
)
def test_what_makes_sense_is_let_through(tmp_path, task, stage):
    assert mistakes(tmp_path, task, stage) == []


def test_data_that_only_say_their_task_when_opened_are_asked_before_anything_trains(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(HEAD.format(data="{use: digits}", stage="{use: distill, losses: [{use: kd}]}"), encoding="utf-8")
    recipe = recipes.load(path)
    with pytest.raises(RecipeError) as caught:
        refuse_unsuited(recipe, pictured(spots, 8, 4))
    assert "`kd` makes no sense in a regression" in str(caught.value)
    assert "mse" in str(caught.value)


def settings_of(union: Any) -> list[Any]:
    return list(kinds(union))


def test_only_losses_on_classes_are_kept_from_the_other_tasks():
    """Every loss serves some task, and those that compare maps or weights serve all."""
    suited = {uses(kind)[0]: set(kind.tasks) for kind in settings_of(LossSettings)}
    assert all(suited.values())
    assert {name for name, tasks in suited.items() if tasks == {"classification"}} == {
        *("kd", "dkd", "dist", "ce", "teacher_free", "attention_gradient", "gradient_symmetry", "crd"),
    }
    assert suited["binary_kd"] == {"multi_label"}
    assert suited["mse"] == {"regression"}
    assert all(kind.tasks for kind in settings_of(SchemeSettings))


NEEDED: dict[str, dict[str, Any]] = {"l2": {"on": "logits"}}


@pytest.mark.parametrize("draw", [squares, spots])
def test_every_suitable_loss_teaches(draw, tmp_path, progress):
    """One step of each, with gradients that are numbers."""
    data = pictured(draw, 16, 8)
    outputs = len(data.labels)
    structure = Structure(model={"use": "tests:none"}, num_classes=outputs, preprocess=data.preprocess, task=data.task)
    network = Network(randomized(SmallNet(outputs)), structure)
    student = Network(randomized(SmallNet(outputs), seed=1), structure)
    run = Run(tmp_path, data, torch.device("cpu"), seed=1, progress=progress, recipe_hash="")
    (batch,) = data.batches("train", batch_size=16)
    tried = 0
    for kind in settings_of(LossSettings):
        if data.task not in kind.tasks:
            continue
        use = uses(kind)[0]
        term = {"use": use, "weight": 1.0, **NEEDED.get(use, {})}
        settings = Taught.model_validate_json(json.dumps({"losses": [term]}))
        goal = objective(settings, Product(student, network), run, student=student.module, training=settings)
        if goal.companion is not None:
            goal.companion.train()
        student.module.zero_grad()
        value = goal.loss(student.module, batch)
        value.backward()
        gradients = [p.grad for p in student.module.parameters() if p.grad is not None]
        assert value.isfinite(), use
        assert gradients, use
        assert all(gradient.isfinite().all() for gradient in gradients), use
        tried += 1
    assert tried >= 15
