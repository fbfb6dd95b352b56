"""A virtual teacher that is always right: Tf-KD_reg of Yuan et al., 2020 (arXiv:1909.11723), section 5."""

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.labels import Task
from compress.losses.kd import soft_targets
from compress.losses.lesson import Facts, Lesson, Term


def virtual_teacher(labels_N: Tensor, classes: int, correct: float) -> Tensor:
    """log p (N, classes), in float64, of a teacher that gives `correct` to the label and shares the rest equally."""
    right = F.one_hot(labels_N, classes).double()
    return right * math.log(correct) + (1 - right) * math.log((1 - correct) / (classes - 1))


def teacher_free(student_NK: Tensor, labels_N: Tensor, *, correct: float, temperature: float) -> Tensor:
    """KL(virtual teacher || student), both at `temperature`, batch mean, times temperature**2.

    The paper's D_KL(p^d_t, p_t), with the factor that `kd` has too: without it the gradient would all but vanish at
    the temperature of 20 that it recommends. The authors' code differs: it softens p^d as if probabilities were logits,
    and leaves the student at temperature 1. At temperature 1 the gradient is that of the labels' cross entropy with
    label smoothing (1 - correct) * K / (K - 1).
    """
    teacher_NK = virtual_teacher(labels_N, student_NK.shape[1], correct).to(student_NK)
    return soft_targets(student_NK, teacher_NK, temperature)


class TeacherFree(Term):
    """Does the teacher help at all? Regularization in the form of distillation, from the labels alone.

    The paper's (1 - a) * cross entropy + a * this is `labels: 0.9` and `weight: 0.1`, the authors' setting for
    ResNet-18 on CIFAR-100. The recipe's teacher has no say.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)
    needs_labels: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    use: Literal["teacher_free"]
    correct: float = Field(default=0.99, gt=0, lt=1)
    """The virtual teacher's probability of the label."""
    temperature: float = Field(default=20.0, gt=0)
    weight: float = Field(default=0.1, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        """None. Raises ModelError for a virtual teacher that does not prefer the label."""
        if self.correct * facts.classes <= 1:
            raise ModelError(
                "loss teacher_free",
                f"`correct: {self.correct:g}` is no more than a guess among {facts.classes} classes",
                "the paper takes 0.9 or more",
            )
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        return teacher_free(lesson.student_NK, lesson.labels_N, correct=self.correct, temperature=self.temperature)
