"""How far a changed network's answers are from those of the whole one, in nats: what importance is counted in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from compress.data.sample import sample, sample_size
from compress.labels import Task
from compress.product import Batch, Run
from compress.tasks import classification, multi_label, regression

AT_ONCE = 64
"""Images in a batch."""


def divergence(changed: Tensor, whole: Tensor, task: Task) -> Tensor:
    """float (N,): for each image KL(whole || changed) of what the outputs (N, K) of a task say, in nats; 0 or more.

    Of one class of K; of K labels, the sum of each label's yes and no; of K numbers, half the squared distance, which
    is the divergence of two normal distributions of unit variance around them.
    """
    match task:
        case "classification":
            return classification.divergence(changed, whole)
        case "multi_label":
            return multi_label.divergence(changed, whole).sum(1)
        case "regression":
            return regression.divergence(changed, whole)


def held_out(run: Run, images: int, statistics: int) -> tuple[list[Batch], list[Batch]]:
    """Training images in two lists of batches that share none: `images` to compare outputs on, and `statistics` for
    BatchNorm. Where the data has fewer, both get their share, at least one image each; of a single one, both get it.

    Without augmentation, spread over the classes, and the same ones on every call and every process.
    """
    together = sample_size(run, images + statistics)
    compared = min(together - 1, max(1, together * images // (images + statistics)))
    if compared < 1 or not statistics:
        both = list(sample(run, together, batch_size=AT_ONCE))
        return both, both if statistics else []
    first: list[Batch] = []
    second: list[Batch] = []
    seen = 0
    for batch in sample(run, together, batch_size=AT_ONCE):
        here = min(len(batch.images_NCHW), max(0, compared - seen))
        seen += len(batch.images_NCHW)
        for part, chosen in ((first, slice(None, here)), (second, slice(here, None))):
            if len(batch.images_NCHW[chosen]):
                part.append(Batch(batch.images_NCHW[chosen], batch.labels_N[chosen]))
    return first, second or first


def outputs(module: nn.Module, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """float32 (N, K) on the CPU: what the module answers in eval mode; it is left on the CPU in eval mode."""
    module.eval().to(device)
    with torch.no_grad():
        found = torch.cat([module(batch.images_NCHW.to(device)).float().cpu() for batch in batches])
    module.cpu()
    return found


def mean_divergence(module: nn.Module, whole_NK: Tensor, batches: Sequence[Batch], run: Run) -> float:
    """The mean over the images of `batches`, in nats, where `whole_NK` is what `outputs` found of the whole network.

    Infinite where an answer is no number.
    """
    found = float(divergence(outputs(module, batches, run.device), whole_NK, run.data.task).mean())
    return math.inf if math.isnan(found) else max(0.0, found)
