"""Digits, and with them every promise of the loader."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress import processes
from compress.data import Digits, open_data
from compress.data.augment import AugmentDigit, AugmentPhoto, random_crop
from compress.data.loader import ImageData
from compress.data.pixels import pixels
from compress.data.split import holdout
from compress.errors import DataError
from compress.product import Preprocess


class Silent:
    def steps(self, label, total):
        raise AssertionError("digits need no progress bar")

    def note(self, text):
        raise AssertionError(text)


def digits(size=16, crop=1.0, **settings) -> ImageData:
    chosen = Digits(use="digits", **settings)
    data = open_data(chosen, Preprocess(size=size, crop=crop), Silent(), Path.cwd())
    assert isinstance(data, ImageData)
    return data


@pytest.fixture(scope="module")
def data() -> ImageData:
    return digits()


def images(data, split="train", **options):
    batches = list(data.batches(split, **{"batch_size": 50, **options}))
    return torch.cat([b.images_NCHW for b in batches]), torch.cat([b.labels_N for b in batches])


def test_split_is_complete_stratified_and_fixed(data):
    assert data.count("train") + data.count("evaluation") == 1797
    assert data.labels == tuple("0123456789")
    part = np.bincount(data.evaluation.targets) / (
        np.bincount(data.evaluation.targets) + np.bincount(data.train.targets)
    )
    assert np.abs(part - 0.2).max() < 0.005
    assert digits().fingerprint == data.fingerprint
    seen = {data.evaluation.read(i, None).tobytes() for i in range(data.count("evaluation"))}
    assert not any(data.train.read(i, None).tobytes() in seen for i in range(data.count("train")))


def test_batches_are_channels_last_and_normalised_like_preprocess(data):
    batch = next(iter(data.batches("evaluation", batch_size=7)))
    assert batch.images_NCHW.shape == (7, 3, 16, 16)
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.images_NCHW.dtype == torch.float32
    assert batch.labels_N.dtype == torch.int64
    raw = np.stack([pixels(data.evaluation.read(i, None), data.preprocess) for i in range(7)])
    expected = data.preprocess.normalize(raw)
    assert (batch.images_NCHW.permute(0, 2, 3, 1).numpy() == expected).all()


def test_nchw_order_has_the_same_values(data):
    ordered, plain = (next(iter(d.batches("evaluation", batch_size=7))) for d in (data, data.in_nchw()))
    assert plain.images_NCHW.is_contiguous()
    assert torch.equal(ordered.images_NCHW, plain.images_NCHW)


def test_normalize_is_bit_equal_to_the_formula_in_numpy_and_torch():
    preprocess = Preprocess(size=16)
    raw = np.arange(256 * 3, dtype=np.int64).reshape(1, 16, 16, 3) % 256
    raw = np.concatenate([np.roll(raw, shift) for shift in range(3)]).astype(np.uint8)
    expected = preprocess.normalize(raw)
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    assert ((raw.astype(np.float32) / np.float32(255) - mean) / std == expected).all()
    by_torch = (torch.from_numpy(raw).float() / 255 - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    assert (by_torch.numpy() == expected).all()


def test_evaluation_has_every_image_once_in_a_stable_order(data):
    first, labels = images(data, "evaluation")
    again, _ = images(data, "evaluation", seed=5, epoch=3, batch_size=64)
    assert len(first) == data.count("evaluation")
    assert torch.equal(first, again)
    assert labels.tolist() == data.evaluation.targets.tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_same_batches_for_any_number_of_workers(data, workers):
    options = {"augment": True, "shuffle": True, "seed": 3, "epoch": 2}
    ours, theirs = images(data, **options), images(digits(workers=workers), **options)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_augmentation_and_order_change_with_seed_and_epoch(data):
    base, _ = images(data, augment=True, limit=60)
    assert torch.equal(base, images(data, augment=True, limit=60)[0])
    assert not torch.equal(base, images(data, augment=True, limit=60, epoch=1)[0])
    order = images(data, shuffle=True)[1]
    assert not torch.equal(order, images(data, shuffle=True, epoch=1)[1])
    assert not torch.equal(order, images(data, shuffle=True, seed=1)[1])


def test_shuffle_drops_the_incomplete_batch_but_never_everything(data):
    sizes = [len(b.labels_N) for b in data.batches("train", batch_size=100, shuffle=True)]
    assert sizes == [100] * (data.count("train") // 100)
    assert [len(b.labels_N) for b in data.batches("train", batch_size=64, shuffle=True, limit=20)] == [20]


def test_limit_spreads_over_classes(data):
    _, labels = images(data, limit=45, seed=1)
    counts = torch.bincount(labels)
    assert counts.sum() == 45
    assert set(counts.tolist()) == {4, 5}
    assert not torch.equal(images(data, limit=45, seed=1)[0], images(data, limit=45, seed=2)[0])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 6, 7, 50])
@pytest.mark.parametrize("limit", [13, 43, None])
def test_ranks_share_the_evaluation(data, world_size, batch_size, limit):
    whole, _ = images(data, "evaluation", limit=limit)
    shares = [
        list(data.batches("evaluation", batch_size=batch_size, limit=limit, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch.labels_N) <= batch_size for share in shares for batch in share)
    together = torch.cat([batch.images_NCHW for share in shares for batch in share])
    assert sorted(map(_bytes, together)) == sorted(map(_bytes, whole))


def _bytes(image):
    return image.numpy().tobytes()


def test_ranks_share_training_images_with_the_same_augmentation(data):
    options = {"augment": True, "shuffle": True, "batch_size": 10}
    alone = sorted(map(_bytes, images(data, **options | {"batch_size": 1})[0]))
    shares = [list(map(_bytes, images(data, **options, rank=r, world_size=2)[0])) for r in range(2)]
    assert len(shares[0]) == len(shares[1]) == data.count("train") // 2 // 10 * 10
    assert not set(shares[0]) & set(shares[1])
    assert set(shares[0] + shares[1]) <= set(alone)


def test_too_many_ranks(data):
    with pytest.raises(DataError, match="3 images cannot be shared by 4 processes"):
        list(data.batches("train", batch_size=1, limit=3, world_size=4))


def test_a_loop_may_stop_early_with_workers():
    for _ in digits(workers=2).batches("train", batch_size=10):
        break


def test_pixels_resize_then_crop():
    wide = Image.new("RGB", (60, 20))
    wide.paste((255, 0, 0), (20, 0, 40, 20))
    assert (pixels(wide, Preprocess(size=20, crop=1.0)) == (255, 0, 0)).all()
    gradient = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8))
    resized = gradient.resize((37, 37), Image.Resampling.BILINEAR)  # round(32 / 0.875)
    expected = np.array(resized)[2:34, 2:34]
    assert (pixels(gradient, Preprocess(size=32)) == expected).all()


def test_neutral_augmentation_changes_nothing():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8))
    preprocess = Preprocess(size=24, crop=1.0)
    still = AugmentDigit(rotate_degrees=0, shift=0)
    assert (still(picture, preprocess, np.random.default_rng(0)) == np.array(picture)).all()
    plain = AugmentPhoto(crop_scale=(1.0, 1.0), flip=False, color=0)
    assert plain(picture, preprocess, np.random.default_rng(0)).shape == (24, 24, 3)
    faint = AugmentPhoto(crop_scale=(1.0, 1.0), flip=False, color=1e-9)
    one, other = (change(picture, preprocess, np.random.default_rng(4)) for change in (plain, faint))
    assert (one == other).all()


def test_random_crop_keeps_a_flat_image_flat():
    rng = np.random.default_rng(0)
    for _ in range(50):
        crop = random_crop(Image.new("RGB", (40, 20), (9, 8, 7)), 16, (0.1, 1.0), rng)
        assert (np.array(crop) == (9, 8, 7)).all()


def test_crop_scale_in_order():
    with pytest.raises(ValueError, match="from the smaller part to the larger"):
        AugmentPhoto(crop_scale=(0.9, 0.5))


def test_holdout_keeps_equal_images_together():
    hashes = ["a", "a", "b", "c", "d", "x", "y"]
    kept = holdout(hashes, np.array([0, 0, 0, 0, 0, 1, 1]), 0.25)
    assert kept.tolist() == [True, True, False, False, False, True, False]


def test_batches_for_a_gpu_are_pinned_by_the_threads(data, monkeypatch):
    """Stands in for a machine with a GPU: what is pinned, in which thread, and that its values stay."""
    expected = next(iter(data.batches("train", batch_size=5)))
    pinned = []

    def pin_memory(tensor):
        pinned.append((threading.current_thread() is threading.main_thread(), tensor.is_contiguous()))
        return tensor.clone()

    monkeypatch.setattr(processes, "own_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    batch = next(iter(digits(workers=2).batches("train", batch_size=5)))
    assert pinned
    assert set(pinned) == {(False, True)}
    assert torch.equal(batch.images_NCHW, expected.images_NCHW)
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
