"""What the network is judged by: the same pixels in training's evaluation, on a board and in the benchmark."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from compress.product import Preprocess

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Both antialiased, as all of Pillow's but the nearest pixel."""


def pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """uint8 (size, size, channels) of an RGB image: resized and centre-cropped as `Preprocess` says."""
    return array_of(square(image, preprocess), preprocess)


def array_of(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """uint8 (height, width, channels) of an RGB or grey image."""
    return np.array(image.convert("RGB")) if preprocess.channels == 3 else np.array(image.convert("L"))[..., None]


def square(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The centre of an image, `size` pixels a side, in as many channels as the network reads.

    The shorter side becomes `size / crop` rounded to a pixel, the longer one keeps the proportions; an odd rest of the
    crop is one pixel more on the right and at the bottom.
    """
    if preprocess.channels == 1:
        image = image.convert("L")  # before the resizing, which is then of one channel
    size = preprocess.size
    shorter = round(size / preprocess.crop)
    scale = shorter / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), RESAMPLING[preprocess.interpolation])
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_pixels(images_NCHW: Tensor, preprocess: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, C): the pixels that `preprocess` made this input of, to the last one."""
    mean_C, std_C = (np.asarray(values, np.float64) for values in (preprocess.mean, preprocess.std))
    images_NHWC = images_NCHW.permute(0, 2, 3, 1).cpu().numpy() * std_C + mean_C
    pixels_NHWC: np.ndarray = np.clip(np.rint(images_NHWC * 255), 0, 255).astype(np.uint8)
    return pixels_NHWC
