"""Random changes to training images, cheap enough to keep up with a small network on two cores."""

from __future__ import annotations

import math
from typing import Annotated, Protocol

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from compress.data.pixels import RESAMPLING, array_of, square
from compress.product import Preprocess
from compress.settings import Settings

MAX_CROP_RATIO = 4 / 3
"""Width / height of the widest random crop and, inverted, of the narrowest, as in Szegedy et al., 2015."""


def random_crop(
    image: Image.Image,
    size: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """A random part of `image`, `scale` of its area, resized to a square (antialiased).

    Sides that would leave the image are cut to it, so that no draw is repeated.
    """
    area = rng.uniform(*scale) * image.width * image.height
    ratio = math.exp(rng.uniform(-math.log(MAX_CROP_RATIO), math.log(MAX_CROP_RATIO)))
    width = min(image.width, math.sqrt(area * ratio))
    height = min(image.height, math.sqrt(area / ratio))
    left = rng.uniform(0, image.width - width)
    top = rng.uniform(0, image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize((size, size), resampling, box=box)


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast (about mid-grey) and saturation, each times a factor of 1 ± `strength`.

    The three are linear in RGB, so one matrix does them in a single pass over the pixels.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    grey = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * 128
    return image.convert("RGB", tuple(np.column_stack([matrix, np.full(3, offset)]).ravel().tolist()))


def turn_and_shift(image: Image.Image, degrees: float, shift: float, rng: np.random.Generator) -> Image.Image:
    """Turned about the centre by up to ±`degrees` and moved by up to ±`shift` of each side, over black."""
    angle = math.radians(rng.uniform(-degrees, degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    dx, dy = rng.uniform(-shift, shift, 2) * image.size
    # Output to input, as Pillow wants it: undo the shift, then turn about the centre.
    affine = (cos, -sin, x - cos * (x + dx) + sin * (y + dy), sin, cos, y - sin * (x + dx) - cos * (y + dy))
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


class Augment(Protocol):
    """Settings of a random change, called once for every training image."""

    def __call__(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        """uint8 (size, size, channels) of an RGB image; `rng` belongs to this image in this epoch alone."""
        ...

    @property
    def smallest_part(self) -> float:
        """The least fraction of an image's shorter side that may fill the network's input."""
        ...


Fraction = Annotated[float, Field(gt=0, le=1)]


class AugmentPhoto(Settings):
    """For photographs: random crop, mirroring, colours."""

    crop_scale: tuple[Fraction, Fraction] = (0.35, 1.0)
    """Least and largest part of the image's area that a crop shows."""
    flip: bool = True
    """Mirror half of the images, left to right; false where that makes another class, as with text."""
    color: float = Field(default=0.2, ge=0, lt=1)
    """Strength of the changes in brightness, contrast and saturation; 0 for none."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentPhoto:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale goes from the smaller part to the larger")
        return self

    def __call__(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        changed = random_crop(image, preprocess.size, self.crop_scale, rng, RESAMPLING[preprocess.interpolation])
        if self.flip and rng.random() < 0.5:
            changed = changed.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color:
            changed = jitter(changed, self.color, rng)
        return array_of(changed, preprocess)

    @property
    def smallest_part(self) -> float:
        return math.sqrt(self.crop_scale[0] / MAX_CROP_RATIO)


class AugmentDigit(Settings):
    """For single characters, which mean something else when mirrored: turn and shift a little."""

    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    """Largest turn, either way."""
    shift: float = Field(default=0.08, ge=0, lt=0.5)
    """Largest move, as a fraction of the side."""

    def __call__(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        changed = turn_and_shift(square(image, preprocess), self.rotate_degrees, self.shift, rng)
        return array_of(changed, preprocess)

    @property
    def smallest_part(self) -> float:
        return 1.0
