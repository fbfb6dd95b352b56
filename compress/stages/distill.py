"""The original network teaches the compressed one."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from torch import nn

from compress.product import Network, Preprocess, Product, Run
from compress.regularizers import Sparse
from compress.schemes import SchemeSettings
from compress.teaching import Taught, teach, with_more_images
from compress.training import refuse_unmatched


class Distill(Sparse, Taught):
    """Trains the network as it is now on its teacher's outputs and the labels."""

    use: Literal["distill"]
    scheme: SchemeSettings | None = None
    """How the training goes where more is trained than the student by a teacher that stays as it is."""

    @model_validator(mode="after")
    def _generated_images_come_once(self) -> Distill:
        if self.scheme is not None and self.scheme.use in ("data_free", "hard_examples"):
            use = f"`{self.scheme.use}` generates its images"
            if self.views or self.cache or self.unlabeled:
                raise ValueError(f"{use}: no `views` and no `cache` of them, and no `unlabeled` ones")
            if any(loss.use == "crd" for loss in self.losses or ()):
                raise ValueError(f"{use}: `crd` needs images that come again")
        return self

    @model_validator(mode="after")
    def _schemes_train_more_than_one(self) -> Distill:
        if self.scheme is not None and self.sparsity is not None:
            raise ValueError("`sparsity` is of one network and `scheme` trains more: leave one of them out")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no parameter, or no layer, and for what the scheme refuses."""
        refuse_unmatched(module, self.only, "distill")
        self.refuse_misfits(module, preprocess, "stage distill")
        self.refuse_unsparse(module, preprocess, "stage distill")
        if self.scheme is not None:
            self.scheme.check(module, preprocess)

    def apply(self, product: Product, run: Run) -> Product:
        if self.scheme is None:
            pull = self.regularizer(product.network.module, run)
            module, metrics = teach(product.network.module, self, product, run, label="distill", regularizer=pull)
        else:
            module, metrics = self.scheme.train(self, product, with_more_images(self, run), "distill")
        return product.taught(Network(module, product.network.structure), metrics)
