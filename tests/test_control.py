"""The run without teachers that `report.ablate_distillation` asks for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.errors import GateError, RecipeError, TrainingError
from compress.pipeline import Outcome, run_recipe
from compress.recipe.control import without_distillation
from compress.report import write_report
from compress.stages.distill import Distill
from compress.stages.train import Train
from compress.training import Fit

NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 2 * 2, num_classes))
"""

RECIPE = """
name: small
model: {use: "tiny:Net"}
data: {use: digits}
preprocess: {size: 8, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 2, lr: 0.05}
  - {use: prune, goal: {macs: 0.6}}
  - {use: distill, epochs: 1, lr: 0.02, ema: 0.9, labels: 0.3}
  - {use: quantize, epochs: 1, distill: {}}
  - {use: knowledge, images: 40, corruptions: [contrast], severities: [3], attack_images: 8, pgd_steps: 2}
report: {ablate_distillation: true}
"""

ALL = ["00-load", "01-train", "02-prune", "03-distill", "04-quantize", "05-knowledge"]
CONTROL = ["00-load", "01-train", "02-prune", "03-train", "04-quantize", "05-knowledge"]


class Labels:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator:
        self.labels.append(label)
        yield lambda text: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, kind: str, **facts: object) -> None:
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "tiny.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def go(place: Path, *overrides: str, out: str = "run") -> tuple[Outcome, Labels]:
    recipe, progress = recipes.load(place / "recipe.yaml", overrides), Labels()
    return run_recipe(recipe, place / out, progress, command="compress run", base=place), progress


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[Outcome, Labels]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return go(place)


def manifest(folder: Path, label: str) -> dict:
    return json.loads((folder / "stages" / label / "manifest.json").read_text())


def weights(folder: Path, label: str) -> bytes:
    return (folder / "stages" / label / "network/weights.safetensors").read_bytes()


@pytest.fixture
def control(place: Path, ran: tuple[Outcome, Labels]) -> Path:
    return place / "run/controls/no_distillation"


def test_the_control_is_a_run_of_its_own_that_shares_what_does_not_differ(place, ran, control):
    outcome = ran[0]
    assert (outcome.ran, outcome.resumed) == (ALL, [])
    assert outcome.control is not None
    assert outcome.control.folder == control
    assert (outcome.control.resumed, outcome.control.ran) == (CONTROL[:3], CONTROL[3:])
    facts = json.loads((control / "run.json").read_text())
    assert facts["stages"] == CONTROL
    assert facts["finished"]
    assert facts["controls"] == []
    assert not (control / "controls").exists()
    assert json.loads((place / "run/run.json").read_text())["controls"] == ["no_distillation"]
    for label in CONTROL[:3]:
        assert manifest(control, label)["key"] == manifest(place / "run", label)["key"]
        assert weights(control, label) == weights(place / "run", label)


def test_it_has_the_same_seeds_and_epochs_and_no_teacher(place, control):
    run = place / "run"
    for mine, its in zip(ALL, CONTROL, strict=True):
        assert manifest(run, mine)["seed"] == manifest(control, its)["seed"]
    taught, alone = manifest(run, "03-distill"), manifest(control, "03-train")
    for name in Fit.model_fields:
        assert taught["settings"][name] == alone["settings"][name], name
    assert alone["settings"]["distill"] is None
    assert manifest(control, "04-quantize")["settings"]["distill"] is None
    assert manifest(run, "04-quantize")["settings"]["distill"] is not None
    assert len(alone["metrics"]["history"]) == len(taught["metrics"]["history"]) == 1
    assert weights(control, "03-train") != weights(run, "03-distill")
    assert alone["network"]["macs"] == taught["network"]["macs"]


def test_it_says_what_it_does(ran):
    shown = ran[1]
    assert "distill  epoch 1/1" in shown.labels
    assert "control: train  epoch 1/1" in shown.labels
    assert "control: quantize  epoch 1/1" in shown.labels
    assert not any(label.startswith("control: distill") for label in shown.labels)
    assert shown.labels.index("control: train  epoch 1/1") > shown.labels.index("knowledge")
    assert any(note.startswith("control: 02-prune: unchanged") for note in shown.notes)


def test_both_are_compared_with_the_same_teacher_on_the_same_images(place, control):
    mine, its = (manifest(folder, "05-knowledge")["metrics"] for folder in (place / "run", control))
    for one, other in zip(mine["measures"], its["measures"], strict=True):
        assert one["name"] == other["name"]
        if "transfer" not in one["name"]:  # the teacher on images that fool the student
            assert one["teacher"] == other["teacher"], one["name"]
    assert [row["student"] for row in mine["measures"]] != [row["student"] for row in its["measures"]]


def test_the_second_run_repeats_nothing(place, ran):
    outcome, _ = go(place)
    assert (outcome.ran, outcome.control.ran) == ([], [])
    assert outcome.control.resumed == CONTROL


def test_it_goes_on_where_it_stopped(place, ran, control):
    """Stopped in the control's third stage; a stage of the control that was altered runs again, and no other."""
    path = control / "stages/04-quantize/network/weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    outcome, _ = go(place)
    assert outcome.ran == []
    assert outcome.control.ran == ["04-quantize"]  # and what follows finds the same network as before
    assert path.read_bytes() == whole


def test_a_control_alone_is_the_recipe_that_it_says(place, control):
    """Run by hand, in its own folder: nothing is left to do."""
    recipe = recipes.load(control / "recipe.yaml")
    assert recipe == without_distillation(recipes.load(place / "recipe.yaml")).recipe
    assert run_recipe(recipe, control, Labels(), command="compress run", base=place).resumed == CONTROL


