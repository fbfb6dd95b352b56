"""Attention transfer by activations: Zagoruyko & Komodakis, 2017 (arXiv:1612.03928), section 3.1."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import channels_by_positions, refuse_unless_maps, refuse_unless_places

Over = Literal["sum", "max"]


def attention_map(features: Tensor, power: float, over: Over = "sum") -> Tensor:
    """abs(A)**power, summed or the largest over channels, as (N, P) rows of length 1: where a layer is active.

    `features` is (N, C, H, W), P = H * W, or (N, tokens, C), P = tokens. An image that activates nothing gets zeros.
    """
    strength_NCP = channels_by_positions(features).abs().pow(power)
    return F.normalize(strength_NCP.sum(1) if over == "sum" else strength_NCP.amax(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float, over: Over = "sum") -> Tensor:
    """Mean squared difference of the two attention maps; equation 2 with the squared norm, averaged over N and P.

    The numbers of channels may differ. It lies in [0, 2 / P].
    """
    return F.mse_loss(attention_map(student, power, over), attention_map(teacher, power, over))


class Attention(FeatureTerm):
    """Look where the teacher looks.

    The defaults are RepDistiller's and the authors': squares, 1000 times the mean over positions and images. Widths
    differ freely: no adaptor.
    """

    use: Literal["attention"]
    power: float = Field(default=2.0, ge=1)
    """1 sums abs(A); a higher power stresses the strongest channels."""
    over: Over = "sum"
    """How channels become one map: the paper's sum, or its max."""
    weight: float = Field(default=1000.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts)
        refuse_unless_places(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([attention_transfer(student, teacher, self.power, self.over) for student, teacher in pairs])
