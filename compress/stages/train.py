"""Training on the labels: the parent from scratch, a new head, or fine-tuning after any stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from compress.product import Network, Preprocess, Product, Run
from compress.stages.distill import Distillation, objective
from compress.training import Fit, fit, refuse_unmatched


class Train(Fit):
    """Trains the network as it is now."""

    use: Literal["train"]
    distill: Distillation | None = None
    """Add a teacher; `use: distill` says the same with the block's fields in the stage itself."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no parameter."""
        refuse_unmatched(module, self.only, "train")

    def apply(self, product: Product, run: Run) -> Product:
        loss = objective(self.distill, product, run, label_smoothing=self.label_smoothing)
        module, history = fit(product.network.module, loss=loss, run=run, settings=self, label="train")
        return replace(product, network=Network(module, product.network.structure), metrics={"history": history})
