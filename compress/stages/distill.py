"""The original network teaches the compressed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress import checkpoint
from compress.errors import DataError, ModelError
from compress.losses import LossSettings
from compress.losses.kd import SoftTargets
from compress.product import Batch, Network, Preprocess, Product, Run
from compress.quantization import fold_batchnorm
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
    views: int | None = Field(default=None, ge=1)
    """So many different augmentations of each image, repeated in turn epoch by epoch; the teacher then looks at each
    once, and its answers stay in memory (4 bytes for each image, view and class). null draws new ones for ever."""


class Distill(Fit, Distillation):
    """Trains the network as it is now on its teacher's outputs and the labels."""

    use: Literal["distill"]

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no parameter."""
        refuse_unmatched(module, self.only, "distill")

    def apply(self, product: Product, run: Run) -> Product:
        loss = objective(self, product, run, label_smoothing=self.label_smoothing)
        module, history = fit(
            product.network.module, loss=loss, run=run, settings=self, label="distill", views=self.views
        )
        return replace(
            product,
            network=Network(module, product.network.structure),
            metrics={"history": history, "teacher": self.teacher},
        )


def objective(distillation: Distillation | None, product: Product, run: Run, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of a training stage: the labels alone, or with a teacher whose parameters never move."""
    if distillation is None:
        return labels_loss(label_smoothing)
    teacher: Callable[[Batch], Tensor] = _teacher(distillation, product, run)
    settings = distillation
    if settings.views:
        count, classes = run.data.count("train"), len(run.data.labels)
        teacher = Remembered(teacher, count, settings.views)
        run.progress.note(
            f"The teacher's answers to {settings.views} views of {count} images stay in memory "
            f"({settings.views * count * classes * 4 / 1e6:.3g} MB)."
        )

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        student_NK = module(batch.images_NCHW)
        teacher_NK = teacher(batch)
        total = settings.labels * F.cross_entropy(student_NK, batch.labels_N, label_smoothing=label_smoothing)
        for term in settings.losses:
            total = total + term.weight * term(student_NK=student_NK, teacher_NK=teacher_NK)
        return total

    return loss


class Remembered:
    """A teacher that looks once at each view of each image; with several processes, each asks for its own images."""

    def __init__(self, teacher: Callable[[Batch], Tensor], images: int, views: int) -> None:
        self.teacher = teacher
        self.known_VN = torch.zeros(views, images, dtype=torch.bool)
        self.logits_VNK: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """float32 logits, in the order of the batch."""
        if batch.indices_N is None:
            raise DataError("distill", "`views` needs data that numbers its images", "leave `views` out")
        indices_N, view = batch.indices_N.cpu(), batch.view
        new_N = ~self.known_VN[view, indices_N]
        if new_N.any():
            rows = slice(None) if new_N.all() else new_N.to(batch.images_NCHW.device)
            new_NK = self.teacher(replace(batch, images_NCHW=batch.images_NCHW[rows])).float()
            if self.logits_VNK is None:
                self.logits_VNK = new_NK.new_empty(*self.known_VN.shape, new_NK.shape[1])
            self.logits_VNK[view, batch.indices_N[rows]] = new_NK
            self.known_VN[view, indices_N] = True
        assert self.logits_VNK is not None
        return self.logits_VNK[view, batch.indices_N]


def _teacher(distillation: Distillation, product: Product, run: Run) -> Callable[[Batch], Tensor]:
    """The logits of a frozen copy on the run's device."""
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
    try:
        teacher: nn.Module = fold_batchnorm(network.module)
    except ModelError:  # its control flow cannot be traced
        teacher = copy.deepcopy(network.module)
    layout = torch.channels_last if run.data.channels_last else torch.contiguous_format
    teacher.requires_grad_(False).eval().to(run.device, memory_format=layout)  # type: ignore[call-overload]

    def logits(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits_NK: Tensor = teacher(batch.images_NCHW)
        return logits_NK

    return logits
