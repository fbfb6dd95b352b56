"""DIST, the inter-class and the intra-class relation: Huang et al., 2022 (arXiv:2205.10536)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.lesson import Lesson, Term

SMALLEST_NORMS = 1e-8
"""Of the two rows' lengths multiplied, as in the authors' code: rows that do not vary have no correlation."""


def pearson(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """Pearson's correlation of the rows of one with those of the other, (N,) in [-1, 1]; 0 for a constant row."""
    first, second = (values - values.mean(1, keepdim=True) for values in (first_NK, second_NK))
    norms = first.norm(dim=1) * second.norm(dim=1)
    return (first * second).sum(1) / norms.clamp_min(SMALLEST_NORMS)


def dist(student_NK: Tensor, teacher_NK: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """beta * inter-class + gamma * intra-class relation of logits (N, K), times temperature**2 as in the authors' code.

    The inter-class relation is the mean over images of 1 - correlation of the probabilities of all classes, the
    intra-class one the mean over classes of 1 - correlation of the probabilities of all images in the batch: each from
    0 to 2. Both are unchanged by a shift and a positive factor of a row or column of probabilities.
    """
    student, teacher = F.softmax(student_NK / temperature, dim=1), F.softmax(teacher_NK / temperature, dim=1)
    inter = 1 - pearson(student, teacher).mean()
    intra = 1 - pearson(student.T, teacher.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


class DIST(Term):
    """Rank the classes of an image, and the images of a class, as the teacher does.

    Made for teachers that are much stronger than the student. The defaults are those of the authors' code, to be used
    with `labels: 1`. With few images in a batch the intra-class relation is mostly noise.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["dist"]
    beta: float = Field(default=1.0, ge=0)
    """Factor of the inter-class relation."""
    gamma: float = Field(default=1.0, ge=0)
    """Factor of the intra-class relation."""
    temperature: float = Field(default=1.0, gt=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        return dist(
            lesson.student_NK, lesson.teacher_NK, beta=self.beta, gamma=self.gamma, temperature=self.temperature
        )
