"""Quantization-aware training: Jacob et al., 2018 (arXiv:1712.05877); with `epochs: 0`, post-training quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from compress.data.sample import sample
from compress.product import Network, Preprocess, Product, Run
from compress.quantization import Quantization, calibrate, fold_batchnorm, prepare
from compress.quantization.bias_correction import correct_bias
from compress.quantization.calibration import Method, calibrate_weights
from compress.quantization.equalize import find_pairs
from compress.quantization.fake_quant import hold_grids
from compress.quantization.rewrite import rewritable
from compress.teaching import Distillation, teach
from compress.training import Fit, reestimated_batchnorm

BATCH = 32
BIAS_BATCHES = 4
"""Bias correction holds a layer's values of all its images in memory: 250 MB for MobileNetV2 at 96 px."""


HARD_ACTIVATIONS = (
    "{count} hard-swish and hard-sigmoid layers compute in float between conversions; `rewrite_activations: true` "
    "makes them ReLU6 and the sigmoid before training (MobileNetV3-small at 224 px on an AMD EPYC: 1.3 to 1.5 times as "
    "fast in ONNX Runtime, 1.1 to 1.2 times in LiteRT; `compress doctor` measures it for this network)"
)


class Quantize(Fit, Quantization):
    """Rounds weights and activations to int8 grids, then trains network and grids together."""

    use: Literal["quantize"]
    epochs: int = Field(default=3, ge=0)
    """0 calibrates only (PTQ)."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    calibration: Method = "minmax"
    """Where grids of activations lie before training: over the mean extremes, over `percentile` of the values, or where
    the mean squared error is least."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """With `calibration: percentile`, how many percent of a tensor's values lie below its grid's upper end."""
    weight_calibration: Literal["minmax", "mse"] = "minmax"
    """Where the grids of weights lie before training: over their extremes, or where the mean squared error is least."""
    calibration_images: int = Field(default=256, ge=1)
    """Training images for calibration and `reestimate_batchnorm`; the first 128 of them serve `bias_correction`."""
    reestimate_batchnorm: bool = False
    """Measure BatchNorm's statistics anew, without augmentation, before it is folded into the weights."""
    bias_correction: bool = False
    """After calibration, correct each layer's bias by the mean error that rounding causes."""
    hold_grids_after: float | None = Field(default=None, ge=0, le=1)
    """From this part of the training on (0.5: half of it), grids of activations stay where they are, which makes steps
    faster; null trains them to the end."""
    distill: Distillation | None = None

    @model_validator(mode="after")
    def _weights_need_steps(self) -> Quantize:
        if self.weight_calibration == "mse" and self.step_size != "learned":
            raise ValueError(
                "`weight_calibration: mse` needs `step_size: learned`: others follow the weights' extremes"
            )
        return self

    @model_validator(mode="after")
    def _training_needs_epochs(self) -> Quantize:
        asked = {
            "rewrite_activations": self.rewrite_activations,
            "only": bool(self.only),
        }
        idle = [name for name, given in asked.items() if given]
        if self.epochs == 0 and idle:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in idle)}: nothing is trained with `epochs: 0`")
        if self.percentile != 99.99 and self.calibration != "percentile":
            raise ValueError("`percentile` needs `calibration: percentile`")
        if self.hold_grids_after is not None and not self.learn_activations:
            raise ValueError("`hold_grids_after`: with `learn_activations: false` grids never move")
        return self

    def quantization(self) -> Quantization:
        """The part of the settings that a saved network's structure keeps."""
        return Quantization(**{name: getattr(self, name) for name in Quantization.model_fields})

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError naming the first layer that has no int8 counterpart; costs no training."""
        prepare(module, self.quantization(), preprocess)
        if self.distill is not None:
            self.distill.refuse_misfits(module, preprocess, "stage quantize", quantized=True)

    def apply(self, product: Product, run: Run) -> Product:
        batches = list(sample(run, self.calibration_images, batch_size=BATCH))
        module = product.network.module
        if self.reestimate_batchnorm:
            module = reestimated_batchnorm(module, batches, run.device)
        if self.equalize:
            pairs = len(find_pairs(fold_batchnorm(module)))
            run.progress.note(f"{pairs} pairs of layers equalized; layers around a ReLU6 cannot be")
        prepared = prepare(module, self.quantization(), run.data.preprocess)
        if floats := rewritable(prepared):
            run.progress.note(HARD_ACTIVATIONS.format(count=len(floats)))
        if self.weight_calibration == "mse":
            calibrate_weights(prepared)
        calibrate(prepared, batches, run.device, self.calibration, percentile=self.percentile)
        if self.bias_correction:
            correct_bias(prepared, batches[:BIAS_BATCHES], run.device)
        module, found = teach(
            prepared,
            self,
            product,
            run,
            label="quantize",
            by=self.distill,
            after=None if self.hold_grids_after is None else (self.hold_grids_after, hold_grids),
        )
        hold_grids(module, held=False)
        structure = product.network.structure.model_copy(
            update={"quantize": self.quantization().model_dump(mode="json")}
        )
        metrics = found | {"calibration_images": sum(len(batch.labels_N) for batch in batches)}
        quantized = product.taught(Network(module, structure), metrics)
        return replace(quantized, parent=product.original, float_network=product.network)
