"""Images changed by a hair so that a network errs: FGSM, Goodfellow et al., 2015 (arXiv:1412.6572), and PGD, Madry et
al., 2018 (arXiv:1706.06083).

Both work on pixels in [0, 1] and take a function from such pixels to logits, so the bound is in pixels whatever a
network's normalisation is. Attacked images are real-valued: no rounding to 255ths follows.

In a fake-quantized network gradients pass the rounding by the straight-through estimator, as in its training. It is no
exact gradient: a better attack may exist, so the accuracy under attack is an upper bound, more so than for a float
network (Athalye et al., 2018, arXiv:1802.00420).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Classify = Callable[[Tensor], Tensor]
"""From pixels (N, C, H, W) in [0, 1] to logits (N, K). Its parameters are left alone."""


def pixel_gradient(classify: Classify, pixels_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Gradient, with respect to the pixels, of the labels' cross entropy summed over images: each gets its own."""
    pixels_NCHW = pixels_NCHW.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = F.cross_entropy(classify(pixels_NCHW), labels_N, reduction="sum")
        (gradient_NCHW,) = torch.autograd.grad(loss, pixels_NCHW)
    return gradient_NCHW


def fgsm(classify: Classify, pixels_NCHW: Tensor, labels_N: Tensor, *, eps: float) -> Tensor:
    """Each pixel moved by `eps` in the direction that raises the loss, and kept in [0, 1]; section 4 of the paper.

    A pixel without a gradient stays.
    """
    step_NCHW = eps * pixel_gradient(classify, pixels_NCHW, labels_N).sign()
    return (pixels_NCHW + step_NCHW).clamp(0, 1)


def pgd(
    classify: Classify,
    pixels_NCHW: Tensor,
    labels_N: Tensor,
    *,
    eps: float,
    steps: int,
    step: float | None = None,
    start_NCHW: Tensor | None = None,
) -> Tensor:
    """`steps` of FGSM by `step` each, every one followed by the way back into the ball of `eps` and into [0, 1].

    Section 2.1 of the paper. `step` is by default a quarter of `eps` and `start_NCHW`, in [-1, 1], where in
    the ball the first step begins (all zeros: at the image): the paper's attack on CIFAR-10 is eps 8/255, steps of
    2/255, 7 of them, from a uniformly random start.
    """
    step = eps / 4 if step is None else step
    low_NCHW, high_NCHW = (pixels_NCHW - eps).clamp_min(0), (pixels_NCHW + eps).clamp_max(1)
    attacked_NCHW = pixels_NCHW if start_NCHW is None else pixels_NCHW + eps * start_NCHW
    attacked_NCHW = torch.clamp(attacked_NCHW, low_NCHW, high_NCHW)
    for _ in range(steps):
        attacked_NCHW = attacked_NCHW + step * pixel_gradient(classify, attacked_NCHW, labels_N).sign()
        attacked_NCHW = torch.clamp(attacked_NCHW, low_NCHW, high_NCHW)
    return attacked_NCHW


def fools_too(
    *, source_before_N: Tensor, source_after_N: Tensor, target_before_N: Tensor, target_after_N: Tensor
) -> float | None:
    """Of the images that fool the network they were made for, the share that fools the other one too; None without any.

    All are bool (N,): whether a network is right before and after the attack. An image counts where both were right
    before: a network that errs anyway is not fooled. Ojha et al. attack the teacher and ask the student.
    """
    fooled_N = source_before_N & ~source_after_N & target_before_N
    return float((~target_after_N[fooled_N]).double().mean()) if fooled_N.any() else None
