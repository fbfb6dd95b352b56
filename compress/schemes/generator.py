"""Images made from noise, for schemes that train without images: the generator, and the noise as data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import DataError
from compress.labels import Task
from compress.product import NO_LABEL, Batch, Data, Preprocess, Scale, Split


class Generator(nn.Module):
    """Images (N, colours, size, size) from noise (N, latent, 1, 1), as DAFL's (Chen et al., 2019, arXiv:1904.01186).

    A linear layer to a map of about 8 x 8 (a quarter of the size for small images), which is doubled with a convolution
    each time; at the end tanh and a BatchNorm without parameters, so each colour has mean 0 and variance 1 over the
    batch: the scale of normalised pixels. Sizes need not be powers of 2. (An epsilon of 0.8 in each
    BatchNorm, as in the authors' code, would leave less contrast after each doubling.)
    """

    def __init__(self, latent: int, size: int, channels: int = 128, colours: int = 3) -> None:
        super().__init__()
        doublings = max(2, math.ceil(math.log2(size / 8)))
        self.sides = [math.ceil(size / 2**left) for left in range(doublings, -1, -1)]
        self.first = nn.Linear(latent, channels * self.sides[0] ** 2)
        self.norm = nn.BatchNorm2d(channels)
        widths = [channels] * doublings + [max(1, channels // 2)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))
            for inputs, outputs in pairwise(widths)
        )
        last = nn.Conv2d(widths[-1], colours, 3, padding=1)
        self.last = nn.Sequential(last, nn.Tanh(), nn.BatchNorm2d(colours, affine=False))

    def forward(self, noise: Tensor) -> Tensor:
        side = self.sides[0]
        x = self.norm(self.first(noise.flatten(1)).unflatten(1, (-1, side, side)))
        for side, block in zip(self.sides[1:], self.blocks, strict=True):
            x = block(F.interpolate(x, size=(side, side)))
        images_NCHW: Tensor = self.last(x)
        return images_NCHW


@dataclass(frozen=True)
class Noise:
    """Training data without an image: batches of standard normal noise (N, latent, 1, 1) and no labels.

    What `data` says of classes, pixels and memory order holds for the images that a generator will make of it; none of
    its images is ever read.
    """

    data: Data
    latent: int
    images: int
    """How many rows of noise an epoch has."""

    @property
    def task(self) -> Task:
        return self.data.task

    @property
    def labels(self) -> tuple[str, ...]:
        return self.data.labels

    @property
    def scale(self) -> Scale | None:
        return self.data.scale

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        return self.data.label_weights

    @property
    def preprocess(self) -> Preprocess:
        return self.data.preprocess

    @property
    def channels_last(self) -> bool:
        return self.data.channels_last

    @property
    def fingerprint(self) -> str:
        return f"noise {self.latent} {self.images}"

    def in_nchw(self) -> Noise:
        """See `compress.product.Data`."""
        return replace(self, data=self.data.in_nchw())

    def count(self, split: Split) -> int:
        return self.images if split == "train" else 0

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **_: Any,
    ) -> Iterator[Batch]:
        """New noise for each seed, epoch and process. Raises DataError for another split than `train`."""
        if split != "train":
            raise DataError("noise", f"there is no split `{split}`", "noise only trains")
        # numpy's seeds would do as well; torch's generator takes one number, so the three are mixed first.
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_009 + rank) % 2**63)
        for _step in range(self.images // world_size // batch_size):
            noise = torch.randn(batch_size, self.latent, 1, 1, generator=generator)
            yield Batch(noise, torch.full((batch_size,), NO_LABEL))
