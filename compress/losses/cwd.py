"""Channel-wise distillation: Shu et al., 2021 (arXiv:2011.13256)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import channels_by_positions, refuse_unless_equal, refuse_unless_maps, refuse_unless_places


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) between each channel's softmax over positions, mean over N and C, times temperature**2.

    Both maps are (N, C, H, W) or (N, tokens, C), of the same shape; the result is in nats. Adding a constant to a
    channel changes nothing.
    """
    student_NCP = F.log_softmax(channels_by_positions(student) / temperature, dim=2)
    teacher_NCP = F.log_softmax(channels_by_positions(teacher) / temperature, dim=2)
    divergences = F.kl_div(student_NCP, teacher_NCP, reduction="sum", log_target=True)
    return divergences / (student_NCP.shape[0] * student_NCP.shape[1]) * temperature**2


class CWD(FeatureTerm):
    """Be active in the same places as the teacher, channel by channel.

    Made for dense prediction: temperature 4 and weight 3 are the authors' command for a segmentation network's logits.
    """

    same_width = True

    use: Literal["cwd"]
    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=3.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts)
        refuse_unless_places(self.use, facts)
        refuse_unless_equal(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([channel_divergence(student, teacher, self.temperature) for student, teacher in pairs])
