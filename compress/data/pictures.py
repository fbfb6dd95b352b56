"""Pictures for people of the images that a network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128
"""Pixels of a picture's side at most: a report shows them small, and holds all of them."""


def save_picture(path: Path, pixels_HWC: np.ndarray) -> None:
    """Writes uint8 pixels of one or three channels as a PNG, no side of it over 128 pixels; always the same bytes."""
    grey = pixels_HWC.shape[2] == 1
    found = Image.fromarray(np.ascontiguousarray(pixels_HWC[..., 0] if grey else pixels_HWC))
    found.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path, format="PNG", optimize=True)
