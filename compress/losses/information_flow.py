"""Information flow: Passalis et al., 2020 (arXiv:2005.00727), section 3.

The paper matches how much each layer knows about the task, by matching in every layer who is whose neighbour. While the
student forms its first connections (the critical learning period) the layers before the last count most.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.losses.embeddings import distances, embedding, refuse_unless_embedded
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.pkt import EPS, neighbours

PERIODS = 50
"""Epochs of the authors' training, after each of which the factor decays; here, fiftieths of the training."""


def student_t_neighbours(vectors_ND: Tensor) -> Tensor:
    """(N, N): as `pkt.neighbours`, in proportion to 1 / (1 + Euclidean distance), Student's t kernel of degree 1."""
    near_NN = 1 / (1 + distances(vectors_ND))
    return near_NN / near_NN.sum(1, keepdim=True)


def jeffreys(first_NN: Tensor, second_NN: Tensor, eps: float = EPS) -> Tensor:
    """KL(first || second) + KL(second || first) of rows of probabilities, averaged over all N * N entries."""
    return ((first_NN - second_NN) * ((first_NN + eps) / (second_NN + eps)).log()).mean()


def flow_divergence(student_ND: Tensor, teacher_NE: Tensor) -> Tensor:
    """Jeffreys divergence of the neighbours by cosine and of those by Student's t, added; the widths may differ.

    At least 0, and 0 for equal vectors.
    """
    by_cosine = jeffreys(neighbours(student_ND), neighbours(teacher_NE))
    return by_cosine + jeffreys(student_t_neighbours(student_ND), student_t_neighbours(teacher_NE))


def critical_period(progress: float, initial: float, decay: float) -> float:
    """Factor of the layers before the last: `initial`, times `decay` after each fiftieth of the training.

    Continuous between them, where the authors' code changes once an epoch.
    """
    return initial * decay ** (PERIODS * progress)


class InformationFlow(FeatureTerm):
    """Have the same images as neighbours as the teacher in all layers, the earlier layers at first above all.

    The last of `layers` counts once. Divergence, kernels, 100 and 0.7 are those of the authors' code, which trains with
    nothing else; its auxiliary teacher, of the student's kind, is not needed where the student was pruned from its
    teacher. The weight is ours: a hundred times it, what an early layer begins with, is the weight of `pkt`.
    """

    use: Literal["information_flow"]
    initial: float = Field(default=100.0, ge=0)
    """Factor of the layers before the last when training begins."""
    decay: float = Field(default=0.7, gt=0, le=1)
    """What the factor is multiplied by after each fiftieth of the training."""
    weight: float = Field(default=300.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        values_L = torch.stack([flow_divergence(embedding(s), embedding(t)) for s, t in pairs])
        factors_L = torch.full_like(values_L, critical_period(lesson.progress, self.initial, self.decay))
        factors_L[-1] = 1
        return values_L * factors_L
