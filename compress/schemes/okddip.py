"""OKDDip: online knowledge distillation with diverse peers; Chen et al., 2020 (arXiv:1912.00350)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.labels import Task
from compress.observation import answers_to_blank
from compress.product import Batch, Preprocess, Product, Run
from compress.schemes.branches import (
    copies_of,
    pooled,
    ramp,
    refuse_quantized,
    split,
    with_features,
)
from compress.settings import Settings
from compress.tasks.classification import cross_entropy
from compress.teaching.objective import Objective, Taught, objective
from compress.training import OutputsLoss


def attention(queries_NMD: Tensor, keys_NMD: Tensor) -> Tensor:
    """(N, M, M): how much peer a (row) learns from peer b (column), softmax over b of the products (equation 5)."""
    return torch.softmax(queries_NMD @ keys_NMD.transpose(1, 2), dim=2)


def divergence(target_NK: Tensor, student_NK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || softmax(student / T)) of probabilities to logits, batch mean in nats; 0 log 0 counts as 0."""
    log_NK = F.log_softmax(student_NK / temperature, dim=1)
    # Clamped inside the logarithm only: its gradient at an underflown probability would be infinite.
    target_log_NK = target_NK.clamp_min(torch.finfo(target_NK.dtype).tiny).log()
    return (target_NK * (target_log_NK - log_NK)).sum(1).mean() * temperature**2


def diverse_peers(
    leader_NK: Tensor,
    peers_MNK: Sequence[Tensor],
    attention_NMM: Tensor,
    labels_N: Tensor,
    temperature: float,
    weight: float,
    labels_loss: OutputsLoss = cross_entropy,
) -> Tensor:
    """What OKDDip adds to the leader's own loss: the labels for each peer, and `weight` times the two levels of
    T^2 KL (equations 4, 6 and 8, batch means).

    First level: peer a learns sum_b attention[a, b] q_b, where q are the peers' softened predictions; gradients flow
    into the targets, as in the authors' code, since the attention learns through them alone. (That code mixes logits,
    the paper predictions.) Second level: the leader learns the plain mean of q, which here sends no gradient back, so
    that the peers stay free of the leader.
    """
    soft_MNK = torch.stack([F.softmax(peer_NK / temperature, dim=1) for peer_NK in peers_MNK])
    targets_MNK = torch.einsum("nab,bnk->ank", attention_NMM, soft_MNK)
    total = weight * divergence(soft_MNK.mean(0).detach(), leader_NK, temperature)
    for peer_NK, target_NK in zip(peers_MNK, targets_MNK, strict=True):
        total = total + labels_loss(peer_NK, labels_N)
        total = total + weight * divergence(target_NK, peer_NK, temperature)
    return total


class Peers(nn.Module):
    """The auxiliary peers and the two projections that their attention is made of."""

    def __init__(self, tails: nn.ModuleList, channels: int, reduction: int) -> None:
        super().__init__()
        self.tails = tails
        self.queries = nn.Linear(channels, max(1, channels // reduction), bias=False)
        self.keys = nn.Linear(channels, max(1, channels // reduction), bias=False)

    def forward(self, shared: Tensor) -> tuple[list[Tensor], Tensor]:
        """The peers' logits, and their attention to each other (N, M, M)."""
        said = [tail(shared) for tail in self.tails]
        features_NMC = torch.stack([pooled(features) for features, _ in said], dim=1)
        return [logits_NK for _, logits_NK in said], attention(self.queries(features_NMC), self.keys(features_NMC))


class Okddip(Settings):
    """Auxiliary peers with the student's tail learn from each other, each from its own mixture; the student, their
    leader, learns from their mean. The peers are then dropped.

    The student returns as it is, in the same structure. Its own loss is that of the stage (`losses` from the teacher,
    and `labels`); the paper's, which has no teacher, is `labels: 1` with `losses: [{use: kd, weight: 0}]`. The paper's
    peers start at random weights; ours are copies of the student's tail with noise, because they have been trained
    before.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["okddip"]
    after: str = "auto"
    """The layer behind which branches begin; `auto`: the end of the last stage but one, as in the paper."""
    peers: int = Field(default=3, ge=2)
    """Beside the student; the authors' code trains 4 branches, one of which leads."""
    temperature: float = Field(default=3.0, gt=0)
    weight: float = Field(default=1.0, ge=0)
    """Of both levels of distillation."""
    reduction: int = Field(default=8, ge=1)
    """How many times fewer channels queries and keys have than the features that they project (authors' code)."""
    ramp: float = Field(default=0.27, ge=0, le=1)
    """The part of the training over which `weight` rises (80 of 300 epochs in the authors' code); 0 for none."""
    noise: float = Field(default=0.1, gt=0)
    """What the peers begin with, in standard deviations of each weight tensor: equal ones would stay equal."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError where the network cannot be cut at `after`."""
        with_features(split(module, self.after, preprocess)[1])

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        refuse_quantized(product.network.structure, self.use)
        student = product.network.module
        goal = objective(settings, product, run, student=student, training=settings)
        cut, peers = self.build(student, run)
        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=lambda module, batch: self.step(goal, peers, cut, module, batch),
            beside=peers,
        )
        return module, metrics | {"scheme": self.use, "after": cut}

    def build(self, student: nn.Module, run: Run) -> tuple[str, Peers]:
        """The layer behind which branches begin, and the peers."""
        cut, tail = split(student, self.after, run.data.preprocess)
        tail = with_features(tail)
        given = run.data.preprocess
        with torch.no_grad():
            shared = answers_to_blank(student, given.size, (cut,), given.channels).maps[cut]
            channels = pooled(tail(shared)[0]).shape[1]
        generator = torch.Generator().manual_seed(run.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            return cut, Peers(
                copies_of(tail, self.peers, noise=self.noise, generator=generator), channels, self.reduction
            )

    def step(self, goal: Objective, peers: Peers, cut: str, module: nn.Module, batch: Batch) -> Tensor:
        """The leader's own loss and what the peers add to it."""
        said = goal.see(module, batch, (cut,))
        peers_MNK, attention_NMM = peers(said.maps[cut])
        now = self.weight * ramp(batch.progress, self.ramp)
        return goal.judge(said, batch, module) + diverse_peers(
            said.logits_NK, peers_MNK, attention_NMM, batch.labels_N, self.temperature, now, goal.labels_loss
        )
