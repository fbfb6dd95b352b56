"""Squared distance of a regression's numbers: what soft targets are where there are no classes."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term


def squared_distance(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """The mean over images and numbers of the squared distance, both of shape (N, K)."""
    return F.mse_loss(student_NK, teacher_NK)


class SquaredError(Term):
    """Match the teacher's numbers."""

    tasks: ClassVar[tuple[Task, ...]] = ("regression",)

    use: Literal["mse"]
    weight: float = Field(default=0.9, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        return squared_distance(lesson.student_NK, lesson.teacher_NK)
