import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from PIL import Image
from torch import nn

from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.errors import DataError
from compress.product import Batch, Network, Run
from compress.stages.distill import Distill, Distillation, Remembered, objective
from compress.training import fit


class Counting(nn.Module):
    """A network that counts the images it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.network(x)

    def __call__(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return super().__call__(batch.images_NCHW)


@pytest.fixture
def photographs(run: Run) -> Run:
    """The run on 40 real images with real augmentation: flips and crops."""
    images = np.random.default_rng(5).integers(0, 256, (40, 24, 24, 3), np.uint8)
    split = Images(np.arange(40) % 5, lambda index, _: Image.fromarray(images[index]))
    return replace(run, data=ImageData(("a", "b", "c", "d", "e"), PREPROCESS, "noise", split, split, AugmentPhoto(), 0))


def settings(**values: Any) -> Distill:
    return Distill(**{"use": "distill", "epochs": 5, "batch_size": 8, "lr": 0.02, **values})


def test_views_repeat_pixel_by_pixel_while_the_order_changes(photographs):
    def pixels(epoch: int, view: int | None) -> dict[int, bytes]:
        batches = photographs.data.batches("train", batch_size=8, augment=True, shuffle=True, epoch=epoch, view=view)
        seen = {}
        for batch in batches:
            assert batch.view == (epoch if view is None else view)
            for image, index, label in zip(batch.images_NCHW, batch.indices_N, batch.labels_N, strict=True):
                assert int(label) == int(index) % 5
                seen[int(index)] = image.numpy().tobytes()
        return seen

    first, again, other, plain = pixels(0, 0), pixels(2, 0), pixels(1, 1), pixels(1, None)
    assert first == again
    assert list(first) != list(again)
    assert other == plain
    assert all(first[index] != other[index] for index in first)


def test_remembering_changes_no_weight_and_asks_the_teacher_once_for_each_view(photographs, product):
    """Two views in five epochs, shuffled: the same bytes as with a teacher that looks every time."""
    teacher = randomized(SmallNet(), seed=9)
    module = product.network.module
    trained, seen = [], []
    for remembers in (False, True):
        counting = Counting(copy.deepcopy(teacher))
        answers = Remembered(counting, 40, 2) if remembers else counting

        def loss(student, batch, answers=answers):
            return (student(batch.images_NCHW) - answers(batch)).square().mean()

        trained.append(fit(module, loss=loss, run=photographs, settings=settings(), label="x", views=2)[0])
        seen.append(sum(counting.seen))
    assert seen == [5 * 40, 2 * 40]
    online, remembered = (network.state_dict() for network in trained)
    assert all(torch.equal(online[name], remembered[name]) for name in online)


def test_each_process_asks_for_the_images_it_meets_first(photographs):
    """Shares change by epoch: what a process has not seen of a view is asked for, the rest is not."""
    counting = Counting(randomized(SmallNet(), seed=9))
    remembered = Remembered(counting, 40, 1)
    known: set[int] = set()
    for epoch in range(6):
        options = {"shuffle": True, "epoch": epoch, "rank": 1, "world_size": 2, "view": 0}
        for batch in photographs.data.batches("train", batch_size=8, augment=True, **options):
            before = sum(counting.seen)
            answers = remembered(batch)
            assert sum(counting.seen) - before == len(set(batch.indices_N.tolist()) - known)
            known |= set(batch.indices_N.tolist())
            torch.testing.assert_close(answers, counting.network(batch.images_NCHW))
    assert len(known) > 20


def test_data_without_numbers_is_refused():
    batch = Batch(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="`views` needs data that numbers its images"):
        Remembered(Counting(SmallNet()), 2, 1)(batch)


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
        value = objective(only, taught, photographs)(student, batch)
        expected = 0.5 * (student(batch.images_NCHW) - module(batch.images_NCHW)).square().sum(1).mean()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
