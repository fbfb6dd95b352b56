"""Activation boundaries: Heo et al., 2019 (arXiv:1811.03233); their loss with a margin, which has gradients."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_unless_equal


def boundary(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """How far the student is from the teacher's side of 0, beyond `margin`: the mean of squares.

    Both are what goes into an activation, of the same shape. Where the teacher is at or below 0 the student should be
    at or below -margin, elsewhere above margin; it is 0 exactly then. The gradient is continuous.
    """
    with torch.no_grad():  # the derivative of a distance to the nearest point does not move that point
        nearest = torch.where(teacher > 0, student.clamp(min=margin), student.clamp(max=-margin))
    return F.mse_loss(student, nearest)


class ActivationBoundary(FeatureTerm):
    """Switch each neuron on and off where the teacher does, whatever its value.

    Compares what goes into activations. `layers: auto` are those in front of each stage's last activation: in
    MobileNetV2 `features.4.conv.0.1`, `features.7.conv.0.1`, `features.14.conv.0.1` and `features.18.1`, which the
    authors chose, and `features.2.conv.0.1`. A layer whose teacher is nowhere below 0 is refused.

    The authors and RepDistiller sum over a layer, divide by 1000 / 3 and give layer i of L the weight 2**(i - L + 1).
    In their CIFAR networks each stage has half the numbers of the one before, so both together are the mean over a
    layer times one factor: 49 for a teacher whose last stage returns 256 x 8 x 8 (resnet32x4), hence 50. They train
    with this loss alone, then without it (30 of 270 epochs): `active: [0, 0.1]`.
    """

    same_width = True
    where: ClassVar[Literal["stages", "last", "activations"]] = "activations"

    use: Literal["activation_boundary"]
    margin: float = Field(default=1.0, gt=0)
    weight: float = Field(default=50.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_equal(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        if lesson.progress < self.active[0] + 0.01:  # not always: on a GPU a look at values waits for all work so far
            self._refuse_activations(lesson)
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([boundary(student, teacher, self.margin) for student, teacher in pairs])

    def _refuse_activations(self, lesson: Lesson) -> None:
        for name, teacher in zip(lesson.layers, lesson.teacher_maps, strict=True):
            if teacher.min() >= 0:
                problem = "the teacher returns nothing below 0, and `activation_boundary` asks on which side it is"
                raise ModelError(name, problem, "name the layer in front of the activation in `layers`")
