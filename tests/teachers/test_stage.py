"""A network of an earlier stage of the same run as teacher: through the pipeline, and each way to name it wrongly."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized

from compress import checkpoint
from compress.errors import ModelError
from compress.product import Network, Structure
from compress.teachers.stage import Stage, mistake

STRUCTURE = Structure(model={"use": "conftest:SmallNet", "weights": None}, num_classes=5, preprocess=PREPROCESS)


@pytest.fixture
def stages(run, tmp_path):
    """A run that is at its fifth stage: it came, was trained, exported (which changes no network), and distilled."""
    root = tmp_path / "run" / "stages"
    for seed, (name, left) in enumerate(
        {"00-load": "00-load", "01-train": "01-train", "02-export": "01-train", "03-distill": "03-distill"}.items()
    ):
        (root / name).mkdir(parents=True)
        if left == name:
            checkpoint.save(Network(randomized(SmallNet(), seed), STRUCTURE), root / name / "network")
        facts = {"product": {"network": f"stages/{left}/network"}}
        (root / name / "manifest.json").write_text(json.dumps(facts))
    (root / "04-distill.partial").mkdir()
    # What a longer run left in this place, and what a stage that failed left.
    (root / "05-train").mkdir()
    (root / "05-train" / "manifest.json").write_text("{}")
    (root / "03-train.partial").mkdir()
    return replace(run, folder=root / "04-distill.partial", stage="04-distill")


@pytest.mark.parametrize(
    ("folder", "seed"), [("00-load", 0), ("01-train", 1), ("02-export", 1), ("03-distill", 3)], ids=str
)
def test_the_network_that_a_stage_left(product, stages, folder, seed):
    teacher = Stage(use="stage", folder=folder).open(product, stages)
    batch = next(iter(stages.data.batches("train", batch_size=8)))
    expected = checkpoint.load(stages.folder.parent / f"0{seed}-{['load', 'train', '', 'distill'][seed]}" / "network")
    assert torch.equal(teacher.network.module.stem.weight, expected.module.stem.weight)
    torch.testing.assert_close(
        teacher.answers(batch, ()).logits_NK, expected.module(batch.images_NCHW), rtol=1e-4, atol=1e-5
    )
    assert teacher.related
    assert Stage(use="stage", folder=folder).folders() == ()


@pytest.mark.parametrize(
    "folder", ["01-prune", "04-distill", "05-train", "03-train", "distill", "", "../x", "01-train/network"]
)
def test_a_stage_that_is_not_before_is_refused(product, stages, folder):
    match = f"stage 04-distill: teacher: no stage `{folder}` comes before this one; they are 00-load, 01-train, 02-exp"
    with pytest.raises(ModelError, match=match):
        Stage(use="stage", folder=folder).open(product, stages)


def test_another_task_is_refused(product, stages):
    small = STRUCTURE.model_copy(update={"num_classes": 3})
    checkpoint.save(Network(SmallNet(3), small), stages.folder.parent / "03-distill" / "network")
    with pytest.raises(ModelError, match="knows 3 classes, the data has 5"):
        Stage(use="stage", folder="03-distill").open(product, stages)


def test_mistakes_in_a_recipe():
    """Before anything is trained, from the names of the stages alone."""
    assert mistake("00-load", []) is None
    assert mistake("02-prune", ["train", "prune"]) is None
    for folder in ("02-train", "03-distill", "01-prune", "train", ""):
        text = mistake(folder, ["train", "prune"])
        assert text == f"no stage `{folder}` comes before this one; they are 00-load, 01-train, 02-prune"
