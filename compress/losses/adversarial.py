"""Adversarial distillation: a discriminator tells the student's answers from the teacher's, and the student learns to
pass for the teacher.

On logits: Xu et al., 2018 (arXiv:1709.00513). On features: Wang et al., 2018 (AAAI, "Adversarial Learning of Portable
Student Networks") and, between students, Chung et al., 2020 (arXiv:2002.01775).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.losses.embeddings import as_maps, refuse_unless_embedded, width
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_unless_equal
from compress.models.patterns import Pattern


def discriminator_loss(on_student: Tensor, on_teacher: Tensor) -> Tensor:
    """-log(D(t)) - log(1 - D(s)) with D = sigmoid(score), each averaged over its scores; 2 log 2 for a blind one."""
    return F.softplus(-on_teacher).mean() + F.softplus(on_student).mean()


def student_loss(on_student: Tensor) -> Tensor:
    """-log(D(s)): the non-saturating loss of Goodfellow et al., 2014 (arXiv:1406.2661), averaged over the scores."""
    return F.softplus(-on_student).mean()


def game(discriminator: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of both players' losses. Each moves its own player: the gradients never mix.

    The discriminator's loss sees the student's answer as a constant, the student's loss the discriminator's weights.
    """
    plays = discriminator_loss(discriminator(student.detach()), discriminator(teacher.detach()))
    weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return plays + student_loss(functional_call(discriminator, weights, (student,)))


def logits_discriminator(classes: int, hidden: int) -> nn.Sequential:
    """From (N, K) to a score (N, 1): a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(classes, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, 1),
    )


def features_discriminator(channels: int, hidden: int) -> nn.Sequential:
    """From (N, C, H, W) to a score for each position (N, 1, H, W), which sees its neighbours."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, 1, 1),
    )


class Adversarial(FeatureTerm):
    """Pass for the teacher before a discriminator that is trained in the same steps.

    The value is the sum of both losses, 3 log 2 = 2.08 when the discriminator is blind. The settings are no paper's:
    theirs come with further losses, which are entries of their own here. `on: features` needs `layers`, such as `auto`,
    which is the last one before the image disappears; tokens and vectors count as maps of one column and one pixel.
    """

    where = "last"
    same_width = True

    use: Literal["adversarial"]
    on: Literal["logits", "features"] = "logits"
    """What the discriminator sees."""
    layers: Literal["auto"] | tuple[Pattern, ...] | dict[str, str] = ()
    """Where it sees features; none for logits."""
    hidden: int = Field(default=128, ge=1)
    """Width of the discriminator."""
    weight: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _features_have_layers(self) -> Any:
        if self.on == "logits" and self.layers:
            raise ValueError("`on: logits` looks at no layers; leave `layers` out or add `on: features`")
        if self.on == "features" and not self.layers:
            raise ValueError("`on: features` needs `layers`; add `layers: auto`")
        return self

    def parts(self, facts: Facts) -> nn.Module | None:
        if self.on == "logits":
            return nn.ModuleList([logits_discriminator(facts.classes, self.hidden)])
        refuse_unless_embedded(self.use, facts)
        refuse_unless_equal(self.use, facts)
        return nn.ModuleList([features_discriminator(width(shape), self.hidden) for shape in facts.teacher_shapes])

    def __call__(self, lesson: Lesson) -> Tensor:
        discriminators = cast(nn.ModuleList, lesson.parts)
        if self.on == "logits":
            return game(discriminators[0], lesson.student_NK, lesson.teacher_NK)
        pairs = zip(discriminators, lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([game(d, as_maps(student), as_maps(teacher)) for d, student, teacher in pairs])
