"""Quantization-aware training: Jacob et al., 2018 (arXiv:1712.05877); with `epochs: 0`, post-training quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import nn

from compress.product import Network, Preprocess, Product, Run
from compress.quantization import Quantization, calibrate, prepare
from compress.stages.distill import Distillation, objective
from compress.training import Fit, fit


class Quantize(Fit, Quantization):
    """Rounds weights and activations to int8 grids, then trains network and grids together."""

    use: Literal["quantize"]
    epochs: int = Field(default=3, ge=0)
    """0 calibrates only (PTQ)."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    calibration_images: int = Field(default=256, ge=1)
    """Training images that place the activations' grids before training."""
    distill: Distillation | None = None

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError naming the first layer that has no int8 counterpart; costs no training."""
        prepare(module, Quantization(), preprocess)

    def apply(self, product: Product, run: Run) -> Product:
        quantization = Quantization(learn_activations=self.learn_activations)
        module: nn.Module = prepare(product.network.module, quantization, run.data.preprocess)
        images = min(self.calibration_images, run.data.count("train"))
        calibrate(
            module,
            run.data.batches("train", batch_size=min(32, images), shuffle=True, limit=images, seed=run.seed),
            run.device,
        )
        loss = objective(self.distill, product, run, label_smoothing=self.label_smoothing)
        module, history = fit(module, loss=loss, run=run, settings=self, label="quantize")
        structure = product.network.structure.model_copy(update={"quantize": quantization.model_dump()})
        return replace(
            product,
            network=Network(module, structure),
            parent=product.original,
            float_network=product.network,
            metrics={"history": history, "calibration_images": images},
        )
