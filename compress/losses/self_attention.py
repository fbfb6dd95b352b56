"""Self attention distillation: Hou et al., 2019 (arXiv:1908.00821)."""

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
from compress.losses.maps import refuse_unless_maps, refuse_unless_places


def spatial_attention(features_NCHW: Tensor, size: tuple[int, int], power: float = 2.0) -> Tensor:
    """(N, H' * W'): softmax over positions of the sum over channels of abs(A)**power, resized to `size` (bilinear)."""
    strength_N1HW = features_NCHW.abs().pow(power).sum(1, keepdim=True)
    if strength_N1HW.shape[2:] != size:
        strength_N1HW = F.interpolate(strength_N1HW, size, mode="bilinear", align_corners=False)
    return strength_N1HW.flatten(1).softmax(1)


def attention_from_above(maps_NCHW: Sequence[Tensor], power: float = 2.0) -> Tensor:
    """(L - 1,): squared distance of each layer's attention from that of the next deeper one, batch mean; L >= 2.

    The deeper map is taken as it is: no gradient flows into it. It lies in [0, 2].
    """
    losses = []
    for shallow, deep in pairwise(maps_NCHW):
        size = shallow.shape[2], shallow.shape[3]
        difference = spatial_attention(shallow, size, power) - spatial_attention(deep.detach(), size, power)
        losses.append(difference.square().sum(1).mean())
    return torch.stack(losses)


class SelfAttention(FeatureTerm):
    """Look early where the student itself looks later: one value for each pair of consecutive layers, shallow first.

    The teacher is not asked. The student should be trained to a reasonable level before: use it in a later stage, or
    `active: [0.5, 1]`. Public re-implementations have weight 0.1 and average over positions, where the paper has the
    squared distance and we sum: there the loss is H * W times smaller.
    """

    between = True
    needs_teacher = False

    use: Literal["self_attention"]
    power: float = Field(default=2.0, ge=1)
    weight: float = Field(default=0.1, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts, tokens=False)
        refuse_unless_places(self.use, facts)
        if len(facts.layers) < 2:
            problem = "`self_attention` compares a layer with the next"
            raise ModelError(", ".join(facts.layers), problem, "name two `layers`")
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        return attention_from_above(lesson.student_maps, self.power)
