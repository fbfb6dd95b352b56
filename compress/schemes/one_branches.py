"""ONE: knowledge distillation by an on-the-fly native ensemble; Lan et al., 2018 (arXiv:1806.04606)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.labels import Task
from compress.losses.kd import soft_targets
from compress.observation import Answers, answers_to_blank
from compress.product import Batch, Preprocess, Product, Run
from compress.schemes.branches import copies_of, pooled, ramp, refuse_quantized, split
from compress.settings import Settings
from compress.tasks.classification import cross_entropy
from compress.teaching.objective import Objective, Taught, objective
from compress.training import OutputsLoss


class Gate(nn.Module):
    """How much each branch counts for an image, (N, branches) with rows of sum 1: pooling, linear, BatchNorm, ReLU,
    softmax of what the branches share (section 3.1)."""

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, branches), nn.BatchNorm1d(branches), nn.ReLU(), nn.Softmax(dim=1)
        )

    def forward(self, shared: Tensor) -> Tensor:
        weights_NM: Tensor = self.layers(pooled(shared))
        return weights_NM


def gated(logits_MNK: Sequence[Tensor], weights_NM: Tensor) -> Tensor:
    """(N, K): the branches' logits, each times its weight for the image, summed (equation 3)."""
    return torch.einsum("mnk,nm->nk", torch.stack(list(logits_MNK)), weights_NM)


def native_ensemble(
    logits_MNK: Sequence[Tensor],
    weights_NM: Tensor,
    labels_N: Tensor,
    temperature: float,
    weight: float,
    labels_loss: OutputsLoss = cross_entropy,
) -> Tensor:
    """What ONE adds to the first branch's own loss: the labels for the other branches and for the gated ensemble, plus
    `weight` times T^2 KL(ensemble || branch) summed over all branches (equations 5 to 7, batch mean, in nats).

    The ensemble's predictions are targets, as in the authors' code: that term moves no gate and teaches the ensemble
    nothing.
    """
    ensemble_NK = gated(logits_MNK, weights_NM)
    total = labels_loss(ensemble_NK, labels_N)
    for logits_NK in logits_MNK[1:]:
        total = total + labels_loss(logits_NK, labels_N)
    for logits_NK in logits_MNK:
        total = total + weight * soft_targets(logits_NK, ensemble_NK.detach(), temperature)
    return total


class Branches(nn.Module):
    """The other branches and the gate: what ONE trains beside the student."""

    def __init__(self, tails: nn.ModuleList, gate: nn.Module) -> None:
        super().__init__()
        self.tails, self.gate = tails, gate

    def forward(self, shared: Tensor) -> tuple[list[Tensor], Tensor]:
        """The other branches' logits, and the weights of all branches."""
        return [tail(shared) for tail in self.tails], self.gate(shared)


class One(Settings):
    """The student gets several tails, whose gated ensemble teaches each of them; the other tails are then dropped.

    The student is the first branch and returns as it is, in the same structure. Its own loss is that of the stage
    (`losses` from the teacher, and `labels`); the paper's, which has no teacher, is `labels: 1` with
    `losses: [{use: kd, weight: 0}]`. The paper's branches start at random weights; ours are copies of the student's
    tail with noise, because they have been trained before. Functional dropout does nothing in the other branches.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["one"]
    after: str = "auto"
    """The layer behind which branches begin; `auto`: the end of the last stage but one, as in the paper."""
    branches: int = Field(default=3, ge=2)
    """With the student's own."""
    temperature: float = Field(default=3.0, gt=0)
    weight: float = Field(default=1.0, ge=0)
    """Of what the ensemble teaches the branches."""
    ramp: float = Field(default=0.27, ge=0, le=1)
    """The part of the training over which `weight` rises (80 of 300 epochs in the authors' code); 0 for none."""
    noise: float = Field(default=0.1, gt=0)
    """What the other branches begin with, in standard deviations of each weight tensor: equal ones would stay equal."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError where the network cannot be cut at `after`."""
        split(module, self.after, preprocess)

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        refuse_quantized(product.network.structure, self.use)
        student = product.network.module
        goal = objective(settings, product, run, student=student, training=settings)
        cut, branches = self.build(student, run)
        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=lambda module, batch: self.step(goal, branches, cut, module, batch),
            beside=branches,
        )
        return module, metrics | {"scheme": self.use, "after": cut}

    def build(self, student: nn.Module, run: Run) -> tuple[str, Branches]:
        """The layer behind which branches begin, and the other branches with the gate."""
        cut, tail = split(student, self.after, run.data.preprocess)
        generator = torch.Generator().manual_seed(run.seed)
        given = run.data.preprocess
        shared = answers_to_blank(student, given.size, (cut,), given.channels).maps[cut]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            gate = Gate(pooled(shared).shape[1], self.branches)
        return cut, Branches(copies_of(tail, self.branches - 1, noise=self.noise, generator=generator), gate)

    def step(self, goal: Objective, branches: Branches, cut: str, module: nn.Module, batch: Batch) -> Tensor:
        """The student's own loss and what the branches add to it."""
        said: Answers = goal.see(module, batch, (cut,))
        others, weights_NM = branches(said.maps[cut])
        now = self.weight * ramp(batch.progress, self.ramp)
        logits_MNK = [said.logits_NK, *others]
        return goal.judge(said, batch, module) + native_ensemble(
            logits_MNK, weights_NM, batch.labels_N, self.temperature, now, goal.labels_loss
        )
