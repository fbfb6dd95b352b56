"""The blocks and the table of docs/tasks.md, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.labels import Task
from compress.losses import LossSettings
from compress.recipe.explain import kinds, uses
from compress.schemes import SchemeSettings
from compress.tasks import RULES

DOCS = (Path(__file__).resolve().parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
OTHER = {
    "data": "data: {use: csv, path: t.csv, holdout: 0.2, task: TASK, label: [a, b]}\n",
    "stages": "stages: [{use: train}]\n",
}
TASKS: tuple[Task, ...] = ("classification", "multi_label", "regression")


def whole(block: str, task: str) -> str:
    """A block of the page as a recipe."""
    if block.startswith("losses:"):
        block = "stages:\n  - use: prune\n    goal: {macs: 0.5}\n  - use: distill\n" + re.sub(
            "^", "    ", block, flags=re.M
        )
    missing = "".join(text for key, text in OTHER.items() if not block.startswith(f"{key}:"))
    return f"name: page\nmodel: {{use: mobilenet_v2}}\n{missing.replace('TASK', task)}{block}"


def test_every_block_loads(tmp_path):
    assert len(BLOCKS) == 4
    for number, block in enumerate(BLOCKS):
        path = tmp_path / f"{number}.yaml"
        path.write_text(whole(block, "multi_label" if "binary_kd" in block else "regression"), encoding="utf-8")
        assert recipes.load(path).name == "page"


def cells(row: str) -> list[str]:
    (line,) = [line for line in DOCS.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def named(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_table_names_what_is_refused():
    refused = named(cells("refused losses")[1])
    for task in TASKS[1:]:
        mine = {uses(kind)[0] for kind in kinds(LossSettings) if task not in kind.tasks}
        assert mine - {"mse", "binary_kd"} == refused
    assert {uses(kind)[0] for kind in kinds(LossSettings) if "classification" not in kind.tasks} == named(
        cells("other losses")[0]
    )
    suited = {uses(kind)[0] for kind in kinds(SchemeSettings) if "regression" in kind.tasks}
    assert suited == named(cells("schemes")[1])


def test_the_table_names_the_scores():
    for task, cell in zip(TASKS, cells("score (`accuracy` in manifests)"), strict=True):
        assert RULES[task].score_name in cell


def test_the_line_that_refuses_is_the_one_of_the_page(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(whole("losses:\n  - {use: kd}\n", "regression"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    (said,) = re.findall(r"`kd` makes no sense in a regression; suitable: activation_boundary, adversarial, ", DOCS)
    assert said in str(caught.value)
