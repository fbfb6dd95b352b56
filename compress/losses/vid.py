"""Variational information distillation: Ahn et al., 2019 (arXiv:1904.05835), section 2.

The mutual information of a student's and a teacher's layer is at least what a Gaussian with a mean computed from the
student's map, and a variance for each channel, says about the teacher's map; both are trained along.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.embeddings import as_maps, refuse_unless_aligned, width
from compress.losses.lesson import Facts, FeatureTerm, Lesson

EPS = 1e-5
"""Smallest variance."""


def gaussian_information(mean_NCHW: Tensor, teacher_NCHW: Tensor, variance_C: Tensor) -> Tensor:
    """-log of the Gaussian density of the teacher's map, without its constant, averaged over all numbers.

    ((t - mean)**2 / variance + log variance) / 2 with a variance for each channel; below 0 for small variances.
    """
    variance_1C11 = variance_C[None, :, None, None]
    return 0.5 * ((teacher_NCHW - mean_NCHW) ** 2 / variance_1C11 + variance_1C11.log()).mean()


class Regressor(nn.Module):
    """The Gaussian of a layer: its mean by three 1x1 convolutions of the teacher's width, its variance by softplus.

    As in the authors' code by way of RepDistiller, the variance is softplus(scale) + 1e-5 and begins at `variance`.
    """

    def __init__(self, student: int, teacher: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        self.scale_C = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - EPS))))

    def forward(self, student_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (N, C, H, W) and the variance (C,)."""
        return self.mean(student_NCHW), F.softplus(self.scale_C) + EPS


class VID(FeatureTerm):
    """Know about each of the teacher's layers what can be told from it; a value for each layer, below 0 when it can.

    Weight and initial variance are RepDistiller's. Tokens and vectors count as maps of one column and one pixel.
    """

    use: Literal["vid"]
    variance: float = Field(default=5.0, gt=1e-4, le=80)
    """What the trained variance of each channel begins with."""
    weight: float = Field(default=1.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_aligned(self.use, facts)
        pairs = zip(facts.student_shapes, facts.teacher_shapes, strict=True)
        return nn.ModuleList([Regressor(width(s), width(t), self.variance) for s, t in pairs])

    def __call__(self, lesson: Lesson) -> Tensor:
        values = []
        regressors = cast(nn.ModuleList, lesson.parts)
        for student, teacher, regressor in zip(lesson.student_maps, lesson.teacher_maps, regressors, strict=True):
            mean_NCHW, variance_C = regressor(as_maps(student))
            values.append(gaussian_information(mean_NCHW, as_maps(teacher), variance_C))
        return torch.stack(values)
