"""`cache` and `unlabeled` of a distillation, through whole stages and a recipe."""

import copy
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from PIL import Image
from pydantic import ValidationError

from compress import recipe
from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.errors import DataError, RecipeError
from compress.pipeline import run_recipe
from compress.product import Network, Product, Run
from compress.progress import Silent
from compress.pruning import MacGoal, Pruning, prune_network
from compress.stages.distill import Distill
from compress.stages.quantize import Quantize
from compress.stages.train import Train
from compress.teachers.teacher import Frozen
from compress.teaching import Distillation


class Notes(Silent):
    def __init__(self) -> None:
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def run(run: Run) -> Run:
    """The run on 43 real images with real augmentation; it keeps its notes."""
    images = np.random.default_rng(5).integers(0, 256, (43, 24, 24, 3), np.uint8)
    split = Images(np.arange(43) % 5, lambda index, _: Image.fromarray(images[index]))
    data = ImageData(("a", "b", "c", "d", "e"), PREPROCESS, "a" * 64, split, split, AugmentPhoto(), 0)
    return replace(run, data=data, progress=Notes())


@pytest.fixture
def taught(product: Product) -> Product:
    return replace(product, parent=Network(randomized(SmallNet(), seed=9), product.network.structure))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many images each question to a teacher had."""
    found: list[int] = []
    answers = Frozen.answers

    def counted(self, batch, layers, **options):
        found.append(len(batch.images_NCHW))
        return answers(self, batch, layers, **options)

    monkeypatch.setattr(Frozen, "answers", counted)
    return found


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    folder = tmp_path / "extra"
    folder.mkdir()
    for number in range(6):
        noise = np.random.default_rng(100 + number).integers(0, 256, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def distill(**values: Any) -> Distill:
    return Distill(**{"use": "distill", "epochs": 3, "batch_size": 8, "lr": 0.02, "views": 2, **values})


def same(ours: Product, theirs: Product) -> bool:
    expected = theirs.network.module.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in ours.network.module.state_dict().items())


@pytest.mark.parametrize("more", [False, True], ids=["labelled", "unlabelled too"])
@pytest.mark.parametrize(
    "stage",
    [
        lambda block: distill(**block),
        lambda block: Train(use="train", epochs=3, batch_size=8, lr=0.02, augment=False, distill=block),
        lambda block: Quantize(use="quantize", epochs=2, batch_size=8, lr=0.001, calibration_images=16, distill=block),
    ],
    ids=["distill", "train", "quantize"],
)
def test_stages_are_the_same_online_with_a_new_and_with_a_full_cache(taught, run, tmp_path, asked, extra, stage, more):
    block: dict[str, Any] = {"unlabeled": {"path": str(extra), "ratio": 0.5, "workers": 0}} if more else {}
    online = stage(block).apply(taught, run)
    block["cache"] = str(tmp_path / "answers")
    asked.clear()
    assert same(stage(block).apply(taught, run), online)
    assert sum(asked) > 0
    asked.clear()
    assert same(stage(block).apply(taught, run), online)
    assert asked == []
    assert any(
        note.startswith(f"The teacher's answers are kept in {tmp_path / 'answers'}") for note in run.progress.notes
    )


def test_losses_on_layers_ask_the_teacher_and_change_nothing(taught, run, tmp_path, asked):
    losses = ({"use": "kd"}, {"use": "attention", "weight": 1.0, "active": (0.5, 1.0)})
    online = distill(losses=losses).apply(taught, run)
    cached = distill(losses=losses, cache=str(tmp_path / "answers"))
    for _ in range(2):
        assert same(cached.apply(taught, run), online)


def test_a_stale_cache_stops_the_stage(taught, run, tmp_path):
    stage = distill(cache=str(tmp_path / "answers"))
    stage.apply(taught, run)
    other = replace(taught, parent=Network(randomized(SmallNet(), seed=10), taught.network.structure))
    with pytest.raises(DataError, match="is a stale cache: its teacher was"):
        stage.apply(other, run)


def test_unlabelled_images_teach(taught, run, extra):
    """They are in the student's batches, and the result is another than without them."""
    block = {"unlabeled": {"path": str(extra), "ratio": 1.0, "workers": 0}}
    seen: list[int] = []

    class Watching(SmallNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(len(x))
            return super().forward(x)

    watching = Watching()
    watching.load_state_dict(copy.deepcopy(taught.network.module.state_dict()))
    taught = replace(taught, network=Network(watching.eval(), taught.network.structure))
    plain = distill(views=None).apply(taught, run)
    assert set(seen) == {8}
    seen.clear()
    more = distill(views=None, **block).apply(taught, run)
    assert set(seen) == {16}
    assert not same(plain, more)


def test_a_pipeline_knows_the_images(run, tmp_path, extra):
    """One that is none is named before anything is trained; the stage is made again when they are others."""
    text = RECIPE.format(teacher="parent").partition("  - {use: quantize")[0]
    text = text.replace("{use: mobilenet_v2}", "{use: conftest:SmallNet}").replace("size: 32", "size: 16")
    text = text.replace("prune, goal: {macs: 0.5}", "prune, goal: {macs: 0.7}, round_to: 2")
    text = text.replace("teacher: parent", "epochs: 0, unlabeled: {path: extra}")
    (tmp_path / "recipe.yaml").write_text(text)
    loaded = recipe.load(tmp_path / "recipe.yaml")
    options = {"command": "x", "base": tmp_path}
    (extra / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt: is no readable image"):
        run_recipe(loaded, tmp_path / "out", Silent(), **options)
    assert list((tmp_path / "out" / "stages").iterdir()) == []
    (extra / "notes.txt").unlink()
    with chdir(tmp_path):
        assert run_recipe(loaded, tmp_path / "out", Silent(), **options).ran == ["00-load", "01-prune", "02-distill"]
        assert run_recipe(loaded, tmp_path / "out", Silent(), **options).ran == []
        (extra / "5.png").unlink()
        assert run_recipe(loaded, tmp_path / "out", Silent(), **options).ran == ["02-distill"]


def test_a_missing_folder_is_named(taught, run, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder or zip archive"):
        distill(unlabeled={"path": str(tmp_path / "nowhere")}).apply(taught, run)


@pytest.mark.parametrize("use", ["born_again", "assistants"])
def test_a_scheme_of_several_teachers_keeps_the_answers_of_the_first(product, run, tmp_path, use):
    narrow = prune_network(product.network, MacGoal(macs=0.6), Pruning(round_to=2, batchnorm_images=0), run=run)
    pruned = replace(product, network=narrow, parent=product.network)
    online = distill(scheme={"use": use}).apply(pruned, run)
    for _ in range(2):
        assert same(distill(scheme={"use": use}, cache=str(tmp_path / "answers")).apply(pruned, run), online)


def test_what_a_block_cannot_say():
    average = {"use": "moving_average"}
    with pytest.raises(ValidationError, match="`cache`: a teacher that changes"):
        Distillation(teacher=average, cache="x")
    both = {"use": "several", "teachers": ("parent", {"use": "itself"})}
    with pytest.raises(ValidationError, match="`attention` needs one of several teachers: set `features_from: 0`"):
        Distillation(teacher=both, losses=({"use": "attention"},))
    Distillation(teacher=both | {"features_from": 1}, losses=({"use": "attention"},), cache="x")
    with pytest.raises(ValidationError, match="`cache`: a teacher that changes"):
        Distillation(teacher=both | {"combine": "random"}, cache="x")


@pytest.mark.parametrize("use", ["data_free", "hard_examples"])
def test_generated_images_are_not_kept(use):
    for field, value in {"cache": "x", "unlabeled": {"path": "x"}}.items():
        with pytest.raises(ValidationError, match=f"`{use}` generates its images: .*`{field}`"):
            distill(views=None, scheme={"use": use}, **{field: value})


RECIPE = """
name: x
model: {{use: mobilenet_v2}}
data: {{use: digits}}
preprocess: {{size: 32}}
stages:
  - {{use: prune, goal: {{macs: 0.5}}}}
  - {{use: distill, teacher: {teacher}}}
  - {{use: quantize, distill: {{teacher: {teacher}}}}}
"""


def test_a_stage_that_a_recipe_does_not_have(tmp_path):
    file = tmp_path / "recipe.yaml"
    for teacher in (
        "{use: stage, folder: 00-load}",
        "{use: several, teachers: [parent, {use: stage, folder: 01-prune}]}",
    ):
        file.write_text(RECIPE.format(teacher=teacher))
        recipe.load(file)
    for teacher in (
        "{use: stage, folder: 02-distill}",
        "{use: several, teachers: [parent, {use: stage, folder: 02-distill}]}",
    ):
        file.write_text(RECIPE.format(teacher=teacher))
        with pytest.raises(
            RecipeError, match=r"no stage `02-distill` comes before this one; they are 00-load, 01-prune$"
        ):
            recipe.load(file)
