"""From the bytes of a file to the image that networks see."""

from __future__ import annotations

import io
import logging
import math
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from compress.errors import DataError

KINDS = (
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
)
"""Pillow's names of what is read. It knows more: EPS, for one, is given to Ghostscript, another program."""
LATER = ("AVIF",)
"""Kinds that not every Pillow knows."""


def decode(content: bytes, place: str, enough: int | None = None) -> Image.Image:
    """The RGB image of a file's bytes, upright by its EXIF orientation; transparency is dropped.

    With `enough`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if no side gets shorter than that.
    Raises DataError, naming `place`.
    """
    if not content:
        raise DataError(place, "is no readable image (it has no bytes)", "replace or remove it")
    try:
        with Image.open(io.BytesIO(content), formats=_kinds()) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow itself only warns
                raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
            if enough is not None:
                image.draft(None, (enough, enough))
            image.load()
            return as_rgb(image)
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError, struct.error ...
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(place, f"is no readable image ({reason})", "replace or remove it") from None


@cache
def _kinds() -> tuple[str, ...]:
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs of a damaged file is in its exception
    Image.init()
    return tuple(kind for kind in (*KINDS, *LATER) if kind in Image.OPEN)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, upright by its EXIF orientation; transparency is dropped, 16 bits of grey are scaled to 8.

    Raises ValueError for floating-point pixels, whose range nothing says.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
    elif upright.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns if it has to do this itself
    return upright.convert("RGB")
