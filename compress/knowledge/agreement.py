"""How often two networks say the same, and how far apart their probabilities are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def right(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """bool (N,): where the most likely class is the label."""
    return logits_NK.argmax(1) == labels_N


def agreement(one_NK: Tensor, other_NK: Tensor) -> float:
    """Share of images in [0, 1] for which both logits name the same class; symmetric, and 1 for equal logits."""
    return float((one_NK.argmax(1) == other_NK.argmax(1)).double().mean())


def agreement_on_mistakes(*, student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor) -> float | None:
    """Share of the images that the teacher gets wrong on which the student errs alike; None where there is none.

    Two accurate networks agree wherever both are right. Here they agree only if the student took the teacher's errors
    over as well.
    """
    wrong_N = ~right(teacher_NK, labels_N)
    return agreement(student_NK[wrong_N], teacher_NK[wrong_N]) if wrong_N.any() else None


def mean_kl(*, student_NK: Tensor, teacher_NK: Tensor) -> float:
    """Mean over images of KL(teacher || student) at temperature 1, in nats; at least 0, without an upper bound."""
    student, teacher = F.log_softmax(student_NK.double(), 1), F.log_softmax(teacher_NK.double(), 1)
    return float(F.kl_div(student, teacher, reduction="batchmean", log_target=True))


def mean_js(one_NK: Tensor, other_NK: Tensor) -> float:
    """Mean over images of the Jensen-Shannon divergence in nats: symmetric, from 0 to log 2.

    Unlike KL it does not follow a few images on which one network is sure of a class that the other rules out.
    """
    one, other = F.log_softmax(one_NK.double(), 1), F.log_softmax(other_NK.double(), 1)
    middle = torch.logaddexp(one, other) - math.log(2)
    halves = [F.kl_div(middle, side, reduction="batchmean", log_target=True) for side in (one, other)]
    return float(sum(halves) / 2)
