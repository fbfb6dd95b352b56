"""Squared distance of logits, Ba & Caruana, 2014 (arXiv:1312.6184), equation 1, or of probabilities."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term


def logits_l2(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Half the squared distance between logits of shape (N, K), summed over classes, batch mean."""
    return 0.5 * F.mse_loss(student_NK, teacher_NK, reduction="sum") / len(student_NK)


def probabilities_l2(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Squared distance between the softmax of two logits of shape (N, K), summed over classes, batch mean: 0 to 2."""
    student, teacher = F.softmax(student_NK, dim=1), F.softmax(teacher_NK, dim=1)
    return F.mse_loss(student, teacher, reduction="sum") / len(student_NK)


class LogitsL2(Term):
    """Match the teacher's outputs by their distance; for centred logits, the limit of `kd` at high temperature."""

    use: Literal["l2"]
    on: Literal["logits", "probabilities"] = "logits"
    weight: float = Field(default=0.1, ge=0)

    def serves(self, task: Task) -> bool:
        """Probabilities are those of classes; outputs themselves are compared anywhere."""
        return task == "classification" or self.on == "logits"

    def __call__(self, lesson: Lesson) -> Tensor:
        distance = logits_l2 if self.on == "logits" else probabilities_l2
        return distance(lesson.student_NK, lesson.teacher_NK)
