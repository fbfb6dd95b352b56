"""Nine of the corruptions of ImageNet-C, Hendrycks & Dietterich, 2019 (arXiv:1903.12261), made with numpy and Pillow.

The benchmark has images of 224 px, and its authors' CIFAR-10-C has milder settings for 32 px, where a blur of 10 pixels
leaves nothing. Both sets of settings are taken from their code (hendrycks/robustness, make_imagenet_c.py and
make_cifar_c.py); between 32 and 224 px each is interpolated, its logarithm along the logarithm of the side.

Different from there: values are rounded, not cut, to 8 bits; kernels of blurs are exact instead of OpenCV's and
ImageMagick's; the fog's height map is a sum of octaves of noise instead of diamond-square. So figures are not to be
compared with published ones.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from PIL import Image

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "gaussian_blur",
    "motion_blur",
    "fog",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg",
]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)
SMALL, LARGE = 32, 224
"""Sides that CIFAR-10-C and ImageNet-C are made for; smaller and larger images get the settings of the nearer."""

Setting = tuple[float, ...]
Change = Callable[[np.ndarray, Setting, np.random.Generator], np.ndarray]


def corrupt(pixels_HWC: np.ndarray, corruption: Corruption, severity: int, *, seed: int, image: int) -> np.ndarray:
    """uint8 (H, W, C): the image, RGB or grey, corrupted, `severity` 1 (mild) to 5.

    Seed, number of the image and corruption decide what is random: the same pixels each time, and one realisation that
    grows from severity to severity.
    """
    change, small, large = TABLE[corruption]
    setting = _between(small[severity - 1], large[severity - 1], min(pixels_HWC.shape[:2]))
    rng = np.random.default_rng((seed, image, zlib.crc32(corruption.encode())))
    changed_HWC = change(pixels_HWC / 255, setting, rng)
    corrupted_HWC: np.ndarray = np.rint(changed_HWC.clip(0, 1) * 255).astype(np.uint8)
    return corrupted_HWC


def _between(small: Setting, large: Setting, side: int) -> Setting:
    """The setting for images of `side` pixels."""
    place = min(1.0, max(0.0, math.log(side / SMALL) / math.log(LARGE / SMALL)))
    return tuple(one ** (1 - place) * other**place for one, other in zip(small, large, strict=True))


def gaussian_noise(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of standard deviation `setting[0]` on each value in [0, 1]."""
    return image_HWC + rng.normal(scale=setting[0], size=image_HWC.shape)


