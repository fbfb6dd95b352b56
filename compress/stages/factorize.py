"""Two thin layers in the place of a wide one: see `compress.models.low_rank`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import nn

from compress.data.sample import with_new_statistics
from compress.errors import ModelError
from compress.measures import macs, params
from compress.models.low_rank import factorize, low_ranks, replaceable
from compress.models.patterns import Pattern, matching_any
from compress.product import Network, Preprocess, Product, Run
from compress.settings import Settings

PLACE = "stage factorize"
KIND = "linear layer or 1x1 convolution"


class Factorize(Settings):
    """Puts two thin layers in the place of each linear layer and 1x1 convolution whose weight is of low rank.

    The rank of each is the least that keeps `energy`. Channels can be pruned before, not after; train or distill next.
    """

    use: Literal["factorize"]
    energy: float = Field(default=0.95, gt=0, le=1)
    """The part of the sum of a weight's squared singular values that its rank keeps."""
    saving: float = Field(default=0.1, ge=0, lt=1)
    """A layer is left alone unless two need this part fewer multiply-adds."""
    keep: tuple[Pattern, ...] = ()
    """Layers that stay as they are."""
    batchnorm_images: int = Field(default=512, ge=0)
    """Training images on which BatchNorm statistics are measured again; 0 leaves them as they are."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches nothing, and for a network without any such layer."""
        self._candidates(module, preprocess)

    def apply(self, product: Product, run: Run) -> Product:
        structure, preprocess = product.network.structure, run.data.preprocess
        if structure.quantize is not None:
            raise ModelError(PLACE, "the network is already quantized", "put factorize before quantize")
        if structure.held:
            raise ModelError(PLACE, "some of its weights are held already", "put it before sparsify and cluster")
        names = [
            name
            for name in self._candidates(product.network.module, preprocess)
            if name.rpartition(".")[0] not in structure.factored
        ]
        found = low_ranks(product.network.module, names, energy=self.energy, saving=self.saving)
        if not found:
            run.progress.note(f"no layer costs less at the rank that keeps {self.energy:g} of its energy: all stay")
        ranks = {layer.name: layer.rank for layer in found}
        module = copy.deepcopy(product.network.module)
        factorize(module, ranks)
        if found:
            module = with_new_statistics(module, run, self.batchnorm_images)
        network = Network(module, structure.model_copy(update={"factored": {**structure.factored, **ranks}}))
        metrics = _figures(product.network.module, module, preprocess) | {"factored": [vars(layer) for layer in found]}
        return replace(product.taught(network, metrics), parent=product.original)

    def _candidates(self, module: nn.Module, preprocess: Preprocess) -> list[str]:
        known = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        kept = matching_any(self.keep, known, field="keep", place=PLACE, kind="convolution or linear layer")
        names = [name for name in known if name not in kept]
        found = replaceable(module, names, preprocess.size, preprocess.channels)
        if not found:
            raise ModelError(PLACE, f"the network has no {KIND} that two could stand for", "leave the stage out")
        return found


def _figures(before: nn.Module, after: nn.Module, preprocess: Preprocess) -> dict[str, Any]:
    given = preprocess.size, preprocess.channels
    return {
        "macs_before": macs(before, *given),
        "macs_after": macs(after, *given),
        "params_before": params(before),
        "params_after": params(after),
    }
