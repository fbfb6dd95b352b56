"""Weights that share a few values, for a file that compresses: see `compress.models.clusters`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from compress.data.sample import with_new_statistics
from compress.errors import ModelError
from compress.holding import held, hold
from compress.measures import deflated_weights
from compress.models.clusters import clustered
from compress.models.patterns import Pattern, matching_any
from compress.product import Held, Network, Preprocess, Product, Run
from compress.settings import Settings

PLACE = "stage cluster"
NO_FASTER = (
    "nothing gets faster by this: runtimes read whole weights, and the file is as long; it is smaller once compressed "
    "(zip, an APK, a download)"
)


class Cluster(Settings):
    """Lets the weights of each layer share a few values, found by k-means, for a file that compresses.

    No kernel here reads codebooks, so nothing gets faster. Trainings that follow move the values and keep who shares
    them; int8 has as many values in each output channel at most. Zeros of `sparsify` stay zero.
    """

    use: Literal["cluster"]
    clusters: int = Field(default=32, ge=16, le=256)
    """Different values in a layer, besides the zeros of `sparsify`."""
    least_weights: int = Field(default=1024, ge=1)
    """Layers with fewer weights keep them as they are: they are a small part of the file."""
    keep: tuple[Pattern, ...] = ()
    """Layers that keep their weights as they are."""
    batchnorm_images: int = Field(default=512, ge=0)
    """Training images on which BatchNorm statistics are measured again; 0 leaves them as they are."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches nothing, and for a network without any such layer."""
        self._chosen(module)

    def apply(self, product: Product, run: Run) -> Product:
        structure = product.network.structure
        if structure.quantize is not None:
            raise ModelError(PLACE, "the network is already quantized", "put cluster before quantize")
        module = copy.deepcopy(product.network.module)
        names = self._chosen(module)
        kinds: dict[str, tuple[Held, ...]] = {}
        with torch.no_grad():
            for name in names:
                layer = module.get_submodule(name)
                assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
                chosen = (
                    layer.weight != 0 if "zeros" in held(layer) else torch.ones_like(layer.weight, dtype=torch.bool)
                )
                layer.weight[chosen] = clustered(layer.weight[chosen], self.clusters)
                hold(layer, ["values"])
                kinds[name] = held(layer)
        module = with_new_statistics(module, run, self.batchnorm_images)
        run.progress.note(NO_FASTER)
        metrics = {
            "clusters": self.clusters,
            "layers": names,
            "deflated_before": deflated_weights(product.network.module),
            "deflated_after": deflated_weights(module),
        }
        network = Network(module, structure.model_copy(update={"held": {**structure.held, **kinds}}))
        return replace(product.taught(network, metrics), parent=product.original)

    def _chosen(self, module: nn.Module) -> list[str]:
        layers = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        }
        kept = matching_any(self.keep, [*layers], field="keep", place=PLACE, kind="convolution or linear layer")
        large = [name for name, layer in layers.items() if layer.weight.numel() >= self.least_weights]
        found = [name for name in large if name not in kept]
        if not found:
            raise ModelError(PLACE, f"no layer is left with {self.least_weights} weights", "lower `least_weights`")
        return found
