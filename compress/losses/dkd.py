"""Decoupled knowledge distillation: Zhao et al., 2022 (arXiv:2203.08679), equations 5 to 7."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term
from compress.losses.standardization import standardized


def decoupled(student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Target-class (TCKD) and non-target-class (NCKD) distillation of each image, (N,) each, in nats.

    TCKD is the KL of (label, any other class), NCKD the KL among the other classes alone, both of teacher to student at
    `temperature`. With p the teacher's probability of the label, KL(teacher || student) = TCKD + (1 - p) * NCKD.
    """
    (target_student, rest_student), (target_teacher, rest_teacher) = (
        _split(logits_NK / temperature, labels_N) for logits_NK in (student_NK, teacher_NK)
    )
    return _divergence(target_student, target_teacher), _divergence(rest_student, rest_teacher)


def dkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    temperature: float,
) -> Tensor:
    """alpha * TCKD + beta * NCKD, batch mean, times temperature**2.

    `alpha` and `beta` may be of shape (N,): with alpha 1 and beta the teacher's probability at `temperature` of not
    being the label, this is `soft_targets`.
    """
    target_N, rest_N = decoupled(student_NK, teacher_NK, labels_N, temperature)
    return (alpha * target_N + beta * rest_N).mean() * temperature**2


def _split(logits_NK: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p of (label, any other class), (N, 2), and of the other classes among themselves, (N, K - 1)."""
    log_p_NK = F.log_softmax(logits_NK, dim=1)
    others = torch.arange(log_p_NK.shape[1] - 1, device=labels_N.device).expand(len(labels_N), -1)
    others = others + (others >= labels_N[:, None])  # skips the label
    rest = log_p_NK.gather(1, others)
    any_other = rest.logsumexp(1, keepdim=True)
    return torch.cat([log_p_NK.gather(1, labels_N[:, None]), any_other], 1), rest - any_other


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log probabilities (N, K), as (N,)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


class DKD(Term):
    """Match what the teacher thinks of the wrong classes, however sure it is of the right one.

    Published with the cross entropy of the labels at full weight: `labels: 1`.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)
    needs_labels: ClassVar[bool] = True

    use: Literal["dkd"]
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=8.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """The part of the training over which the loss grows from zero to its weight, from where it becomes active. The
    authors' code takes 20 of 240 epochs, in steps of an epoch."""
    standardize: bool = False
    """Standardize the logits of each image first (arXiv:2403.01427)."""

    def __call__(self, lesson: Lesson) -> Tensor:
        student_NK, teacher_NK = lesson.student_NK, lesson.teacher_NK
        if self.standardize:
            student_NK, teacher_NK = standardized(student_NK), standardized(teacher_NK)
        value = dkd(
            student_NK,
            teacher_NK,
            lesson.labels_N,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
        return value * self._grown(lesson.progress)

    def _grown(self, progress: float) -> float:
        over = progress - self.active[0]
        return 1.0 if over >= self.warmup else over / self.warmup
