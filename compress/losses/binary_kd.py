"""Soft targets of several labels: Yang et al., 2023 (arXiv:2308.06453), the loss on logits (section 3), with the
temperature of Hinton et al., 2015 (arXiv:1503.02531)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.labels import Task
from compress.losses.lesson import Lesson, Term
from compress.tasks.multi_label import divergence


def binary_soft_targets(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each label's yes and no at `temperature`, times temperature**2, in nats.

    Both are logits of shape (N, K). The mean over images and labels, as the labels' own loss is; the paper sums over
    labels, so a weight of theirs is K times one of ours. Towards infinite temperature it becomes an eighth of the mean
    squared distance of the logits.
    """
    return divergence(student_NK / temperature, teacher_NK / temperature).mean() * temperature**2


class BinarySoftTargets(Term):
    """Match the teacher's probability of each label, softened by a temperature."""

    tasks: ClassVar[tuple[Task, ...]] = ("multi_label",)

    use: Literal["binary_kd"]
    temperature: float = Field(default=1.0, gt=0)
    weight: float = Field(default=0.9, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        return binary_soft_targets(lesson.student_NK, lesson.teacher_NK, self.temperature)
