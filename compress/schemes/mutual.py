"""Deep mutual learning: Zhang et al., 2018 (arXiv:1706.00384)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.labels import Task
from compress.losses.kd import soft_targets
from compress.measures import macs
from compress.observation import observe
from compress.product import Batch, Network, Preprocess, Product, Run
from compress.pruning import MacGoal, Pruning, prune_network, refuse_unreachable
from compress.schemes.judged import evaluation_accuracy
from compress.settings import Settings
from compress.teaching import Objective, Taught, objective
from compress.training import fit, outputs_loss

PLACE = "scheme mutual"
Share = Annotated[float, Field(gt=0, le=1)]


def mean_kl_to_others(logits_MNK: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """For each of M networks the mean over the others of KL(other || own), in nats; 0 for a network alone.

    The others' predictions are targets: no gradient flows into them (equations 6 and 8 of the paper, batch mean, times
    temperature**2). Logits are (N, K).
    """
    losses = []
    for index, own_NK in enumerate(logits_MNK):
        others = [other.detach() for place, other in enumerate(logits_MNK) if place != index]
        divergences = [soft_targets(own_NK, other_NK, temperature) for other_NK in others]
        losses.append(sum(divergences, start=own_NK.new_zeros(())) / max(1, len(others)))
    return losses


class MutualLearning(Settings):
    """The student learns together with peers of other pruning ratios, each from the labels and from all the others.

    Peers are pruned from the original network, trained along and thrown away. In the paper a cohort starts at random
    weights and its networks take turns; here it starts at trained ones and takes one step together, from what all said
    before the step. Costs a forward and a backward pass of every peer.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["mutual"]
    macs: tuple[Share, ...] = Field(default=(0.75, 0.5), min_length=1)
    """One peer for each: its share of the original network's multiply-adds; 1 is a copy of the whole network."""
    pruning: Pruning = Pruning()
    """How the peers are pruned."""
    weight: float = Field(default=1.0, ge=0)
    """Of the mean divergence from the others, for the student and for each peer."""
    temperature: float = Field(default=1.0, gt=0)
    with_teacher: bool = True
    """The student also has the stage's teacher, with its losses and the weight of its labels. `false` is the paper's
    cohort: nobody has a teacher, everybody has the labels with weight 1, and `losses` and `labels` are not used."""

    @model_validator(mode="after")
    def _peers_differ(self) -> MutualLearning:
        if len(set(self.macs)) < len(self.macs):
            raise ValueError(f"`macs: {list(self.macs)}`: two peers with the same share would be one network twice")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a share that pruning cannot reach or a pattern that matches no layer."""
        if (share := min(self.macs)) < 1:
            refuse_unreachable(
                module,
                MacGoal(macs=share),
                self.pruning,
                size=preprocess.size,
                channels=preprocess.channels,
                place=PLACE,
            )

    def peers(self, original: Network, run: Run) -> list[nn.Module]:
        """The cohort without the student, before it is trained."""
        return [
            prune_network(original, MacGoal(macs=share), self.pruning, run=run, place=PLACE).module
            if share < 1
            else copy.deepcopy(original.module)
            for share in self.macs
        ]

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        student = product.network.module
        peers = nn.ModuleList(self.peers(product.original, run))
        layout = torch.channels_last if run.data.channels_last else torch.contiguous_format
        peers.to(memory_format=layout)  # type: ignore[call-overload]
        goal: Objective | None = None
        judged = outputs_loss(run.data, settings)
        if self.with_teacher:
            goal = objective(settings, product, run, student=student, training=settings)

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            said = observe(module, batch.images_NCHW) if goal is None else goal.see(module, batch)
            images_NCHW = batch.images_NCHW.detach()
            logits_MNK = [said.logits_NK, *(peer(images_NCHW) for peer in peers)]
            divergences = mean_kl_to_others(logits_MNK, self.temperature)
            own = [judged(logits_NK, batch.labels_N) for logits_NK in logits_MNK]
            if goal is not None:
                own[0] = goal.judge(said, batch, module)
            return sum(
                (one + self.weight * kl for one, kl in zip(own, divergences, strict=True)),
                start=said.logits_NK.new_zeros(()),
            )

        trained, history = fit(
            student,
            loss=loss,
            run=run,
            settings=settings,
            label=label,
            views=settings.views,
            companion=nn.ModuleList([peers, goal.companion]) if goal and goal.companion else peers,
            memory=goal,
        )
        given = run.data.preprocess
        before = macs(product.original.module, given.size, given.channels)
        cohort = [
            {"macs": macs(peer, given.size, given.channels) / before, "accuracy": evaluation_accuracy(peer, run)}
            for peer in peers
        ]
        found = {"scheme": "mutual", "peers": cohort, "accuracy": evaluation_accuracy(trained, run)}
        return trained, {"history": history, **(goal.metrics() if goal else {}), **found}
