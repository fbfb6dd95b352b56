import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from PIL import Image

from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.product import Network, Run
from compress.stages.distill import Distill
from compress.teaching import Distillation, objective


@pytest.fixture
def photographs(run: Run) -> Run:
    """The run on 40 real images with real augmentation: flips and crops."""
    images = np.random.default_rng(5).integers(0, 256, (40, 24, 24, 3), np.uint8)
    split = Images(np.arange(40) % 5, lambda index, _: Image.fromarray(images[index]))
    return replace(run, data=ImageData(("a", "b", "c", "d", "e"), PREPROCESS, "noise", split, split, AugmentPhoto(), 0))


def settings(**values: Any) -> Distill:
    return Distill(**{"use": "distill", "epochs": 5, "batch_size": 8, "lr": 0.02, **values})


@pytest.mark.parametrize("views", [None, 2])
def test_the_teacher_never_moves_and_the_student_nears_it(photographs, product, views):
    teacher = Network(randomized(SmallNet(), seed=9), product.network.structure)
    before = copy.deepcopy(teacher.module.state_dict())
    product = replace(product, parent=teacher)
    distill = settings(views=views, epochs=8, losses=({"use": "l2", "weight": 1.0},), labels=0.0)
    distilled = distill.apply(product, photographs)
    assert all(torch.equal(before[name], value) for name, value in teacher.module.state_dict().items())
    images = next(iter(photographs.data.batches("train", batch_size=40))).images_NCHW

    def distance(network: Network) -> float:
        return (network.module(images) - teacher.module(images)).square().mean().item()

    assert distance(distilled.network) < 0.7 * distance(product.network)


def test_the_folded_teacher_gives_the_parents_logits(photographs, product):
    """BatchNorm folded into its weights; a teacher that cannot be traced teaches as it is."""

    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    batch = next(iter(photographs.data.batches("train", batch_size=8)))
    student = randomized(SmallNet(), seed=3)
    for module in (randomized(SmallNet(), seed=9), randomized(Branching(), seed=9)):
        taught = replace(product, parent=Network(module, product.network.structure))
        only = Distillation(losses=({"use": "l2", "weight": 1.0},), labels=0.0)
        value = objective(only, taught, photographs, student=student).loss(student, batch)
        expected = 0.5 * (student(batch.images_NCHW) - module(batch.images_NCHW)).square().sum(1).mean()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
