"""Probabilistic knowledge transfer: Passalis & Tefas, 2018 (arXiv:1803.10837), section 3."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.losses.embeddings import embedding, refuse_unless_embedded
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import unit

EPS = 1e-7
"""Added to both probabilities of a ratio: images in opposite directions have the probability 0."""


def neighbours(vectors_ND: Tensor) -> Tensor:
    """(N, N): for each image, the probability of picking each as its neighbour; rows add up to 1.

    In proportion to the cosine similarity, moved to [0, 1]. As in the authors' code, and unlike the
    paper, an image is its own neighbour too.
    """
    directions_ND = unit(vectors_ND, dim=1)
    similar_NN = (directions_ND @ directions_ND.T + 1) / 2
    return similar_NN / similar_NN.sum(1, keepdim=True)


def probability_divergence(student_NN: Tensor, teacher_NN: Tensor, eps: float = EPS) -> Tensor:
    """KL(teacher || student) of rows of probabilities, averaged over all N * N entries; the paper adds up."""
    return (teacher_NN * ((teacher_NN + eps) / (student_NN + eps)).log()).mean()


def probabilistic_transfer(student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
    """How far the student's neighbourhoods are from the teacher's; the widths may differ. 0 for a single image."""
    return probability_divergence(neighbours(student_ND), neighbours(teacher_NE))


class PKT(FeatureTerm):
    """Have the same images as neighbours as the teacher.

    The weight is RepDistiller's, for a mean over N * N entries. An image whose features are all 0 has a
    cosine of 0 with all images, and gets no gradient.
    """

    where = "last"

    use: Literal["pkt"]
    weight: float = Field(default=3e4, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([probabilistic_transfer(embedding(s), embedding(t)) for s, t in pairs])
