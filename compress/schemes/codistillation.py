"""Codistillation: Anil et al., 2018 (arXiv:1804.03235)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import TrainingError
from compress.labels import Task
from compress.observation import observe
from compress.product import Batch, Preprocess, Product, Run
from compress.schemes.judged import accuracies_apart
from compress.settings import Settings
from compress.teaching import Objective, Taught, objective
from compress.training import fit, outputs_loss

PLACE = "scheme codistillation"


def kl_to_mean(student_NK: Tensor, others_MNK: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """KL(mean of the others' probabilities || student) at `temperature`, batch mean, times temperature**2.

    Algorithm 1 of the paper with the cross entropy as its loss, less the others' entropy, which has no gradient for the
    student. With one other this is Hinton's soft targets. Logits are (N, K); scalar in nats.
    """
    student = F.log_softmax(student_NK / temperature, dim=1)
    others = torch.stack([F.log_softmax(other_NK / temperature, dim=1) for other_NK in others_MNK])
    mean = others.logsumexp(0) - math.log(len(others_MNK))
    return F.kl_div(student, mean, reduction="batchmean", log_target=True) * temperature**2


def flattened(module: nn.Module) -> dict[torch.dtype, Tensor]:
    """All parameters and buffers as one vector for each dtype, detached."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in _tensors(module):
        groups.setdefault(tensor.dtype, []).append(tensor.detach().flatten())
    return {dtype: torch.cat(tensors) for dtype, tensors in groups.items()}


@torch.no_grad()
def restore(module: nn.Module, vectors: dict[torch.dtype, Tensor]) -> None:
    """Writes what `flattened` of an equal network returned into `module`."""
    begin = dict.fromkeys(vectors, 0)
    for tensor in _tensors(module):
        first = begin[tensor.dtype]
        begin[tensor.dtype] = first + tensor.numel()
        tensor.copy_(vectors[tensor.dtype][first : begin[tensor.dtype]].view(tensor.shape))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class Copies:
    """The other processes' networks as they were at the last exchange, in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        self.others = [copy.deepcopy(module).requires_grad_(False).eval() for _ in range(dist.get_world_size() - 1)]

    def exchange(self, module: nn.Module) -> None:
        """Takes the networks of all processes at their present state; all have to call this together."""
        mine = flattened(module)
        gathered = {
            dtype: [torch.empty_like(vector) for _ in range(dist.get_world_size())] for dtype, vector in mine.items()
        }
        for dtype, vector in mine.items():
            dist.all_gather(gathered[dtype], vector)
        ranks = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        for other, rank in zip(self.others, ranks, strict=True):
            restore(other, {dtype: vectors[rank] for dtype, vectors in gathered.items()})

    def logits(self, images_NCHW: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [other(images_NCHW) for other in self.others]


def due(step: int, *, first: int, every: int) -> bool:
    """Whether copies are exchanged before this step: at `first`, and every `every` steps from then on."""
    return step >= first and (step - first) % every == 0


class Codistillation(Settings):
    """Every process of torchrun trains a network of its own, and learns from what the others' would say.

    Each sees all training images, in its own order and with its own augmentations, in batches of the stage's
    `batch_size`. The others' predictions come from copies that are only now and then renewed, so the processes exchange
    far less than with shared gradients. The result is the first process's network, in all of them. In the paper each
    also reads other images.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["codistillation"]
    every: int = Field(default=50, ge=1)
    """Steps between two exchanges of the networks."""
    burn_in: float = Field(default=0.1, ge=0, lt=1)
    """The part of the training in which each learns alone: early predictions teach nothing."""
    weight: float = Field(default=1.0, ge=0)
    """Of the divergence from the mean of the others' predictions."""
    temperature: float = Field(default=1.0, gt=0)
    with_teacher: bool = True
    """Each also has the stage's teacher, with its losses and the weight of its labels. `false` is the paper's: the
    labels with weight 1, and `losses` and `labels` are not used."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises TrainingError where there is a single process."""
        if not dist.is_initialized() or dist.get_world_size() < 2:
            raise TrainingError(
                PLACE,
                "needs several processes, each with a network of its own, and this is one",
                "start it with `torchrun --nproc-per-node 2 -m compress.cli run recipe.yaml`, or use `mutual`",
            )

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        student = product.network.module
        self.check(student, run.data.preprocess)
        # Of all images, in an order and with augmentations of its own.
        own = replace(run, seed=run.seed + run.rank, rank=0, world_size=1)
        goal: Objective | None = None
        judged = outputs_loss(run.data, settings)
        if self.with_teacher:
            goal = objective(settings, product, own, student=student, training=settings)
        copies: Copies | None = None
        step = 0
        first: int | None = None

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            nonlocal copies, step, first
            said = observe(module, batch.images_NCHW) if goal is None else goal.see(module, batch)
            total = judged(said.logits_NK, batch.labels_N) if goal is None else goal.judge(said, batch, module)
            if batch.progress >= self.burn_in:
                first = step if first is None else first
                copies = copies or Copies(module)
                if due(step, first=first, every=self.every):
                    copies.exchange(module)
                others_MNK = copies.logits(batch.images_NCHW.detach())
                total = total + self.weight * kl_to_mean(said.logits_NK, others_MNK, self.temperature)
            step += 1
            return total

        trained, history = fit(
            student,
            loss=loss,
            run=own,
            settings=settings,
            label=label,
            views=settings.views,
            companion=goal.companion if goal else None,
            apart=True,
        )
        accuracies = accuracies_apart(trained, run)
        of_the_first(trained, run)
        found = {"scheme": "codistillation", "accuracies": accuracies, "steps_between_exchanges": self.every}
        return trained, {"history": history, **(goal.metrics() if goal else {}), **found}


def of_the_first(module: nn.Module, run: Run) -> None:
    """Writes the first process's weights and statistics into `module` of all processes."""
    vectors = {dtype: vector.to(run.device) for dtype, vector in flattened(module).items()}
    for vector in vectors.values():
        dist.broadcast(vector, 0)
    restore(module, vectors)
