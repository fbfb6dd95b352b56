"""Correlation congruence: Peng et al., 2019 (arXiv:1904.01802), section 3."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.embeddings import embedding, refuse_unless_embedded, width
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import unit

Kernel = Literal["gaussian", "bilinear", "adjacent"]


def bilinear_correlation(vectors_ND: Tensor) -> Tensor:
    """(N, N): x'y of the rows at length 1, in [-1, 1]."""
    directions_ND = unit(vectors_ND, dim=1)
    return directions_ND @ directions_ND.T


def gaussian_correlation(vectors_ND: Tensor, gamma: float, order: int) -> Tensor:
    """(N, N): exp(-gamma |x - y|**2) of the rows at length 1, by its Taylor series in x'y up to `order`.

    |x - y|**2 = 2 - 2 x'y, so that this is exp(-2 gamma) * sum over p of (2 gamma x'y)**p / p!.
    """
    exponent_NN = 2 * gamma * bilinear_correlation(vectors_ND)
    series_NN = torch.ones_like(exponent_NN)
    for p in range(1, order + 1):
        series_NN = series_NN + exponent_NN**p / math.factorial(p)
    return math.exp(-2 * gamma) * series_NN


def congruence(student_NN: Tensor, teacher_NN: Tensor) -> Tensor:
    """Mean squared difference of two correlation matrices, over all N * N entries."""
    return F.mse_loss(student_NN, teacher_NN)


def adjacent_congruence(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """|s - t| of each image times that of the next in the batch, summed over D, mean over N - 1; 0 for a single image.

    Not in the paper: RepDistiller has it from the authors. Both have one width.
    """
    error_ND = (student_ND - teacher_ND).abs()
    return (error_ND[:-1] * error_ND[1:]).sum() / max(1, len(error_ND) - 1)


class Embeddings(nn.Module):
    """Two linear maps to one width: the student's, which is trained, and the teacher's, drawn once and kept.

    RepDistiller trains both. But what is trained to agree can agree on nothing: both maps falling to one direction cost
    least, whatever the student does. A random orthogonal map keeps the teacher's correlations, exactly so for up to
    `size` channels.
    """

    teacher: Tensor

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, size)
        self.register_buffer("teacher", nn.init.orthogonal_(torch.empty(size, teacher)))

    def forward(self, student_ND: Tensor, teacher_NE: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(student_ND), teacher_NE @ self.teacher.T


class CorrelationCongruence(FeatureTerm):
    """Correlate the images of a batch as the teacher does.

    `gaussian`, its settings and the weight are those of Knowledge-Distillation-Zoo, which follows the paper (bilinear
    values are of the same size). `adjacent` is RepDistiller's formula, whose weight is 0.02.
    """

    where = "last"

    use: Literal["cc"]
    kernel: Kernel = "gaussian"
    """How images are correlated: the Taylor series of a Gaussian, or `bilinear`, the cosine. `adjacent` multiplies the
    errors of neighbours in the batch instead."""
    gamma: float = Field(default=0.4, gt=0)
    """Of the Gaussian exp(-gamma |x - y|**2)."""
    order: int = Field(default=2, ge=1, le=10)
    """Of the Gaussian's Taylor series."""
    embedding: int | None = Field(default=128, ge=1)
    """Width of the linear embeddings that the images are compared in; null compares the layers' own channels."""
    weight: float = Field(default=100.0, ge=0)

    @model_validator(mode="after")
    def _adjacent_needs_one_width(self) -> Any:
        if self.kernel == "adjacent" and self.embedding is None:
            raise ValueError("`kernel: adjacent` compares channel by channel and needs an `embedding`, such as 128")
        return self

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        if self.embedding is None:
            return None
        pairs = zip(facts.student_shapes, facts.teacher_shapes, strict=True)
        return nn.ModuleList([Embeddings(width(s), width(t), self.embedding) for s, t in pairs])

    def __call__(self, lesson: Lesson) -> Tensor:
        values = []
        for layer, maps in enumerate(zip(lesson.student_maps, lesson.teacher_maps, strict=True)):
            student_ND, teacher_ND = embedding(maps[0]), embedding(maps[1])
            if self.embedding is not None:
                student_ND, teacher_ND = cast(nn.ModuleList, lesson.parts)[layer](student_ND, teacher_ND)
            if self.kernel == "adjacent":
                values.append(adjacent_congruence(student_ND, teacher_ND))
            else:
                values.append(congruence(self._correlation(student_ND), self._correlation(teacher_ND)))
        return torch.stack(values)

    def _correlation(self, vectors_ND: Tensor) -> Tensor:
        if self.kernel == "bilinear":
            return bilinear_correlation(vectors_ND)
        return gaussian_correlation(vectors_ND, self.gamma, self.order)
