"""Takes whole channels out until the network needs no more than a given share of its multiply-adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator
from torch import nn

from compress.measures import macs
from compress.product import Network, Preprocess, Product, Run
from compress.pruning import MacGoal, Pruning, prune_network, refuse_unreachable
from compress.settings import Settings
from compress.teaching import Distillation, teach
from compress.training import Fit

PLACE = "stage prune"


class Aim(Settings):
    """What pruning is for."""

    goal: MacGoal
    """Reached from below, as closely as `round_to` allows."""


class Prune(Pruning, Aim):  # pydantic lists the fields of later bases first, and a recipe reads better from its goal on
    """Takes the least important channels out, in all layers at once, until the goal is reached."""

    use: Literal["prune"]
    finetune: Fit | None = None
    """Training after each step."""
    distill: Distillation | None = None
    """A teacher for `finetune`."""

    @model_validator(mode="after")
    def _distill_needs_finetune(self) -> Prune:
        if self.distill is not None and self.finetune is None:
            raise ValueError("`distill` teaches while `finetune` trains: give both, or let a stage `distill` follow")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a network that cannot be followed, an unmatched pattern, a goal out of reach."""
        refuse_unreachable(module, self.goal, self, size=preprocess.size, channels=preprocess.channels, place=PLACE)
        if self.distill is not None:
            self.distill.refuse_misfits(module, preprocess, PLACE)

    def apply(self, product: Product, run: Run) -> Product:
        size, channels = run.data.preprocess.size, run.data.preprocess.channels
        history: list[dict[str, Any]] = []
        losses: dict[str, dict[str, float]] = {}

        def finetune(network: Network, step: int) -> nn.Module:
            assert self.finetune is not None
            pruned = replace(product, network=network, parent=product.original)
            label = f"prune {step}/{self.steps}"
            module, found = teach(network.module, self.finetune, pruned, run, label=label, by=self.distill)
            history.extend({"step": step, **epoch} for epoch in found["history"])
            losses.update(found.get("layer_losses", {}))
            return module

        network = prune_network(
            product.network, self.goal, self, run=run, after=finetune if self.finetune else None, place=PLACE
        )
        before, after = macs(product.network.module, size, channels), macs(network.module, size, channels)
        metrics: dict[str, Any] = {
            "goal_macs": self.goal.macs,
            "macs_before": before,
            "macs_after": after,
            "reached": after / before,
            "criterion": self.criterion.use,
            "round_to": self.round_to,
            "steps": self.steps,
            "history": history,
        }
        metrics |= {"layer_losses": losses} if losses else {}
        return replace(product.taught(network, metrics), parent=product.original)