def shot_noise(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Each value counted in photons, `setting[0]` of them at 1: Poisson noise."""
    counted_HWC: np.ndarray = rng.poisson(image_HWC * setting[0]) / setting[0]
    return counted_HWC


def gaussian_blur(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of standard deviation `setting[0]` pixels."""
    half = max(1, math.ceil(4 * setting[0]))
    row = np.exp(-0.5 * (np.arange(-half, half + 1) / setting[0]) ** 2)
    return _convolved(image_HWC, np.outer(row, row))


def motion_blur(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """A trace in one direction, -45 to 45 degrees, whose weight falls as half a Gaussian of `setting[0]` pixels."""
    angle = rng.uniform(-math.pi / 4, math.pi / 4)
    half = max(1, math.ceil(3 * setting[0]))
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    steps = np.linspace(0, 3 * setting[0], 8 * half + 1)  # closer than pixels, so that no direction has gaps
    x, y = half + steps * math.cos(angle), half + steps * math.sin(angle)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for right, right_part in ((0, 1 - (x - left)), (1, x - left)):
        for down, down_part in ((0, 1 - (y - top)), (1, y - top)):
            rows, columns = np.minimum(top + down, 2 * half), np.minimum(left + right, 2 * half)
            np.add.at(kernel, (rows, columns), np.exp(-0.5 * (steps / setting[0]) ** 2) * right_part * down_part)
    return _convolved(image_HWC, kernel)


def fog(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """`setting[0]` times a cloud in [0, 1] added, then darkened so that the image's brightest value is what it was."""
    thickness, decay = setting
    brightest = image_HWC.max()
    fogged_HWC = image_HWC + thickness * clouds(image_HWC.shape[0], image_HWC.shape[1], decay, rng)[..., None]
    return fogged_HWC * brightest / (brightest + thickness)


def brightness(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """`setting[0]` added to HSV's value; hue and saturation stay, so all channels grow by one factor."""
    value_HW1 = image_HWC.max(2, keepdims=True)
    brighter_HW1 = np.minimum(value_HW1 + setting[0], 1)
    black = value_HW1 == 0
    return np.where(black, brighter_HW1, image_HWC * brighter_HW1 / np.where(black, 1, value_HW1))


def contrast(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """`setting[0]` of each value's distance from its channel's mean is left."""
    means_11C = image_HWC.mean((0, 1), keepdims=True)
    changed_HWC: np.ndarray = (image_HWC - means_11C) * setting[0] + means_11C
    return changed_HWC


def pixelate(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to `setting[0]` of its sides by averages over boxes, and enlarged again."""
    image = _picture(image_HWC)
    smaller = [max(1, int(side * setting[0])) for side in image.size]
    shrunk = image.resize((smaller[0], smaller[1]), Image.Resampling.BOX)
    return np.asarray(shrunk.resize(image.size, Image.Resampling.BOX)).reshape(image_HWC.shape) / 255


def jpeg(image_HWC: np.ndarray, setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Written as JPEG of quality `setting[0]`, rounded, and read again."""
    file = io.BytesIO()
    _picture(image_HWC).save(file, "JPEG", quality=round(setting[0]))
    with Image.open(file) as read:
        return np.asarray(read.convert("RGB" if image_HWC.shape[2] == 3 else "L")).reshape(image_HWC.shape) / 255


TABLE: dict[Corruption, tuple[Change, tuple[Setting, ...], tuple[Setting, ...]]] = {
    # What is done, and its settings at 32 and at 224 px for severities 1 to 5.
    "gaussian_noise": (
        gaussian_noise,
        ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    ),
    "shot_noise": (shot_noise, ((500,), (250,), (100,), (75,), (50,)), ((60,), (25,), (12,), (5,), (3,))),
    "gaussian_blur": (gaussian_blur, ((0.4,), (0.6,), (0.7,), (0.8,), (1,)), ((1,), (2,), (3,), (4,), (6,))),
    # CIFAR-10-C goes from 3 to 4 with a longer kernel that has the same 2 pixels: all but the same image.
    "motion_blur": (motion_blur, ((1,), (1.5,), (2,), (2.25,), (2.5,)), ((3,), (5,), (8,), (12,), (15,))),
    "fog": (
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)), ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)), ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "pixelate": (pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)), ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg": (jpeg, ((80,), (65,), (58,), (50,), (40,)), ((25,), (18,), (15,), (10,), (7,))),
}


def clouds(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) in [0, 1]: octaves of smooth noise, each twice as fine as the one before and `decay` times as weak."""
    total = np.zeros((height, width))
    for octave in range(math.ceil(math.log2(max(height, width, 2)))):
        grid = Image.fromarray(rng.uniform(-1, 1, (2**octave + 1, 2**octave + 1)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR)) / decay**octave
    total -= total.min()
    return total / max(total.max(), np.finfo(float).tiny)


def _convolved(image_HWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The image convolved with the kernel brought to sum 1; beyond its edges it is mirrored."""
    half = len(kernel) // 2
    padded = np.pad(image_HWC, ((half, half), (half, half), (0, 0)), mode="symmetric")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel / kernel.sum(), size)[..., None]
    # The product is the cyclic convolution: what wraps around lies in the first 2 * half rows and columns.
    return np.fft.irfft2(spectrum, size, axes=(0, 1))[2 * half :, 2 * half :]


def _picture(image_HWC: np.ndarray) -> Image.Image:
    values_HWC = np.rint(image_HWC * 255).astype(np.uint8)
    return Image.fromarray(values_HWC if values_HWC.shape[2] == 3 else values_HWC[..., 0])
