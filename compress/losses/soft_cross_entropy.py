"""Cross entropy with the teacher's probabilities as targets: Hinton et al., 2015 (arXiv:1503.02531), section 2."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term


def soft_cross_entropy(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """-sum of p_teacher * log p_student over classes, both at `temperature`, batch mean, times temperature**2.

    Both are logits of shape (N, K); the result is a scalar in nats. It is `soft_targets` plus the teacher's entropy
    times temperature**2: the same gradient, but not zero where student and teacher agree.
    """
    teacher = F.softmax(teacher_NK / temperature, dim=1)
    return F.cross_entropy(student_NK / temperature, teacher) * temperature**2


class SoftCrossEntropy(Term):
    """Match the teacher's class probabilities by cross entropy: trains like `kd`, reports another number."""

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["ce"]
    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        return soft_cross_entropy(lesson.student_NK, lesson.teacher_NK, self.temperature)
