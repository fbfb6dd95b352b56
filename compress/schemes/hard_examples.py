"""Images on which student and teacher disagree most: data-free adversarial distillation, Fang et al., 2019
(arXiv:1912.11006), and zero-shot knowledge transfer, Micaelli & Storkey, 2019 (arXiv:1905.09768)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.labels import Task
from compress.losses.kd import soft_targets
from compress.observation import unwrapped
from compress.product import Batch, Preprocess, Product, Run
from compress.schemes.generator import Generator, Noise
from compress.settings import Settings
from compress.teaching.objective import Objective, Taught, objective

PLACE = "scheme hard_examples"


def discrepancy(student_NK: Tensor, teacher_NK: Tensor, loss: Literal["l1", "kl"]) -> Tensor:
    """How far the logits (N, K) are apart: `l1`, the mean absolute difference (DFAD, equation 5), or `kl`,
    KL(teacher || student) in nats, batch mean (ZSKT, equation 1)."""
    return F.l1_loss(student_NK, teacher_NK) if loss == "l1" else soft_targets(student_NK, teacher_NK, 1.0)


def as_given(module: nn.Module, images_NCHW: Tensor) -> Tensor:
    """The logits of `module` as a fixed function of the images: in its mode, but no gradient reaches its parameters and
    no statistic of it moves."""
    state = {name: tensor.detach() for name, tensor in module.named_parameters()}
    state |= {name: tensor.clone() for name, tensor in module.named_buffers()}
    logits_NK: Tensor = functional_call(module, state, (images_NCHW,))
    return logits_NK


class HardExamples(Settings):
    """Trains without one image: a generator looks for images on which the student differs from the teacher, and the
    student learns to agree there.

    The student minimises the discrepancy, plus the stage's `losses` on the same images. DFAD alone is `loss: l1` with
    `losses: [{use: kd, weight: 0}]`; ZSKT is `loss: kl`, `student_steps: 10` with `losses: [{use: attention, weight:
    250}]`. There are no labels. The run's data only says which classes there are and how pixels are normalised (and
    evaluates the result).
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["hard_examples"]
    loss: Literal["l1", "kl"] = "l1"
    """What the generator maximises and the student minimises."""
    weight: float = Field(default=1.0, gt=0)
    """Of the discrepancy, for both."""
    student_steps: int = Field(default=5, ge=1)
    """The generator takes one step in so many of the student: 5 in DFAD, 10 in ZSKT."""
    steps: int = Field(default=100, ge=1)
    """In an epoch."""
    latent: int = Field(default=256, ge=1)
    """Numbers that an image is made of."""
    channels: int = Field(default=128, ge=2)
    """Of the generator's maps."""
    generator_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the generator, with the stage's optimizer; null for that of the student. Published: 0.001
    with `optimizer: adamw`."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Nothing depends on the network."""

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        blind = replace(run, data=Noise(run.data, self.latent, self.steps * settings.batch_size))
        student = product.network.module
        goal = objective(settings, product, blind, student=student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            given = run.data.preprocess
            generator = Generator(self.latent, given.size, self.channels, given.channels)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            turn = (batch.step + 1) % self.student_steps == 0
            return self.step(goal, generator, module, batch, generators_turn=turn)

        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=loss,
            beside=generator,
            beside_lr=self.generator_lr,
        )
        return module, metrics | {"scheme": self.use}

    def step(
        self, goal: Objective, generator: nn.Module, module: nn.Module, batch: Batch, *, generators_turn: bool
    ) -> Tensor:
        """The student's loss; in the generator's turn with the generator's gradient as well, in the same value.

        No gradient of one reaches the other.
        """
        with torch.set_grad_enabled(generators_turn):
            images_NCHW = generator(batch.images_NCHW)
        given = replace(batch, images_NCHW=images_NCHW.detach())
        said = goal.see(module, given)
        teacher_NK = goal.teacher.answers(given, ()).logits_NK
        total = self.weight * discrepancy(said.logits_NK, teacher_NK, self.loss)
        total = total + goal.judge(said, given, module)
        if generators_turn:
            loss = self.of_generator(goal, unwrapped(module), replace(batch, images_NCHW=images_NCHW))
            total = total + (loss - loss.detach())  # what is reported stays the student's loss
        return total

    def of_generator(self, goal: Objective, student: nn.Module, made: Batch) -> Tensor:
        """What the generator minimises: minus the discrepancy on the images that it made."""
        teacher_NK = goal.teacher.answers(made, (), differentiable=True).logits_NK
        return -self.weight * discrepancy(as_given(student, made.images_NCHW), teacher_NK, self.loss)