def test_asking_for_the_ablation_changes_no_stage(place, ran):
    outcome, _ = go(place, "report.ablate_distillation=false")
    assert (outcome.ran, outcome.control) == ([], None)
    assert json.loads((place / "run/run.json").read_text())["controls"] == []
    assert "ithout distillation" not in write_report(place / "run").read_text()
    again, _ = go(place)
    assert (again.ran, again.control.ran) == ([], [])


def test_the_report_has_the_three_columns(place, ran):
    html = write_report(place / "run").read_text()
    data = json.loads((place / "run/report.json").read_text())
    (compared,) = data["knowledge"]
    assert compared["stage"] == "05-knowledge"
    assert all(row["without"] is not None for row in compared["measures"] if row["student"] is not None)
    ablation = data["ablation"]
    assert ablation["with"] == manifest(place / "run", "04-quantize")["network"]["accuracy"]
    assert ablation["without"] == manifest(place / "run/controls/no_distillation", "04-quantize")["network"]["accuracy"]
    assert "Without distillation" in html


def test_a_control_that_fails_keeps_the_run(place, ran, monkeypatch):
    def fails(self, product, run):
        raise TrainingError(f"stage {run.stage}", "the loss is nan at epoch 1, step 1", "try a lower lr")

    shutil.copytree(place / "run", place / "failing")
    shutil.rmtree(place / "failing/controls")
    monkeypatch.setattr(Train, "apply", fails)
    with pytest.raises(GateError, match=r"control no_distillation: stage 03-train: the loss is nan .*try a lower lr"):
        go(place, out="failing")
    facts = json.loads((place / "failing/run.json").read_text())
    assert facts["finished"]
    assert facts["stages"] == ALL
    assert "The run without distillation did not finish" in write_report(place / "failing").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    outcome, _ = go(place, out="failing")
    assert (outcome.ran, outcome.control.ran) == ([], CONTROL[3:])


CHAIN = """
name: chain
model: {use: mobilenet_v2}
data: {use: digits}
preprocess: {size: 32}
stages:
  - {use: train, epochs: 1}
  - {use: export}
  - {use: benchmark}
  - {use: prune, goal: {macs: 0.5}}
  - {use: train, epochs: 2, distill: {}}
  - {use: export}
  - {use: benchmark}
  - {use: prune, goal: {macs: 0.5}, finetune: {epochs: 1}, distill: {}}
  - {use: distill, epochs: 3, lr: 0.01, only: [classifier.*], views: 2}
  - {use: quantize, epochs: 2, distill: {labels: 0.5}}
  - {use: export}
  - {use: verify}
  - {use: benchmark}
report: {ablate_distillation: true}
"""


def test_every_teacher_goes_and_every_number_stays(tmp_path):
    (tmp_path / "chain.yaml").write_text(CHAIN)
    recipe = recipes.load(tmp_path / "chain.yaml")
    control = without_distillation(recipe)
    uses = [stage.use for stage in control.recipe.stages]
    assert uses == ["train", "export", "benchmark", "prune", "train", "export", "prune", "train", "quantize", "export",
                    "verify"]  # fmt: skip
    assert control.numbers == (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12)
    by_number = dict(zip(control.numbers, control.recipe.stages, strict=True))
    assert all(getattr(stage, "distill", None) is None for stage in control.recipe.stages)
    for number in (1, 2, 3, 4, 6, 11, 12):
        assert by_number[number] == recipe.stages[number - 1]
    assert by_number[8].finetune == recipe.stages[7].finetune
    taught, alone = recipe.stages[8], by_number[9]
    assert isinstance(taught, Distill)
    assert isinstance(alone, Train)
    assert {name: getattr(alone, name) for name in Fit.model_fields} == {
        name: getattr(taught, name) for name in Fit.model_fields
    }
    assert not control.recipe.report.ablate_distillation
    assert recipes.recipe_hash(recipe) != recipes.recipe_hash(control.recipe)


def test_nothing_to_leave_out_is_a_mistake_of_the_recipe(place):
    with pytest.raises(RecipeError, match=r"report\.ablate_distillation: no stage has a teacher.*add a `distill`"):
        recipes.load(place / "recipe.yaml", ["stages=[{use: train}, {use: prune, goal: {macs: 0.5}}]"])


def test_check_tells_what_it_costs_and_what_it_lacks(place):
    notes = recipes.notes(recipes.load(place / "recipe.yaml"))
    assert "ablate_distillation runs once more, without a teacher: distill, quantize, knowledge" in notes
    assert not any("`knowledge` stage measures" in note for note in notes)
    without = recipes.load(place / "recipe.yaml", ["stages=[{use: prune, goal: {macs: 0.5}}, {use: distill}]"])
    assert any("a `knowledge` stage measures what else differs" in note for note in recipes.notes(without))


def test_a_report_section_is_no_part_of_what_is_computed(place):
    asks = recipes.load(place / "recipe.yaml")
    asks_not = recipes.load(place / "recipe.yaml", ["report.ablate_distillation=false"])
    assert recipes.recipe_hash(asks) == recipes.recipe_hash(asks_not)


def test_knowledge_of_an_uncompressed_network_is_refused(place):
    with pytest.raises(RecipeError, match=r"stages\.0: nothing is pruned or quantized yet.*compared with itself"):
        recipes.load(place / "recipe.yaml", ["stages=[{use: knowledge}, {use: train}]", "report={}"])
