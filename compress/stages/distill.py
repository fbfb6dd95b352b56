"""The original network teaches the compressed one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress import checkpoint
from compress.errors import ModelError
from compress.losses import LossSettings
from compress.losses.kd import SoftTargets
from compress.product import Batch, Network, Preprocess, Product, Run
from compress.settings import Settings
from compress.training import Fit, Loss, fit, labels_loss, refuse_unmatched


class Distillation(Settings):
    """Who teaches, and how: the sum of the weighted losses, and the labels' cross entropy times `labels`."""

    teacher: str = "parent"
    """`parent` is the network before compression; anything else is the folder of a saved network
    (`runs/other/stages/01-train/network`)."""
    losses: tuple[LossSettings, ...] = Field(default=(SoftTargets(use="kd"),), min_length=1)
    labels: float = Field(default=0.1, ge=0)
    """Weight of the cross entropy with the labels."""


class Distill(Fit, Distillation):
    """Trains the network as it is now on its teacher's outputs and the labels."""

    use: Literal["distill"]

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no parameter."""
        refuse_unmatched(module, self.only, "distill")

    def apply(self, product: Product, run: Run) -> Product:
        loss = objective(self, product, run, label_smoothing=self.label_smoothing)
        module, history = fit(product.network.module, loss=loss, run=run, settings=self, label="distill")
        return replace(
            product,
            network=Network(module, product.network.structure),
            metrics={"history": history, "teacher": self.teacher},
        )


def objective(distillation: Distillation | None, product: Product, run: Run, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a training stage: the labels alone, or with a teacher whose parameters never move."""
    if distillation is None:
        return labels_loss(label_smoothing)
    teacher = _teacher(distillation, product, run)
    settings = distillation

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        student_NK = module(batch.images_NCHW)
        with torch.no_grad():
            teacher_NK = teacher(batch.images_NCHW)
        total = settings.labels * F.cross_entropy(student_NK, batch.labels_N, label_smoothing=label_smoothing)
        for term in settings.losses:
            total = total + term.weight * term(student_NK=student_NK, teacher_NK=teacher_NK)
        return total

    return loss


def _teacher(distillation: Distillation, product: Product, run: Run) -> nn.Module:
    """A frozen copy on the run's device."""
    if distillation.teacher == "parent":
        network = product.original
    else:
        network = checkpoint.load(Path(distillation.teacher))
        if network.structure.preprocess != run.data.preprocess:
            raise ModelError(
                distillation.teacher,
                f"this teacher sees other pixels ({network.structure.preprocess})",
                "name a network trained with this recipe's `preprocess`",
            )
        classes = network.structure.num_classes
        if classes != len(run.data.labels):
            raise ModelError(
                distillation.teacher,
                f"this teacher knows {classes} classes, the data has {len(run.data.labels)}",
                "name a network trained on the same classes",
            )
    teacher = copy.deepcopy(network.module).requires_grad_(False).eval()
    return teacher.to(run.device)
