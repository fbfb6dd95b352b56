"""Copies of the student that teach it: what the teachers have in common that change during the training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from compress.observation import Answers, observe
from compress.product import Batch, Run
from compress.teachers.teacher import on_device


def copied(student: nn.Module, run: Run) -> nn.Module:
    """The student as it is now, frozen, in eval mode: BatchNorm uses its running statistics, dropout does nothing."""
    return on_device(copy.deepcopy(student), run)


def asked(module: nn.Module, batch: Batch, layers: Sequence[str], *, differentiable: bool) -> Answers:
    """What a copy makes of the batch, and what its `layers` return."""
    with nullcontext() if differentiable else torch.no_grad():
        return observe(module, batch.images_NCHW, layers)
