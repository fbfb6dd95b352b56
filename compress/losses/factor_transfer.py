"""Factor transfer: Kim et al., 2018 (arXiv:1802.04977), section 3.

A paraphraser, trained without labels to rebuild the teacher's map from fewer channels, says in its own words what the
teacher knows (the factor); a translator is trained to say the same from the student's map.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.embeddings import refuse_unless_aligned, width
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_unless_maps, unit


def factor_distance(student_NCHW: Tensor, teacher_NCHW: Tensor, power: int = 1) -> Tensor:
    """Mean of |s - t|**power over all numbers, each image's factor at length 1; the paper adds up."""
    difference = unit(student_NCHW.flatten(1), dim=1) - unit(teacher_NCHW.flatten(1), dim=1)
    return difference.abs().pow(power).mean()


class Paraphraser(nn.Module):
    """Three convolutions from the teacher's map to its factor, and three transposed ones back; leaky ReLUs, slope 0.1.

    Without BatchNorm, as in RepDistiller.
    """

    def __init__(self, channels: int, factor: int, kernel_size: int) -> None:
        super().__init__()
        self.encoder = _convolutions(nn.Conv2d, (channels, channels, factor, factor), kernel_size)
        self.decoder = _convolutions(nn.ConvTranspose2d, (factor, factor, channels, channels), kernel_size)

    def forward(self, teacher_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The factor, and the map rebuilt from it."""
        factor_NFHW = self.encoder(teacher_NCHW)
        return factor_NFHW, self.decoder(factor_NFHW)


class Interpreters(nn.Module):
    """The paraphraser of a teacher's layer, and the translator of the student's."""

    def __init__(self, student: int, teacher: int, rate: float, kernel_size: int) -> None:
        super().__init__()
        factor = max(1, int(teacher * rate))
        self.paraphraser = Paraphraser(teacher, factor, kernel_size)
        self.translator = _convolutions(nn.Conv2d, (student, student, factor, factor), kernel_size)


def _convolutions(kind: type[nn.Conv2d | nn.ConvTranspose2d], widths: tuple[int, ...], size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [kind(before, after, size, padding=size // 2), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class FactorTransfer(FeatureTerm):
    """Say with a translator what a paraphraser says about the teacher's map.

    The paper trains the paraphraser first, on the teacher alone. Here it is trained in the same steps: for the first
    `alone` of the loss's time the factor does not count, so that the student does not follow words that still change
    fast; after that both count. The loss is the sum of factor distance and reconstruction error, and each moves what
    it should: the translator and the student see the factor as a constant, the paraphraser sees the teacher only.

    The weight is RepDistiller's and Knowledge-Distillation-Zoo's, the formula that of the paper and the latter; one
    image of which the factor is all 0 gets no gradient. No BatchNorm in the translator, so that a batch of one works.
    """

    where = "last"

    use: Literal["factor_transfer"]
    rate: float = Field(default=0.5, gt=0, le=1)
    """Channels of the factor for each of the teacher's."""
    power: Literal[1, 2] = 1
    """Of the distance between factors."""
    kernel_size: Literal[1, 3] = 1
    """Of all convolutions. The paper has 3, with nine times the weights: 66 million where 800 channels learn from 1280.
    A step with 64 images of 3 x 3 positions then takes 4.0 s on one core instead of 0.3 s."""
    alone: float = Field(default=0.1, ge=0, lt=1)
    """Which part of the time in which the loss is `active` belongs to the paraphraser; the paper's first stage."""
    reconstruction: float = Field(default=0.005, gt=0)
    """Factor of the reconstruction error; with the weight 200 it counts once."""
    weight: float = Field(default=200.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts, tokens=False)
        refuse_unless_aligned(self.use, facts)
        pairs = zip(facts.student_shapes, facts.teacher_shapes, strict=True)
        return nn.ModuleList([Interpreters(width(s), width(t), self.rate, self.kernel_size) for s, t in pairs])

    def __call__(self, lesson: Lesson) -> Tensor:
        begin, end = self.active
        # Times 0 instead of left out: the student stays part of the loss, which DistributedDataParallel relies on.
        counts = float((lesson.progress - begin) / (end - begin) >= self.alone)
        values = []
        interpreters = cast(Iterable[Interpreters], lesson.parts)
        for student, teacher, layer in zip(lesson.student_maps, lesson.teacher_maps, interpreters, strict=True):
            factor_NFHW, rebuilt_NCHW = layer.paraphraser(teacher.detach())
            said = factor_distance(layer.translator(student), factor_NFHW.detach(), self.power)
            values.append(counts * said + self.reconstruction * F.mse_loss(rebuilt_NCHW, teacher.detach()))
        return torch.stack(values)
