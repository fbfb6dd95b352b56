"""Hints: Romero et al., 2015 (arXiv:1412.6550), equation 3."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import refuse_unless_equal


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of what two layers return: tensors of the same shape, whatever it is.

    The paper sums where we average, so that the loss does not grow with the layer.
    """
    return 0.5 * F.mse_loss(student, teacher)


class FitNets(FeatureTerm):
    """Match what layers return.

    The paper's regressor is `adaptor: linear`; a pruned student needs none, it has the channels that were `kept`. The
    paper's two stages are `active: [0, 0.3]` here and `active: [0.3, 1]` for the other losses. RepDistiller's weight
    is 100 for the mean square without the half, of one layer in the middle: 200 here, and name that layer.
    """

    same_width = True

    use: Literal["fitnets"]
    weight: float = Field(default=200.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_equal(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([hint(student, teacher) for student, teacher in pairs])
