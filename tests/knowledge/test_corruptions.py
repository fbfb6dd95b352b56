"""Corruptions: the same each time, worse from severity to severity, and what they say they are."""

import numpy as np
import pytest

from compress.knowledge import corruptions
from compress.knowledge.corruptions import CORRUPTIONS, SEVERITIES, TABLE, corrupt


def photographs(side: int, count: int = 4) -> np.ndarray:
    """Smooth colours with edges and a fine texture, neither black nor white."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[0:side, 0:side] / side
    images = []
    for _ in range(count):
        waves = [np.sin(6.28 * (rng.uniform(1, 3) * x + rng.uniform(1, 3) * y) + rng.uniform(0, 6)) for _ in range(3)]
        image = np.stack(waves, 2) * 60 + 128 + 40 * (x > rng.uniform(0.3, 0.7))[..., None]
        images.append((image + rng.normal(scale=8, size=image.shape)).clip(5, 250).astype(np.uint8))
    return np.stack(images)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def corrupted(images: np.ndarray, name: corruptions.Corruption, severity: int, seed: int = 0) -> np.ndarray:
    return np.stack([corrupt(image, name, severity, seed=seed, image=i) for i, image in enumerate(images)])


@pytest.mark.parametrize("side", [16, 32, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_further_from_the_image(name, side):
    images = photographs(side)
    distances = [distance(images, corrupted(images, name, severity)) for severity in SEVERITIES]
    assert distances[0] > 0
    assert distances == sorted(set(distances)), distances
    result = corrupted(images, name, 3)
    assert result.dtype == np.uint8
    assert result.shape == images.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_and_image_decide_every_pixel(name):
    image = photographs(32, 1)[0]
    first = corrupt(image, name, 4, seed=3, image=7)
    assert np.array_equal(first, corrupt(image.copy(), name, 4, seed=3, image=7))
    random = name in ("gaussian_noise", "shot_noise", "motion_blur", "fog")
    assert np.array_equal(first, corrupt(image, name, 4, seed=4, image=7)) != random
    assert np.array_equal(first, corrupt(image, name, 4, seed=3, image=8)) != random


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_stay_images(name, value):
    plain = np.full((16, 16, 3), value, np.uint8)
    for severity in (1, 5):
        found = corrupt(plain, name, severity, seed=0, image=0)
        assert found.dtype == np.uint8
        if name in ("gaussian_blur", "motion_blur", "pixelate", "contrast"):
            assert np.array_equal(found, plain)  # there is nothing to blur


def test_settings_are_those_of_the_two_benchmarks_and_lie_between_them():
    for small, large in ((small[i], large[i]) for _, small, large in TABLE.values() for i in range(5)):
        assert corruptions._between(small, large, 32) == small
        assert corruptions._between(small, large, 8) == small
        assert corruptions._between(small, large, 224) == pytest.approx(large)
        assert corruptions._between(small, large, 500) == pytest.approx(large)
        middle = corruptions._between(small, large, round((32 * 224) ** 0.5))
        assert middle == pytest.approx(
            [(one * other) ** 0.5 for one, other in zip(small, large, strict=True)], rel=0.01
        )


def test_noise_has_the_spread_it_says():
    grey = np.full((96, 96, 3), 128 / 255)
    rng = np.random.default_rng(0)
    assert np.std(corruptions.gaussian_noise(grey, (0.1,), rng)) == pytest.approx(0.1, rel=0.02)
    shot = corruptions.shot_noise(grey, (50.0,), rng)
    assert np.mean(shot) == pytest.approx(128 / 255, rel=0.01)
    assert np.std(shot) == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.02)  # a Poisson count's variance is its mean


def test_blur_is_the_convolution_written_out():
    image = np.random.default_rng(0).uniform(size=(9, 9, 3))
    sigma, half = 0.8, 4
    row = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    kernel = np.outer(row, row) / row.sum() ** 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="symmetric")
    expected = np.zeros_like(image)
    for y in range(9):
        for x in range(9):
            expected[y, x] = (padded[y : y + 9, x : x + 9] * kernel[..., None]).sum((0, 1))
    found = corruptions.gaussian_blur(image, (sigma,), np.random.default_rng(0))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_motion_leaves_a_trace_on_one_side_only():
    point = np.zeros((33, 33, 3))
    point[16, 16] = 1
    trace = corruptions.motion_blur(point, (3.0,), np.random.default_rng(1))[..., 0]
    assert trace.sum() == pytest.approx(1)
    assert trace[:, :16].max() == pytest.approx(0, abs=1e-12)
    weight = trace.sum(0)[16:24]
    assert (np.diff(weight[1:]) < 0).all()  # fading


def test_brightness_keeps_the_hue_and_contrast_the_mean():
    image = photographs(16, 1)[0] / 255
    rng = np.random.default_rng(0)
    brighter = corruptions.brightness(image, (0.05,), rng)
    np.testing.assert_allclose(brighter.max(2), np.minimum(image.max(2) + 0.05, 1))
    np.testing.assert_allclose(brighter / brighter.max(2, keepdims=True), image / image.max(2, keepdims=True))
    flat = corruptions.contrast(image, (0.25,), rng)
    np.testing.assert_allclose(flat.mean((0, 1)), image.mean((0, 1)))
    np.testing.assert_allclose(flat.std((0, 1)), 0.25 * image.std((0, 1)))


def test_fog_is_smooth_and_fills_its_range():
    cloud = corruptions.clouds(48, 32, 2.0, np.random.default_rng(0))
    assert cloud.shape == (48, 32)
    assert (cloud.min(), cloud.max()) == (0, 1)
    rough = corruptions.clouds(48, 32, 1.2, np.random.default_rng(0))
    assert np.abs(np.diff(cloud, axis=0)).mean() < np.abs(np.diff(rough, axis=0)).mean()
