"""Unlabelled images beside labelled ones, and each way in which they can be wrong."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import Notes, picture
from PIL import Image
from pydantic import ValidationError

from compress.data import Folder, open_data
from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images, spread
from compress.data.sample import sample
from compress.data.split import alike
from compress.data.unlabeled import Unlabeled, WithUnlabeled, fingerprint_of, numbered, turns, with_unlabeled
from compress.errors import DataError
from compress.product import NO_LABEL, Preprocess
from compress.product import labelled as known

PREPROCESS = Preprocess(size=8)


@pytest.fixture
def labelled() -> ImageData:
    """12 images for training and 6 for evaluation, of three classes."""
    images = [picture(seed) for seed in range(18)]
    train = Images(np.arange(12) % 3, lambda index, _: images[index])
    evaluation = Images(np.arange(6) % 3, lambda index, _: images[12 + index])
    return ImageData(("a", "b", "c"), PREPROCESS, "0" * 64, train, evaluation, AugmentPhoto(), 0)


@pytest.fixture
def folder(tmp_path):
    """Seven images at any depth, and what a system leaves behind."""
    root = tmp_path / "extra"
    for number, place in enumerate(("", "", "deep", "deep/er", "deep/er", "train/x", "z")):
        (root / place).mkdir(parents=True, exist_ok=True)
        picture(100 + number).save(root / place / f"{number}.png")
    (root / ".DS_Store").write_bytes(b"junk")
    return root


def opened(data, path, progress=None, checked=None, **settings) -> WithUnlabeled:
    chosen = Unlabeled(**{"path": str(path), "workers": 0, **settings})
    return with_unlabeled(data, chosen, progress or Notes(), path.parent, checked)


def training(data, **options):
    return list(data.batches("train", **{"batch_size": 4, "augment": True, "shuffle": True, "seed": 5, **options}))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.25, 0.01])
def test_unlabelled_images_end_every_training_batch(labelled, folder, ratio, workers):
    data = opened(labelled, folder, ratio=ratio, workers=workers)
    extra = {1.0: 4, 0.5: 2, 2.25: 9, 0.01: 1}[ratio]
    plain, longer = training(labelled, epoch=2), training(data, epoch=2)
    assert len(plain) == len(longer) == 3
    for short, long in zip(plain, longer, strict=True):
        assert len(long.images_NCHW) == len(long.labels_N) == len(long.indices_N) == 4 + extra
        assert torch.equal(long.images_NCHW[:4], short.images_NCHW)
        assert torch.equal(long.labels_N[:4], short.labels_N)
        assert torch.equal(long.indices_N[:4], short.indices_N)
        assert (long.labels_N[4:] == NO_LABEL).all()
        assert (long.indices_N[4:] >= 12).all()
        assert (long.indices_N[4:] < numbered(data)).all()
        assert long.view == short.view == 2
        assert long.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert numbered(data) == 12 + 7
    assert numbered(labelled) == 12


def test_the_labelled_images_alone_are_counted_sampled_and_judged(labelled, folder, run):
    data = opened(labelled, folder)
    assert (data.count("train"), data.count("evaluation")) == (12, 6)
    assert (data.labels, data.preprocess) == (labelled.labels, labelled.preprocess)
    for options in ({"split": "evaluation"}, {"split": "evaluation", "shuffle": True}, {"split": "train"}):
        split = options.pop("split")
        pairs = zip(
            data.batches(split, batch_size=4, **options), labelled.batches(split, batch_size=4, **options), strict=True
        )
        assert all(torch.equal(ours.images_NCHW, theirs.images_NCHW) for ours, theirs in pairs)
    drawn = list(sample(replace(run, data=data), 8, batch_size=4))
    assert [len(batch.labels_N) for batch in drawn] == [4, 4]
    assert all((batch.labels_N != NO_LABEL).all() for batch in drawn)


def test_pixels_are_those_of_the_files(labelled, folder):
    """Without augmentation; a zip archive of the same files is the same data."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, "extra/" + file.relative_to(folder).as_posix())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    alone = ImageData(
        ("x",), PREPROCESS, "", *2 * [Images(np.zeros(7, np.int64), lambda i, _: Image.open(folder / names[i]))],
        AugmentPhoto(), 0,
    )  # fmt: skip
    expected = next(iter(alone.batches("train", batch_size=7))).images_NCHW
    first, second = (opened(labelled, path, ratio=1.75) for path in (folder, archive))
    assert first.fingerprint == second.fingerprint
    for data in (first, second):
        batch = training(data, augment=False)[0]
        extra = batch.indices_N[4:] - 12
        assert sorted(extra.tolist()) == list(range(7))
        assert torch.equal(batch.images_NCHW[4:], expected[extra])


