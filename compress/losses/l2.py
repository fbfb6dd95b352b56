"""Distance between logits: Ba & Caruana, 2014 (arXiv:1312.6184), equation 1."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.settings import Settings


def logits_l2(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Half the squared distance between logits of shape (N, K), summed over classes, batch mean."""
    return 0.5 * F.mse_loss(student_NK, teacher_NK, reduction="sum") / len(student_NK)


class LogitsL2(Settings):
    """Match the teacher's logits themselves: the limit of `kd` at high temperature for centred logits."""

    use: Literal["l2"]
    weight: float = Field(default=0.1, ge=0)

    def __call__(self, *, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        return logits_l2(student_NK, teacher_NK)
