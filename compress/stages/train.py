"""Training on the labels: the parent from scratch, a new head, or fine-tuning after any stage."""

from __future__ import annotations

from typing import Literal

from torch import nn

from compress.product import Network, Preprocess, Product, Run
from compress.regularizers import Sparse
from compress.teaching import Distillation, teach
from compress.training import Fit, refuse_unmatched


class Train(Sparse, Fit):
    """Trains the network as it is now."""

    use: Literal["train"]
    distill: Distillation | None = None
    """Add a teacher; `use: distill` says the same with the block's fields in the stage itself."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no parameter, or no layer."""
        refuse_unmatched(module, self.only, "train")
        if self.distill is not None:
            self.distill.refuse_misfits(module, preprocess, "stage train")
        self.refuse_unsparse(module, preprocess, "stage train")

    def apply(self, product: Product, run: Run) -> Product:
        pull = self.regularizer(product.network.module, run)
        module, metrics = teach(
            product.network.module, self, product, run, label="train", by=self.distill, regularizer=pull
        )
        return product.taught(Network(module, product.network.structure), metrics)
