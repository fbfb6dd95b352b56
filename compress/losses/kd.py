"""Soft targets: Hinton et al., 2015 (arXiv:1503.02531), section 2."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term
from compress.losses.standardization import standardized


def soft_targets(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at `temperature`, batch mean, times temperature**2 so gradients keep their scale.

    Both are logits of shape (N, K); the result is a scalar in nats. Towards infinite temperature it becomes half the
    squared distance of the centred logits, divided by K; towards zero, temperature times the student's margin of its
    own first class over the teacher's.
    """
    student = F.log_softmax(student_NK / temperature, dim=1)
    teacher = F.log_softmax(teacher_NK / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class SoftTargets(Term):
    """Match the teacher's class probabilities, softened by a temperature."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["kd"]
    temperature: float = Field(default=4.0, gt=0)
    standardize: bool = False
    """Standardize the logits of each image first (arXiv:2403.01427). Its authors use `temperature: 2`, `weight: 9` and
    `labels: 0.1` on CIFAR-100."""
    weight: float = Field(default=0.9, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        student_NK, teacher_NK = lesson.student_NK, lesson.teacher_NK
        if self.standardize:
            student_NK, teacher_NK = standardized(student_NK), standardized(teacher_NK)
        return soft_targets(student_NK, teacher_NK, self.temperature)
