"""What the network is judged by: the same pixels in training's evaluation, on a board and in the benchmark."""

from __future__ import annotations

import numpy as np
from PIL import Image

from compress.product import Preprocess


def pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """uint8 (size, size, 3) of an RGB image: resized and centre-cropped as `Preprocess` says.

    The shorter side becomes `size / crop` rounded to a pixel, the longer one keeps the proportions; an odd rest of the
    crop is one pixel more on the right and at the bottom.
    """
    size = preprocess.size
    shorter = round(size / preprocess.crop)
    scale = shorter / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's bilinear is antialiased
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
