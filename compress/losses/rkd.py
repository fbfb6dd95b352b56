"""Relational knowledge distillation: Park et al., 2019 (arXiv:1904.05068), section 3.2."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.embeddings import distances, embedding, refuse_unless_embedded
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import unit


def relative_distances(vectors_ND: Tensor) -> Tensor:
    """(N, N): distances between rows, divided by the mean of those that are not 0.

    All 0 where all rows are equal. The scale of the vectors does not matter.
    """
    distance_NN = distances(vectors_ND)
    count = (distance_NN > 0).sum()
    mean = torch.where(count > 0, distance_NN.sum() / count.clamp(min=1), 1)
    return distance_NN / mean


def angles(vectors_ND: Tensor) -> Tensor:
    """(N, N, N): at [i, j, k] the cosine of the angle at i between j and k. 0 where i equals j or k."""
    towards_NND = unit(vectors_ND[None] - vectors_ND[:, None], dim=2)
    return towards_NND @ towards_NND.transpose(1, 2)


def distance_loss(student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
    """Huber loss, with its corner at 1, of the relative distances of all N * N pairs, averaged."""
    return F.smooth_l1_loss(relative_distances(student_ND), relative_distances(teacher_NE))


def angle_loss(student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
    """Huber loss, with its corner at 1, of the cosines in all N**3 triples, averaged."""
    return F.smooth_l1_loss(angles(student_ND), angles(teacher_NE))


class RKD(FeatureTerm):
    """Keep distances and angles between images as the teacher has them, whatever the width.

    25 and 50 are RepDistiller's and mdistiller's factors. Theirs, and ours, are means over all pairs and triples, with
    those that are 0 by definition; the paper sums, with factors 1 and 2. One image has no relations and two have no
    angle: the loss is 0. Holds N * N * C numbers a few times over: 21 MB each for 64 images and 1280 channels.
    """

    where = "last"

    use: Literal["rkd"]
    distance: float = Field(default=25.0, ge=0)
    """Factor of the distances."""
    angle: float = Field(default=50.0, ge=0)
    """Factor of the angles."""
    weight: float = Field(default=1.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        values = []
        for student, teacher in zip(lesson.student_maps, lesson.teacher_maps, strict=True):
            student_ND, teacher_NE = embedding(student), embedding(teacher)
            value = self.distance * distance_loss(student_ND, teacher_NE)
            values.append(value + self.angle * angle_loss(student_ND, teacher_NE) if self.angle else value)
        return torch.stack(values)