def test_views_repeat_the_unlabelled_pixels_too(labelled, folder):
    def pixels(**options):
        seen = {}
        for batch in training(opened(labelled, folder), **options):
            for image, index in zip(batch.images_NCHW, batch.indices_N.tolist(), strict=True):
                assert seen.setdefault(index, image.numpy().tobytes()) == image.numpy().tobytes()
        return seen

    first, again, other = pixels(epoch=0, view=0), pixels(epoch=4, view=0), pixels(epoch=0, view=1)
    both = first.keys() & again.keys()
    assert max(both) >= 12
    assert all(first[index] == again[index] for index in both)
    assert all(first[index] != other[index] for index in first)
    assert pixels(epoch=0, view=0) == first
    assert pixels(epoch=0, view=0, seed=6).keys() != first.keys() or pixels(epoch=0, view=0, seed=6) != first


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_one_order_that_goes_on_from_epoch_to_epoch(labelled, folder, world_size):
    """The extra images of all processes, step by step, are the rounds of one order: each image equally often."""
    data = opened(labelled, folder, ratio=1.0)
    options = {"batch_size": 2, "world_size": world_size}
    steps = 12 // world_size // 2
    seen = []
    for epoch in range(3):
        shares = [training(data, epoch=epoch, rank=rank, **options) for rank in range(world_size)]
        assert {len(share) for share in shares} == {steps}
        for together in zip(*shares, strict=True):
            seen += [index for batch in together for index in batch.indices_N[2:].tolist()]
    rounds = [seen[start : start + 7] for start in range(0, len(seen) - 6, 7)]
    assert len(rounds) >= 5
    assert all(sorted(order) == list(range(12, 19)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_turns_with_fewer_images_than_a_group():
    groups = turns(2, 5, seed=0, first=0, rank=0, world_size=1)
    assert sorted(np.concatenate([next(groups) for _ in range(2)]).tolist()) == [0] * 5 + [1] * 5


def test_the_fingerprint_knows_every_image(labelled, folder):
    before = opened(labelled, folder)
    assert before.fingerprint not in (labelled.fingerprint, before.unlabelled.fingerprint)
    assert opened(replace(labelled, fingerprint="1" * 64), folder).fingerprint != before.fingerprint
    picture(999).save(folder / "z" / "6.png")
    assert opened(labelled, folder).fingerprint != before.fingerprint


def test_checked_images_are_not_decoded_again(labelled, folder):
    first, second, third = Notes(), Notes(), Notes()
    checked = opened(labelled, folder, first).unlabelled.fingerprint
    opened(labelled, folder, second, checked)
    opened(labelled, folder, third, "another")
    assert fingerprint_of(Unlabeled(path="extra"), Notes(), folder.parent) == checked
    assert first.bars == ["checking images"]
    assert second.bars == ["hashing images"]
    assert third.bars == ["hashing images", "checking images"]


def test_augmentation_of_its_own_or_that_of_the_labelled_images(labelled, folder):
    still = AugmentPhoto(crop_scale=(1.0, 1.0), flip=False, color=0.0)
    assert opened(replace(labelled, augment=still), folder).unlabelled.augment == still
    assert opened(labelled, folder, augment=still).unlabelled.augment == still


def test_in_nchw(labelled, folder):
    data = opened(labelled, folder).in_nchw()
    assert not data.channels_last
    assert all(batch.images_NCHW.is_contiguous() for batch in training(data))


def test_images_of_the_evaluation_are_left_out(tmp_path):
    """The same bytes under another name: a teacher's answer to them would be training on the evaluation."""
    for number, place in enumerate(("train/a/0", "train/b/1", "val/a/2", "val/b/3")):
        (tmp_path / "photos" / place).parent.mkdir(parents=True)
        picture(number).save(tmp_path / f"photos/{place}.png")
    extra = tmp_path / "extra"
    extra.mkdir()
    picture(2).save(extra / "again.png")
    data = open_data(Folder(use="folder", path="photos", workers=0), PREPROCESS, Notes(), tmp_path)
    with pytest.raises(DataError, match="has only images that are in the evaluation too"):
        opened(data, extra)
    picture(0).save(extra / "training.png")
    picture(50).save(extra / "new.png")
    progress = Notes()
    assert len(opened(data, extra, progress).unlabelled.train.targets) == 2
    assert progress.notes == ["1 unlabelled images left out that are in the evaluation, such as again.png"]


def test_mistakes_are_refused(labelled, folder, tmp_path):
    with pytest.raises(DataError, match="no such folder or zip archive"):
        opened(labelled, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images; `unlabeled` needs a folder"):
        opened(labelled, tmp_path / "empty")
    (folder / "deep" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt: is no readable image"):
        opened(labelled, folder)
    for wrong in ({"path": ""}, {"path": "x", "ratio": 0.0}, {"path": "x", "workers": -1}, {"path": "x", "weight": 1}):
        with pytest.raises(ValidationError):
            Unlabeled(**wrong)


def test_images_without_labels_beside_several_labels_each(labelled, folder):
    """Their rows are NaN, which no loss takes for a number; `labelled` tells them apart in every task."""
    bits = np.stack([np.arange(12) % 2, np.ones(12)], 1).astype(np.float32)
    several = replace(
        labelled, labels=("x", "y"), task="multi_label", train=replace(labelled.train, targets=bits),
        evaluation=replace(labelled.evaluation, targets=bits[:6]),
    )  # fmt: skip
    for batch in training(opened(several, folder)):
        assert (batch.labels_N.dtype, batch.labels_N.shape) == (torch.float32, (8, 2))
        assert batch.labels_N[4:].isnan().all()
        assert known(batch.labels_N).tolist() == [True] * 4 + [False] * 4
        assert torch.equal(batch.labels_N[:4], torch.from_numpy(bits)[batch.indices_N[:4]])
    for batch in training(opened(labelled, folder)):
        assert known(batch.labels_N).tolist() == [True] * 4 + [False] * 4


def test_a_choice_is_spread_over_labels_and_over_numbers():
    rare = np.zeros((40, 3), np.float32)
    rare[:, 0] = 1
    rare[5, 1] = rare[6, 2] = 1
    groups = alike(rare, "multi_label")
    assert (groups[5], groups[6]) == (1, 2)
    assert set(groups[[n for n in range(40) if n not in (5, 6)]]) == {0}
    assert alike(np.zeros((3, 2), np.float32), "multi_label").tolist() == [-1, -1, -1]
    assert {5, 6} <= set(spread(groups, 6, 0).tolist())
    numbers = np.random.default_rng(0).permutation(100).astype(np.float32)[:, None]
    assert np.array_equal(alike(numbers, "regression"), numbers[:, 0] // 10)
    chosen = numbers[spread(alike(numbers, "regression"), 10, 3), 0]
    assert sorted(chosen // 10) == list(range(10))
