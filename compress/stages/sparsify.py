"""Two zeros in every four weights, for a file that compresses: see `compress.models.two_of_four`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from compress.data.sample import with_new_statistics
from compress.errors import ModelError
from compress.holding import hold
from compress.measures import deflated_weights
from compress.models.patterns import Pattern, matching_any
from compress.models.two_of_four import fits, mask
from compress.product import Network, Preprocess, Product, Run
from compress.settings import Settings

PLACE = "stage sparsify"
NO_FASTER = (
    "nothing gets faster by this on an ARM CPU: LiteRT and ONNX Runtime compute with the zeros, and the file is as "
    "long; it is smaller once compressed (zip, an APK, a download)"
)


class Sparsify(Settings):
    """Puts zeros in the place of the smaller two of each four weights along the inputs, for a file that compresses.

    No CPU kernel here skips them, so nothing gets faster. Trainings that follow keep the zeros, and so does int8.
    """

    use: Literal["sparsify"]
    pattern: Literal["2:4"] = "2:4"
    """Of each four neighbouring inputs of an output, the two weights with the largest absolute value stay."""
    keep: tuple[Pattern, ...] = ()
    """Layers that keep all their weights, besides those whose inputs do not come in fours."""
    batchnorm_images: int = Field(default=512, ge=0)
    """Training images on which BatchNorm statistics are measured again; 0 leaves them as they are."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches nothing, and for a network without any such layer."""
        self._chosen(module)

    def apply(self, product: Product, run: Run) -> Product:
        structure = product.network.structure
        if structure.quantize is not None:
            raise ModelError(PLACE, "the network is already quantized", "put sparsify before quantize")
        if any("values" in kinds for kinds in structure.held.values()):
            raise ModelError(PLACE, "some of its weights are clustered already", "put sparsify before cluster")
        module = copy.deepcopy(product.network.module)
        names = self._chosen(module)
        with torch.no_grad():
            for name in names:
                layer = module.get_submodule(name)
                assert isinstance(layer, (nn.Conv2d, nn.Linear))
                layer.weight.mul_(mask(layer.weight))
                hold(layer, ["zeros"])
        module = with_new_statistics(module, run, self.batchnorm_images)
        run.progress.note(NO_FASTER)
        held = {**structure.held, **dict.fromkeys(names, ("zeros",))}
        weights = [layer.weight for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        metrics = {
            "pattern": self.pattern,
            "layers": names,
            "zeros": sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
            "deflated_before": deflated_weights(product.network.module),
            "deflated_after": deflated_weights(module),
        }
        network = Network(module, structure.model_copy(update={"held": held}))
        return replace(product.taught(network, metrics), parent=product.original)

    def _chosen(self, module: nn.Module) -> list[str]:
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
        kept = matching_any(self.keep, [*layers], field="keep", place=PLACE, kind="convolution or linear layer")
        found = [name for name, layer in layers.items() if name not in kept and fits(layer)]
        if not found:
            raise ModelError(PLACE, "no layer is left whose inputs come in fours", "leave the stage out")
        return found
