"""KD-SVD: Lee et al., 2018 (arXiv:1807.06819), section 3.

Of each map, as a matrix of positions by channels, the first right singular vector is kept: the mix of channels that
says most. What is compared is how these vectors relate from one layer to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.losses.embeddings import as_maps, refuse_unless_embedded
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_single, refuse_unless_equal

CANDIDATES = 4
"""The student's vector is the one of its first four that is nearest to the teacher's; as in the authors' code."""
BROADENING = 1e-6
"""Of 1 / d between squared singular values, relative to the largest: d / (d**2 + 1e-6)."""
RANK = 1e-5
"""Smallest singular value that counts, relative to the largest."""
SMALLEST = 1e-12
"""A map with a smaller singular value than this is a map of zeros."""


def first_vector(features_NPC: Tensor) -> Tensor:
    """(N, C): each image's first right singular vector, with a sum of at least 0; zeros for a map of zeros.

    Without a gradient. An SVD leaves the sign open, and the kernel between two layers depends on it.
    """
    with torch.no_grad():
        _, values_NR, vectors_NRC = _svd(features_NPC)
        first_NC = vectors_NRC[:, 0]
        sign_N1 = torch.where(first_NC.sum(1, keepdim=True) < 0, -1, 1)
        return first_NC * sign_N1 * (values_NR[:, :1] > SMALLEST)


def aligned_vector(features_NPC: Tensor, target_NC: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """(N, C): of each image's first right singular vectors, the nearest to `target_NC` with the sign towards it.

    Zeros for a map or a target of zeros. The gradient is that of the singular vector, a sum over all others i with
    1 / (s_j**2 - s_i**2), where 1 / d is broadened to d / (d**2 + eps) as in Liao et al., 2019 (arXiv:1903.09650). So
    it is finite for repeated singular values, between which the vectors are arbitrary, and 0 for a map of zeros.
    """
    with torch.no_grad():
        left_NPR, values_NR, right_NRC = _svd(features_NPC)
        alive_N1 = (values_NR[:, :1] > SMALLEST) & (target_NC != 0).any(1, keepdim=True)
        scale_N1 = torch.where(alive_N1, values_NR[:, :1], 1)
        relative_NR = values_NR / scale_N1
        cosines_NR = torch.einsum("nrc,nc->nr", right_NRC, target_NC)
        # Vectors without a value of their own are arbitrary.
        eligible_NR = (relative_NR > RANK) & (torch.arange(relative_NR.shape[1], device=target_NC.device) < candidates)
        chosen_N1 = torch.where(eligible_NR, cosines_NR.abs(), -1).argmax(1, keepdim=True)
        sign_N1 = torch.where(cosines_NR.gather(1, chosen_N1) < 0, -1, 1)
        value_N1 = relative_NR.gather(1, chosen_N1)
        gap_NR = value_N1**2 - relative_NR**2
        factor_NR = gap_NR / (gap_NR**2 + BROADENING)
        inverse_N1 = value_N1 / (value_N1**2 + BROADENING)
        rows = torch.arange(len(features_NPC), device=features_NPC.device)
        left_NP, right_NC = left_NPR[rows, :, chosen_N1[:, 0]], right_NRC[rows, chosen_N1[:, 0]]
    # The differential of the vector, as a linear function of the map; d is 0 for the vector itself.
    matrix_NPC = features_NPC / scale_N1[:, :, None]
    by_left_NC = torch.einsum("npc,np->nc", matrix_NPC, left_NP)
    by_right_NP = torch.einsum("npc,nc->np", matrix_NPC, right_NC)
    inside_NR = torch.einsum("nrc,nc->nr", right_NRC, by_left_NC)
    both_NR = value_N1 * inside_NR + relative_NR * torch.einsum("npr,np->nr", left_NPR, by_right_NP)
    outside_NC = by_left_NC - torch.einsum("nr,nrc->nc", inside_NR, right_NRC)
    change_NC = torch.einsum("nr,nrc->nc", factor_NR * both_NR, right_NRC) + inverse_N1 * outside_NC
    return (right_NC + change_NC - change_NC.detach()) * sign_N1 * alive_N1


def _svd(features_NPC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD. LAPACK refuses what is not finite, which counts as 0 here and reaches the loss by another way."""
    left, values, right = torch.linalg.svd(features_NPC.nan_to_num(0, 0, 0), full_matrices=False)
    return left, values, right


def radial_basis(first_NC: Tensor, second_ND: Tensor) -> Tensor:
    """(N, C, D): exp(-(a - b)**2 / 8) of each number of the one vector and each of the other."""
    return torch.exp((first_NC[:, :, None] - second_ND[:, None, :]) ** 2 / -8)


def singular_vector_flow(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(L,): for each layer (N, P, C) after the first, how far its relation to the one before is from the teacher's.

    The sum over both layers' channels of the squared difference of their radial basis functions, batch mean;
    0 for the first layer. Widths are equal; positions may differ.
    """
    values = [student[0].sum() * 0]
    teachers = [first_vector(features_NPC) for features_NPC in teacher]
    students = [aligned_vector(features_NPC, goal) for features_NPC, goal in zip(student, teachers, strict=True)]
    for index in range(1, len(student)):
        difference = radial_basis(students[index], students[index - 1])
        difference = difference - radial_basis(teachers[index], teachers[index - 1])
        values.append(difference.square().sum() / len(difference))
    return torch.stack(values)


class KDSVD(FeatureTerm):
    """Relate the main direction of each layer's channels to that of the layer before as the teacher does.

    One singular vector and the weight 1, as RepDistiller has them. A layer's value belongs to the step that leads to
    it. Holds N * C * D numbers a few times over: 31 MB each for 64 images between layers of 96 and 1280 channels.
    """

    same_width = True

    use: Literal["kd_svd"]
    weight: float = Field(default=1.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        refuse_unless_equal(self.use, facts)
        refuse_single(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        student = [as_maps(features).flatten(2).transpose(1, 2) for features in lesson.student_maps]
        teacher = [as_maps(features).flatten(2).transpose(1, 2) for features in lesson.teacher_maps]
        return singular_vector_flow(student, teacher)
