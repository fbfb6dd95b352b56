"""Attention transfer by gradients: Zagoruyko & Komodakis, 2017 (arXiv:1612.03928), section 3.2.

Both losses differentiate a gradient (double backward), so every operator needs a second derivative: torch's have one,
the fake quantization of this package has none. For float training only. A step takes several times as long, above all
with grouped convolutions, which torch differentiates twice group by group: 3.5 s for `attention_gradient` and 6.2 s for
`gradient_symmetry` where `kd` takes 0.6 s (64 images of 96 px, MobileNetV2 and a third of it, one core).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.errors import ModelError
from compress.labels import Task
from compress.losses.lesson import NO_LABEL, Lesson, Term


def input_gradient(logits_NK: Tensor, labels_N: Tensor, images_NCHW: Tensor, *, differentiable: bool) -> Tensor:
    """(N, C, H, W): the gradient of the labels' cross entropy, summed over images, with respect to the pixels.

    `images_NCHW` requires a gradient and the logits were computed from it. `differentiable` keeps the graph, so that
    what is computed from the gradient can be trained. An image without a label adds nothing to the sum.
    """
    loss = F.cross_entropy(logits_NK, labels_N, ignore_index=NO_LABEL, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images_NCHW, create_graph=differentiable, retain_graph=True)
    return gradient


def gradient_distance(one_NCHW: Tensor, other_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Half the squared L2 distance of two input gradients, mean over the images that have a label; 0 if none has.

    Equations 3 and 4 with the squared norm, whose derivative equation 5 is; the half is the paper's beta / 2.
    """
    labelled_N = labels_N != NO_LABEL
    distances_N = (one_NCHW - other_NCHW).square().flatten(1).sum(1)
    return 0.5 * (distances_N * labelled_N).sum() / labelled_N.sum().clamp(min=1)


class AttentionGradient(Term):
    """Be sensitive to the same pixels as the teacher.

    No weight is published. A teacher that knows its training images has gradients near 0 there, and the loss then
    flattens the student's, as double backpropagation does.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)
    # Not needs_labels: a part of the images is no longer what the logits were computed from.
    needs_input_gradients = True

    use: Literal["attention_gradient"]
    weight: float = Field(default=1.0, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        images_NCHW = _pixels(self.use, lesson)
        teacher = input_gradient(lesson.teacher_NK, lesson.labels_N, images_NCHW, differentiable=False)
        student = input_gradient(lesson.student_NK, lesson.labels_N, images_NCHW, differentiable=True)
        return gradient_distance(student, teacher, lesson.labels_N)


class GradientSymmetry(Term):
    """Be sensitive to the same pixels in an image and in its mirror image: the paper's symmetry norm, equation 6.

    The teacher is not asked. The student sees the mirrored images in a second pass, in training mode: BatchNorm's
    running statistics move twice a step, and dropout draws anew. No weight is published.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)
    needs_input_gradients = True
    needs_networks = True
    needs_teacher = False

    use: Literal["gradient_symmetry"]
    weight: float = Field(default=1.0, ge=0)

    def __call__(self, lesson: Lesson) -> Tensor:
        images_NCHW = _pixels(self.use, lesson)
        assert lesson.student is not None
        mirrored_NCHW = images_NCHW.detach().flip(3).requires_grad_()
        mirrored_NK = lesson.student(mirrored_NCHW)
        mirrored = input_gradient(mirrored_NK, lesson.labels_N, mirrored_NCHW, differentiable=True)
        upright = input_gradient(lesson.student_NK, lesson.labels_N, images_NCHW, differentiable=True)
        return gradient_distance(upright, mirrored.flip(3), lesson.labels_N)


def _pixels(loss: str, lesson: Lesson) -> Tensor:
    if lesson.images_NCHW is None or not lesson.images_NCHW.requires_grad:
        raise ModelError(loss, "the images carry no gradient", "pass images that require one to both networks")
    return lesson.images_NCHW
