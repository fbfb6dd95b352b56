"""Neuron selectivity transfer: Huang & Wang, 2017 (arXiv:1707.01219), with its three kernels.

Each channel's map, at length 1, is a sample of what the layer's neurons select; student and teacher are compared as two
sets of samples by their maximum mean discrepancy. The sets may have different sizes, so widths differ freely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import channels_by_positions, refuse_unless_maps, refuse_unless_places, unit

Kernel = Literal["linear", "polynomial", "gaussian"]


def linear_kernel(x_NCP: Tensor, y_NDP: Tensor) -> Tensor:
    """(N, C, D): x' y for each image and pair of rows."""
    return x_NCP @ y_NDP.transpose(1, 2)


def polynomial_kernel(x_NCP: Tensor, y_NDP: Tensor, degree: int = 2, offset: float = 0.0) -> Tensor:
    """(N, C, D): (x' y + offset)**degree."""
    return (linear_kernel(x_NCP, y_NDP) + offset).pow(degree)


def gaussian_kernel(x_NCP: Tensor, y_NDP: Tensor, variance_N: Tensor) -> Tensor:
    """(N, C, D): exp(-|x - y|**2 / (2 variance)), with a variance for each image."""
    half_x, half_y = 0.5 * x_NCP.square().sum(2, keepdim=True), 0.5 * y_NDP.square().sum(2, keepdim=True)
    # The exponent as one product of longer rows: x' y - |x|**2 / 2 - |y|**2 / 2. Any other way holds more of (N, C, D).
    left = torch.cat([x_NCP, -half_x, torch.ones_like(half_x)], 2) / variance_N[:, None, None]
    right = torch.cat([y_NDP, torch.ones_like(half_y), -half_y], 2)
    return (left @ right.transpose(1, 2)).exp()


def pair_variance(x_NCP: Tensor, y_NDP: Tensor) -> Tensor:
    """(N,): mean squared distance of the rows of x from those of y, without a gradient; at least 1e-6.

    The paper's choice of the Gaussian's variance, for each image by itself.
    """
    with torch.no_grad():
        lengths_N = x_NCP.square().sum(2).mean(1) + y_NDP.square().sum(2).mean(1)
        return (lengths_N - 2 * (x_NCP.mean(1) * y_NDP.mean(1)).sum(1)).clamp(min=1e-6)


def mmd(student_NCP: Tensor, teacher_NDP: Tensor, kernel: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of rows, batch mean; all pairs count, so it is at least 0.

    `kernel` takes rows (N, C, P) and (N, D, P), and its arguments (N,) for each image.
    """
    with torch.no_grad():  # image by image: (N, D, D) would be the largest of all, and nothing is differentiated
        each = [kernel(rows, rows, *found).mean() for rows, *found in _images(teacher_NDP, *per_image)]
    within = torch.stack(each).mean() + kernel(student_NCP, student_NCP, *per_image).mean()
    return within - 2 * kernel(student_NCP, teacher_NDP, *per_image).mean()


def _images(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(1) for tensor in tensors), strict=True)


def linear_mmd(student_NCP: Tensor, teacher_NDP: Tensor) -> Tensor:
    """Squared MMD of the linear kernel, batch mean: the squared distance of the two mean rows."""
    return (student_NCP.mean(1) - teacher_NDP.mean(1)).square().sum(1).mean()


def polynomial_mmd(student_NCP: Tensor, teacher_NDP: Tensor, degree: int = 2, offset: float = 0.0) -> Tensor:
    """Squared MMD of the polynomial kernel, batch mean."""
    position_pairs = student_NCP.shape[2] ** 2
    if degree == 2 and offset == 0 and position_pairs < student_NCP.shape[1] * teacher_NDP.shape[1]:
        # The mean of (x' y)**2 is <X' X, Y' Y> / (C D): in a network's last layers P * P is far less than C * D.
        student_NPP = student_NCP.transpose(1, 2) @ student_NCP / student_NCP.shape[1]
        teacher_NPP = teacher_NDP.transpose(1, 2) @ teacher_NDP / teacher_NDP.shape[1]
        return (student_NPP - teacher_NPP).square().sum((1, 2)).mean()
    return mmd(student_NCP, teacher_NDP, partial(polynomial_kernel, degree=degree, offset=offset))


def gaussian_mmd(student_NCP: Tensor, teacher_NDP: Tensor) -> Tensor:
    """Squared MMD of the Gaussian kernel with `pair_variance`, batch mean."""
    return mmd(student_NCP, teacher_NDP, gaussian_kernel, pair_variance(student_NCP, teacher_NDP))


def neuron_selectivity(
    student: Tensor, teacher: Tensor, kernel: Kernel, degree: int = 2, offset: float = 0.0
) -> Tensor:
    """Squared MMD between the channels of two layers, each channel at length 1 over its positions; batch mean.

    Maps are (N, C, H, W) or (N, tokens, C); N and positions are equal, C differs freely. At least 0 (the empirical MMD
    with all pairs), 0 for equal sets of channels in whatever order. A dead channel counts as the zero vector.
    """
    student_NCP = unit(channels_by_positions(student), dim=2)
    teacher_NDP = unit(channels_by_positions(teacher), dim=2)
    if kernel == "linear":
        return linear_mmd(student_NCP, teacher_NDP)
    if kernel == "polynomial":
        return polynomial_mmd(student_NCP, teacher_NDP, degree, offset)
    return gaussian_mmd(student_NCP, teacher_NDP)


class NST(FeatureTerm):
    """Have channels that select the same places as the teacher's, whichever channel it is.

    Defaults are RepDistiller's and mdistiller's: polynomial kernel of degree 2 without an offset, weight 50. The
    Gaussian kernel, and the polynomial one with other settings, hold a few tensors (N, C, D) of all pairs of channels:
    0.2 GB each for 64 images and 640 against 1280 channels.
    """

    use: Literal["nst"]
    kernel: Kernel = "polynomial"
    degree: int = Field(default=2, ge=1, le=8)
    """Of the polynomial kernel (x' y + offset)**degree."""
    offset: float = Field(default=0.0, ge=0)
    weight: float = Field(default=50.0, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_maps(self.use, facts)
        refuse_unless_places(self.use, facts)
        return None

    def __call__(self, lesson: Lesson) -> Tensor:
        pairs = zip(lesson.student_maps, lesson.teacher_maps, strict=True)
        return torch.stack([neuron_selectivity(s, t, self.kernel, self.degree, self.offset) for s, t in pairs])
