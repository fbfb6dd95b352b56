"""Instance relationship graph: Liu et al., 2019 (CVPR, "Knowledge Distillation via Instance Relationship Graph").

Images are the vertices, their distances the edges, and how far an image moves from one layer to the next is the
transformation of the graph. We follow Knowledge-Distillation-Zoo, the one-to-one mode of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.embeddings import as_maps, embedding, refuse_unless_embedded
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_single


def edges(vectors_ND: Tensor) -> Tensor:
    """(N, N): squared distances between rows, divided by the largest; all 0 where all rows are equal."""
    centred_ND = vectors_ND - vectors_ND.mean(0)  # changes no distance, and leaves less to round
    products_NN = centred_ND @ centred_ND.T
    squares_N = products_NN.diagonal()
    squared_NN = (squares_N[:, None] + squares_N[None, :] - 2 * products_NN).clamp(min=0)
    # Rows that differ by their rounding only are equal.
    rounding = 1e-10 * vectors_ND.detach().square().sum(1).mean() + 1e-20
    return squared_NN / torch.maximum(squared_NN.max(), rounding)


def transformation(before_NCHW: Tensor, after_NDHW: Tensor) -> Tensor:
    """(N,): squared distance between an image's maps in two layers, divided by the batch's largest.

    Both are average-pooled to the smaller of each size. So are their channels, which is what the Zoo does for a layer
    twice as wide (the mean of each two).
    """
    channels, height, width = map(min, before_NCHW.shape[1:], after_NDHW.shape[1:])
    moved = _pooled(before_NCHW, channels, height, width) - _pooled(after_NDHW, channels, height, width)
    squared_N = moved.square().sum((1, 2, 3))
    return squared_N / squared_N.max().clamp(min=1e-20)


def _pooled(features_NCHW: Tensor, channels: int, height: int, width: int) -> Tensor:
    if features_NCHW.shape[2:] != (height, width):
        features_NCHW = F.adaptive_avg_pool2d(features_NCHW, (height, width))
    if features_NCHW.shape[1] != channels:
        rows_NPC = features_NCHW.flatten(2).transpose(1, 2)
        features_NCHW = F.adaptive_avg_pool1d(rows_NPC, channels).transpose(1, 2).unflatten(2, (height, width))
    return features_NCHW


def vertices_loss(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Mean squared difference of the images' logits."""
    return F.mse_loss(student_NK, teacher_NK)


def edges_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(L,): mean squared difference of the edges in each layer; the last one's is added to that of its embedding."""
    values = [F.mse_loss(edges(s.flatten(1)), edges(t.flatten(1))) for s, t in zip(student, teacher, strict=True)]
    values[-1] = values[-1] + F.mse_loss(edges(embedding(student[-1])), edges(embedding(teacher[-1])))
    return torch.stack(values)


def transformations_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(L,): mean squared difference of the transformations that lead to each layer; 0 for the first one."""
    values = [student[0].sum() * 0]
    for index in range(1, len(student)):
        ours_N = transformation(as_maps(student[index - 1]), as_maps(student[index]))
        theirs_N = transformation(as_maps(teacher[index - 1]), as_maps(teacher[index]))
        values.append(F.mse_loss(ours_N, theirs_N))
    return torch.stack(values)


class IRG(FeatureTerm):
    """Have the teacher's logits, and its graph of images: how far they are apart in each layer and move between layers.

    Factors and weight are the Zoo's, whose formula this is for two layers: edges are averaged over the layers and the
    last one's embedding, transformations over the steps between layers. The vertices count with the last layer.
    """

    use: Literal["irg"]
    vertices: float = Field(default=0.1, ge=0)
    """Factor of the logits."""
    edges: float = Field(default=5.0, ge=0)
    """Factor of the distances between images."""
    transformations: float = Field(default=5.0, ge=0)
    """Factor of the distances between layers."""
    weight: float = Field(default=1.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        refuse_single(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        student, teacher = lesson.student_maps, lesson.teacher_maps
        values_L = self.edges / (len(student) + 1) * edges_loss(student, teacher)
        values_L = values_L + self.transformations / (len(student) - 1) * transformations_loss(student, teacher)
        vertices_L = torch.zeros_like(values_L)
        vertices_L[-1] = self.vertices
        return values_L + vertices_L * vertices_loss(lesson.student_NK, lesson.teacher_NK)
