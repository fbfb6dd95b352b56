"""What the exported files compute, asked of the files: accuracy, and agreement of torch, ONNX Runtime and LiteRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from torch import nn

from compress.gate import answers
from compress.product import Data, Product, Run
from compress.progress import Progress
from compress.settings import Settings
from compress.stages.export import by_kind, compressed, reference
from compress.verification import Inputs, Tolerances, Verification, of_split, verify_product


class Verify(Settings):
    """Fails the run where a file or a runtime computes something else than the network that was trained."""

    use: Literal["verify"]
    tolerance_lsb: int = Field(default=1, ge=0)
    """Largest difference of an int8 logit, in units of its last place (of 255 steps over the range of the logits, where
    the last layers compute in float)."""
    tolerance_grown: float = Field(default=0.01, ge=0, lt=1)
    """Largest share of images, one at least unless this is 0, on which a logit may differ by more than `tolerance_lsb`
    where all stored numbers are equal and every layer is right on its own: rounding that grows from layer to layer."""
    tolerance_layer_lsb: int = Field(default=1, ge=0)
    """Largest difference of any layer of an int8 file, computed on its own on equal inputs."""
    tolerance_float: float = Field(default=1e-3, gt=0)
    """Largest difference of a float logit, as a part of the largest logit of the split."""
    tolerance_top1: float = Field(default=0.02, ge=0, lt=1)
    """Largest share of images whose class changes when fake quant becomes whole numbers (biases are rounded), or when
    float weights become float16 or int8. A single image is always allowed, unless this is 0."""
    threads: int = Field(default=2, ge=1)

    def apply(self, product: Product, run: Run) -> Product:
        """Also writes which class each image got from each file, and a sample of the images: see `compress.gate`."""
        inputs = of_split(run.data)
        verification = self._verify(product, inputs, run.progress)
        for note in verification.notes:
            run.progress.note(note)
        assert verification.labels_N is not None
        sample = answers.chosen(inputs.count, image_bytes=inputs.pick([0]).nbytes)
        kept = answers.Answers(verification.labels_N, verification.top1, tuple(sample))
        answers.write(run.folder / answers.NAME, kept)
        np.save(run.folder / answers.SAMPLE, inputs.pick(sample))
        return replace(product, metrics=verification.as_dict())

    def verify(self, product: Product, data: Data, progress: Progress, limit: int | None = None) -> Verification:
        """The product's files on the evaluation split, or on `limit` images of it."""
        return self._verify(product, of_split(data, limit), progress)

    def _verify(self, product: Product, inputs: Inputs, progress: Progress) -> Verification:
        return verify_product(
            product.files,
            references(product),
            inputs,
            threads=self.threads,
            tolerances=Tolerances(
                lsb=self.tolerance_lsb,
                layer_lsb=self.tolerance_layer_lsb,
                relative=self.tolerance_float,
                grown=self.tolerance_grown,
                top1=self.tolerance_top1,
            ),
            progress=progress,
        )


def references(product: Product) -> Mapping[str, nn.Module | None]:
    """What the files of each kind were written from, in torch; all float networks, also those without files."""
    networks = by_kind(product)
    found: dict[str, nn.Module | None] = {kind: reference(network, kind) for kind, network in networks.items()}
    for name in product.files:
        kind = Path(name).stem
        if kind not in found:
            found[kind] = reference(compressed(product), kind)
    return found
