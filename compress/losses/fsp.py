"""Flow of solution procedure: Yim et al., 2017 (CVPR, "A Gift from Knowledge Distillation"), equations 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import channels_by_positions, refuse_single, refuse_unless_equal, refuse_unless_maps


def flow(first: Tensor, second: Tensor) -> Tensor:
    """(N, C, D): the Gram matrix between two layers' channels, averaged over positions; equation 1.

    Maps are (N, C, H, W) and (N, D, H', W'), the larger average-pooled to the smaller's size; or (N, tokens, C) and
    (N, tokens, D) with the same tokens.
    """
    if first.ndim == 4:
        size = min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])
        first, second = _pooled(first, size), _pooled(second, size)
    first_NCP, second_NDP = channels_by_positions(first), channels_by_positions(second)
    return first_NCP @ second_NDP.transpose(1, 2) / first_NCP.shape[2]


def _pooled(features_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return features_NCHW if features_NCHW.shape[2:] == size else F.adaptive_avg_pool2d(features_NCHW, size)


def flow_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(L - 1,): mean squared difference of the flows from each layer to the next, of L >= 2 layers.

    Equation 2 averages over images and sums over the entries of a flow; we average over both, as RepDistiller does.
    """
    steps = zip(pairwise(student), pairwise(teacher), strict=True)
    return torch.stack([F.mse_loss(flow(*mine), flow(*theirs)) for mine, theirs in steps])


class FSP(FeatureTerm):
    """Get from one layer to the next as the teacher does: one value for each pair of consecutive layers.

    The paper trains with this loss first and with the labels alone after that: `active: [0, 0.1]`. RepDistiller does
    so for 30 of 270 epochs; its weight is 50, which its first part, where nothing else is trained, does not use.
    """

    same_width = True
    between = True

    use: Literal["fsp"]
    weight: float = Field(default=50.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts)
        refuse_unless_equal(self.use, facts)
        refuse_single(self.use, facts)
        for pair, (first, second) in zip(pairwise(facts.layers), pairwise(facts.student_shapes), strict=True):
            if len(first) != len(second) or (len(first) == 2 and first[0] != second[0]):
                problem = f"`fsp` needs two maps (C, H, W), or the same number of tokens, not {first} and {second}"
                raise ModelError(", ".join(pair), problem, "choose other `layers`")
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        return flow_difference(lesson.student_maps, lesson.teacher_maps)
