"""Similarity-preserving distillation: Tung & Mori, 2019 (arXiv:1907.09682), equation 3."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.losses.lesson import FeatureTerm, Lesson
from compress.losses.maps import unit


def image_similarities(features: Tensor) -> Tensor:
    """(N, N): products of what a layer returns for each pair of images, rows of length 1. `features` is (N, ...).

    Entries lie in [-1, 1]. The row of an image that activates nothing is 0.
    """
    rows = features.flatten(1)
    return unit(rows @ rows.T, dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Frobenius distance of the two (N, N) similarities, divided by N**2: equation 3 for one layer.

    Only N has to be equal. It is 0 for a batch of one image, and depends on which images share a batch.
    """
    return (image_similarities(teacher) - image_similarities(student)).square().sum() / len(student) ** 2


class Similarity(FeatureTerm):
    """Find the same images alike as the teacher does.

    Widths and shapes differ freely: no adaptor, and any layer will do, a transformer's included. As in RepDistiller:
    the last stage only, weight 3000.
    """

    where: ClassVar[Literal["stages", "last", "activations"]] = "last"

    use: Literal["similarity"]
    weight: float = Field(default=3000.0, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([similarity_preserving(student, teacher) for student, teacher in pairs])
