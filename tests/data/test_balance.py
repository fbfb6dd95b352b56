"""Classes of unequal size, drawn equally often or weighted, the same whatever the number of processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import Notes, picture
from torch.nn import functional as F

from compress.data import Csv, open_data
from compress.data.augment import AugmentPhoto
from compress.data.balance import drawn_equally, effective_weights
from compress.data.loader import ImageData, Images
from compress.errors import DataError
from compress.product import Preprocess
from compress.tasks.classification import balanced_accuracy
from compress.training import outputs_loss

CLASSES = np.repeat([0, 1, 2], [40, 5, 15])
IMAGES = [picture(seed, (16, 16)) for seed in range(60)]


def data(balance="sampler", workers=0) -> ImageData:
    split = Images(CLASSES, lambda index, _: IMAGES[index])
    return ImageData(
        ("a", "b", "c"), Preprocess(size=8), "0" * 64, split, split, AugmentPhoto(), workers, balance=balance
    )


def drawn(epochs, groups=CLASSES, seed=4):
    return [drawn_equally(groups, seed=seed, epoch=epoch) for epoch in range(epochs)]


def test_every_class_is_drawn_equally_often():
    for groups in (CLASSES, np.repeat([0, 1, 2], [41, 5, 15]), np.repeat([-1, 3], [3, 8])):
        for numbers in drawn(4, groups):
            often = [int((groups[numbers % len(groups)] == label).sum()) for label in np.unique(groups)]
            assert sum(often) == len(groups)
            assert max(often) - min(often) <= 1


def test_no_image_comes_a_third_time_before_all_of_its_class_came_twice():
    """Over epochs: the draws of a class are whole rounds over its images."""
    for label in range(3):
        members = np.flatnonzero(label == CLASSES)
        seen = [index for numbers in drawn(9) for index in (numbers % 60).tolist() if CLASSES[index] == label]
        often = np.bincount(seen, minlength=60)[members]
        assert often.max() - often.min() <= 1
        assert often.min() >= 2


def test_repetitions_in_an_epoch_are_numbered():
    for numbers in drawn(3):
        for index in range(60):
            assert sorted((numbers[numbers % 60 == index] // 60).tolist()) == list(range((numbers % 60 == index).sum()))


def test_seed_and_epoch_alone_decide():
    assert all(map(np.array_equal, drawn(3), drawn(3)))
    assert not np.array_equal(*drawn(2))
    assert not np.array_equal(drawn(1)[0], drawn(1, seed=5)[0])


def rows(batches):
    return sorted(
        (index, image.numpy().tobytes())
        for batch in batches
        for index, image in zip(batch.indices_N.tolist(), batch.images_NCHW, strict=True)
    )


def training(given, **options):
    options = {"batch_size": 5, "augment": True, "shuffle": True, "seed": 4, "epoch": 1, **options}
    return list(given.batches("train", **options))


def test_processes_and_threads_share_the_same_images():
    alone = rows(training(data()))
    assert len(alone) == 60
    assert rows(training(data(workers=2))) == alone
    for world_size in (2, 3):
        shares = [training(data(), rank=rank, world_size=world_size) for rank in range(world_size)]
        assert rows(batch for share in shares for batch in share) == alone
    # Five images for twenty draws: each of them comes four times, every time with another augmentation.
    rare = [image for index, image in alone if CLASSES[index] == 1]
    assert len(rare) == len(set(rare)) == 20


def test_a_view_keeps_its_promise():
    """The same images and view are the same pixels: what a teacher's kept answers rely on."""
    seen = {}
    for epoch in range(3):
        for index, image in rows(training(data(), epoch=epoch, view=7)):
            assert seen.setdefault(index, image) == image


def test_all_that_is_not_training_stays_as_it_is():
    ours, plain = data(), data("none")
    for options in (
        {"split": "evaluation"},
        {"split": "train"},
        {"split": "train", "shuffle": True, "limit": 12, "seed": 3},
        {"split": "evaluation", "shuffle": True},
    ):
        pair = [rows(given.batches(batch_size=5, **options)) for given in (ours, plain)]
        assert pair[0] == pair[1]
    assert rows(training(data("loss"))) == rows(training(plain))


def test_effective_numbers():
    """Against the definition in rational arithmetic; few images: the inverse of their number; many: all alike."""
    weights = effective_weights(np.array([1, 10, 100]))
    exact = np.array([1 / sum(0.999**k for k in range(n)) for n in (1, 10, 100)])
    assert weights == pytest.approx(exact / exact.mean(), rel=1e-9)
    assert effective_weights(np.array([50_000, 100_000])) == pytest.approx([1, 1], rel=1e-6)
    assert effective_weights(np.array([7, 7, 7])) == pytest.approx([1, 1, 1])


def test_the_loss_weighs_classes():
    given = data("loss")
    assert given.label_weights == pytest.approx(effective_weights(np.array([40, 5, 15])).tolist())
    assert data("none").label_weights is data("sampler").label_weights is None
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(30) % 3
    each = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.tensor(given.label_weights, dtype=torch.float64)[labels]
    assert float(outputs_loss(given)(logits, labels)) == pytest.approx(
        float((each * weights).sum() / weights.sum()), rel=1e-6
    )
    assert float(outputs_loss(data("none"))(logits, labels)) == pytest.approx(float(each.mean()))
    bits = np.stack([CLASSES == 1, CLASSES != 1], 1).astype(np.float32)
    tags = replace(given, task="multi_label", labels=("x", "y"), train=replace(given.train, targets=bits))
    assert tags.label_weights == pytest.approx((11.0, 5 / 55))


def test_balanced_accuracy():
    labels = np.repeat([0, 1], [90, 10])
    assert balanced_accuracy(np.zeros(100, np.int64), labels) == 0.5
    assert balanced_accuracy(labels, labels) == 1
    even = np.arange(40) % 4
    said = np.random.default_rng(0).integers(0, 4, 40)
    assert balanced_accuracy(said, even) == pytest.approx(float((said == even).mean()))


def test_numbers_have_no_classes_to_balance(tmp_path):
    lines = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number}")
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    settings = Csv(use="csv", path=str(tmp_path / "t.csv"), task="regression", holdout=0.3, balance="loss")
    with pytest.raises(DataError, match="`balance` is for classes and labels; leave it out of a regression"):
        open_data(settings, Preprocess(size=8), Notes(), tmp_path)
