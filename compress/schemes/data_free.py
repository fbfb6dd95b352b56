"""DAFL, data-free learning of student networks: Chen et al., 2019 (arXiv:1904.01186); with the BatchNorm statistics of
DeepInversion: Yin et al., 2020 (arXiv:1912.08795)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.labels import Task
from compress.observation import observe, stage_ends
from compress.product import Batch, Preprocess, Product, Run
from compress.schemes.branches import pooled
from compress.schemes.generator import Generator, Noise
from compress.settings import Settings
from compress.teachers.teacher import copied
from compress.teaching.objective import Objective, Taught, objective

PLACE = "scheme data_free"


def one_hot(teacher_NK: Tensor) -> Tensor:
    """Cross entropy of the teacher's logits with their own largest, batch mean: small where it is sure (equation 3)."""
    return F.cross_entropy(teacher_NK, teacher_NK.detach().argmax(1))


def activation(features_NC: Tensor) -> Tensor:
    """Minus the mean absolute value of the features: small where the teacher's filters find something (equation 4).

    A mean where the paper sums over features, as in the authors' code, which the published weight belongs to.
    """
    return -features_NC.abs().mean()


def information_entropy(teacher_NK: Tensor) -> Tensor:
    """Sum over classes of p log10 p, where p is the batch's mean prediction: minus its entropy, in [-log10 K, 0], least
    where all classes come equally often (equation 6).

    Decimal logarithm and no division by K, as in the authors' code, which the published weight belongs to.
    """
    mean_K = F.softmax(teacher_NK, dim=1).mean(0)
    # Clamped inside the logarithm only: its gradient at an underflown probability would be infinite.
    return (mean_K * mean_K.clamp_min(torch.finfo(mean_K.dtype).tiny).log10()).sum()


def statistics_distance(features: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
    """Euclidean distance of a batch's means per channel to `mean_C`, plus that of its variances to `variance_C`
    (DeepInversion, equation 4). Features are (N, C, ...); variances are not corrected for the batch's size."""
    axes = [axis for axis in range(features.ndim) if axis != 1]
    variances_C, means_C = torch.var_mean(features, dim=axes, correction=0)
    return torch.linalg.vector_norm(means_C - mean_C) + torch.linalg.vector_norm(variances_C - variance_C)


@contextmanager
def watched_statistics(module: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, a forward pass of `module` adds the distance of each BatchNorm's input to what it remembers."""
    distances: list[Tensor] = []

    def watch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        distances.append(statistics_distance(inputs[0], norm.running_mean, norm.running_var))  # type: ignore[arg-type]

    handles = [norm.register_forward_pre_hook(watch) for norm in _batchnorms(module)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def _batchnorms(module: nn.Module) -> list[nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    return [layer for layer in module.modules() if isinstance(layer, kind) and layer.running_mean is not None]


class DataFree(Settings):
    """Trains without one image: a generator learns to make images that the teacher knows, the student learns from them.

    One step trains both: the generator on what the teacher says of its images; the student, on the same images taken
    as given, by the stage's `losses`. The paper's is `losses: [{use: kd, temperature: 6, weight: 1}]`. There are no
    labels. The run's data only says which classes there are and how pixels are normalised (and evaluates the result).
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["data_free"]
    steps: int = Field(default=120, ge=1)
    """In an epoch."""
    latent: int = Field(default=1000, ge=1)
    """Numbers that an image is made of."""
    channels: int = Field(default=128, ge=2)
    """Of the generator's maps."""
    generator_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the generator, with the stage's optimizer; null for that of the student. Published: 0.001
    with `optimizer: adamw`."""
    one_hot: float = Field(default=0.05, ge=0)
    """Weight of: the teacher is sure."""
    activation: float = Field(default=0.01, ge=0)
    """Weight of: the teacher's last features are large."""
    information_entropy: float = Field(default=5.0, ge=0)
    """Weight of: all classes come equally often."""
    batchnorm: float = Field(default=0.0, ge=0)
    """Weight of: the mean and variance of each channel are those that the teacher's BatchNorm layers remember
    (DeepInversion)."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for statistics that no layer has."""
        self._refuse_no_batchnorm(module)

    def _refuse_no_batchnorm(self, module: nn.Module) -> None:
        if self.batchnorm and not _batchnorms(module):
            raise ModelError(PLACE, "`batchnorm`: the teacher has no BatchNorm layer", "leave `batchnorm` out")

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        noise = Noise(run.data, self.latent, self.steps * settings.batch_size)
        blind = replace(run, data=noise)
        student = product.network.module
        goal = objective(settings, product, blind, student=student)
        if goal.teacher.network is None:
            raise ModelError(PLACE, "the generator learns from one network, and this teacher has several", "name one")
        teacher = copied(goal.teacher.network.module, blind)
        self._refuse_no_batchnorm(teacher)
        given = run.data.preprocess
        last = stage_ends(teacher, given.size, given.channels)[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            generator = Generator(self.latent, given.size, self.channels, given.channels)
        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=lambda module, batch: self.step(goal, generator, teacher, last, module, batch),
            beside=generator,
            beside_lr=self.generator_lr,
        )
        return module, metrics | {"scheme": self.use}

    def step(
        self, goal: Objective, generator: nn.Module, teacher: nn.Module, last: str, module: nn.Module, batch: Batch
    ) -> Tensor:
        """The generator's loss and the student's; no gradient of one reaches the other."""
        images_NCHW = generator(batch.images_NCHW)
        given = replace(batch, images_NCHW=images_NCHW.detach())
        said = goal.see(module, given)
        return self.of_generator(teacher, images_NCHW, last) + goal.judge(said, given, module)

    def of_generator(self, teacher: nn.Module, images_NCHW: Tensor, last: str) -> Tensor:
        """What the generator minimises, given the frozen teacher and the name of its last layer with maps."""
        with watched_statistics(teacher if self.batchnorm else nn.Identity()) as distances:
            answers = observe(teacher, images_NCHW, (last,))
        total = (
            self.one_hot * one_hot(answers.logits_NK)
            + self.activation * activation(pooled(answers.maps[last]))
            + self.information_entropy * information_entropy(answers.logits_NK)
        )
        return total + self.batchnorm * torch.stack(distances).sum() if self.batchnorm else total
