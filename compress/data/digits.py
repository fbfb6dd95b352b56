"""1,797 handwritten digits that come with scikit-learn: for first steps and for tests, without a download.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; 8x8 pixels in 17 shades of grey.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from compress.data.augment import AugmentDigit
from compress.data.loader import ImageData, Images
from compress.data.split import holdout
from compress.product import Preprocess
from compress.settings import Settings

EVALUATION = 0.2


class Digits(Settings):
    """Handwritten digits of scikit-learn, 80 % for training, 20 % for evaluation; the split never changes."""

    use: Literal["digits"]
    augment: AugmentDigit = AugmentDigit()
    workers: int = Field(default=0, ge=0)
    """Threads that prepare batches ahead; digits are so small that none is fastest."""


def open_digits(settings: Digits, preprocess: Preprocess) -> ImageData:
    """The digits as RGB images, enlarged to the size that `preprocess` asks for."""
    from sklearn.datasets import load_digits  # takes a second, which no other recipe should pay

    digits = load_digits()
    shades_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    classes_N = digits.target.astype(np.int64)
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in shades_NHW]
    evaluation_N = holdout(hashes, classes_N, EVALUATION)

    def images(chosen_N: np.ndarray) -> Images:
        rgb_NHWC = np.repeat(shades_NHW[chosen_N][..., None], 3, axis=-1)
        return Images(classes_N[chosen_N], lambda index, _: Image.fromarray(rgb_NHWC[index]))

    content = hashlib.sha256(shades_NHW.tobytes() + classes_N.tobytes() + evaluation_N.tobytes())
    return ImageData(
        labels=tuple(map(str, digits.target_names)),
        preprocess=preprocess,
        fingerprint=content.hexdigest(),
        train=images(~evaluation_N),
        evaluation=images(evaluation_N),
        augment=settings.augment,
        workers=settings.workers,
    )
