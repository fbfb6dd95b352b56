"""Training images that are looked at without training on them: for calibration, statistics and scores."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from compress.product import Batch, Run
from compress.training import reestimated_batchnorm


def sample_size(run: Run, images: int) -> int:
    """How many images there are when `images` are asked for."""
    return min(images, run.data.count("train"))


def sample(run: Run, images: int, *, batch_size: int) -> Iterable[Batch]:
    """At most `images` training images in full batches, spread over the classes and mixed, without augmentation.

    The run's seed chooses them: the same ones on every process, and again on every call.
    """
    size = sample_size(run, images)
    return run.data.batches("train", batch_size=min(batch_size, size), shuffle=True, limit=size, seed=run.seed)


def with_new_statistics(module: nn.Module, run: Run, images: int) -> nn.Module:
    """The module with BatchNorm's statistics measured again on so many training images; as it is with 0."""
    if not images:
        return module
    return reestimated_batchnorm(module, sample(run, images, batch_size=64), run.device)
