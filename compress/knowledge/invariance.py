"""Changes that leave the meaning of a photograph alone; a network is invariant where its answer stays.

How often that is, is the `agreement` of the network with itself on the image and on the changed image.
"""

from __future__ import annotations

import numpy as np


def flipped(pixels_NHWC: np.ndarray) -> np.ndarray:
    """The images mirrored, left to right. Text and digits mean something else then: few networks should ignore it."""
    return np.ascontiguousarray(pixels_NHWC[:, :, ::-1])


def shifted(pixels_NHWC: np.ndarray, *, right: int, down: int) -> np.ndarray:
    """The crop moved by whole pixels, negative ones to the left and up; where the image ends, its edge is repeated.

    A real crop of a larger photograph would show new pixels there; the network's input is all that is known here.
    """
    _, height, width, _ = pixels_NHWC.shape
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    return np.ascontiguousarray(pixels_NHWC[:, rows][:, :, columns])


def diagonal_shifts(side: int, part: float) -> tuple[tuple[int, int], ...]:
    """(right, down) of four crops moved by `part` of the side, at least a pixel, towards the corners."""
    pixels = max(1, round(part * side))
    return tuple((right, down) for right in (-pixels, pixels) for down in (-pixels, pixels))
