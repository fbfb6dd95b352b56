"""Pictures made of numbers for the two tasks without classes, as data that a run can use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from conftest import PREPROCESS
from PIL import Image

from compress.data.augment import AugmentDigit
from compress.data.loader import ImageData, Images

SIDE = PREPROCESS.size
COLOURS = {"red": (230, 40, 40), "green": (40, 220, 60), "blue": (50, 70, 235), "yellow": (235, 225, 50)}


def squares(count: int, seed: int) -> tuple[list[Image.Image], np.ndarray]:
    """Each of four colours has a square in about a third of the pictures: which are there, float32 (N, 4)."""
    rng = np.random.default_rng(seed)
    pictures, targets_NK = [], (rng.random((count, len(COLOURS))) < 0.35).astype(np.float32)
    for row in targets_NK:
        pixels = rng.integers(40, 170, (SIDE, SIDE, 3))
        places = rng.permutation(4)  # a quarter of the picture each, so that none hides another
        for there, colour, place in zip(row, COLOURS.values(), places, strict=True):
            if there:
                y, x = np.array(divmod(int(place), 2)) * SIDE // 2 + rng.integers(0, 4, 2)
                pixels[y : y + 4, x : x + 4] = colour
        pictures.append(Image.fromarray(pixels.astype(np.uint8)))
    return pictures, targets_NK


def spots(count: int, seed: int) -> tuple[list[Image.Image], np.ndarray]:
    """One bright spot: how far from the left in millimetres (0 to 2000), and how far down as a part of the side."""
    rng = np.random.default_rng(seed)
    places_N2 = rng.uniform(0.15, 0.85, (count, 2))
    axis = (np.arange(SIDE) + 0.5) / SIDE
    pictures = []
    for x, y in places_N2:
        bright = np.exp(-((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2) / 0.02)
        pixels = 40 + 170 * bright[..., None] + rng.normal(0, 8, (SIDE, SIDE, 3))
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return pictures, (places_N2 * (2000, 1)).astype(np.float32)


def pictured(
    draw: Callable[[int, int], tuple[list[Image.Image], np.ndarray]], train: int = 384, evaluation: int = 96
) -> ImageData:
    def images(count: int, seed: int) -> Images:
        pictures, targets = draw(count, seed)
        return Images(targets, lambda index, _: pictures[index])

    several = draw is squares
    return ImageData(
        labels=tuple(COLOURS) if several else ("millimetres", "down"),
        preprocess=PREPROCESS,
        fingerprint=draw.__name__,
        train=images(train, 1),
        evaluation=images(evaluation, 2),
        augment=AugmentDigit(rotate_degrees=0, shift=0),
        workers=0,
        task="multi_label" if several else "regression",
    )
