"""Soft targets: Hinton et al., 2015 (arXiv:1503.02531), section 2."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.settings import Settings


def soft_targets(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at `temperature`, batch mean, times temperature**2 so gradients keep their scale.

    Both are logits of shape (N, K); the result is a scalar in nats.
    """
    student = F.log_softmax(student_NK / temperature, dim=1)
    teacher = F.log_softmax(teacher_NK / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class SoftTargets(Settings):
    """Match the teacher's class probabilities, softened by a temperature."""

    use: Literal["kd"]
    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, ge=0)

    def __call__(self, *, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        return soft_targets(student_NK, teacher_NK, self.temperature)
