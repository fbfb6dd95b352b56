"""What the exported files compute, asked of the files: accuracy, and agreement of torch, ONNX Runtime and LiteRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from compress.data.pictures import save_picture
from compress.data.pixels import to_pixels
from compress.gate import answers
from compress.labels import Task
from compress.product import Data, Product, Run
from compress.progress import Progress
from compress.settings import Settings
from compress.stages.export import KINDS, by_kind, compressed, reference
from compress.tasks import task_of
from compress.verification import Inputs, Tolerances, Verification, of_split, verify_product
from compress.verification.mistakes import compared, confusion

WRONG = "wrong"
"""Folder of the pictures that the compressed network gets wrong and its parent right."""


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
    float weights become float16 or int8. A single image is always allowed, unless this is 0. In other tasks: of labels
    that get another answer, or of numbers that move by more than a tenth of their standard deviation."""
    threads: int = Field(default=2, ge=1)

    def apply(self, product: Product, run: Run) -> Product:
        """Also writes which class each image got from each file and a sample of the images (see `compress.gate`), and
        pictures of those that compression cost."""
        inputs = of_split(run.data)
        verification = self._verify(product, inputs, run.progress, run.data.task)
        for note in verification.notes:
            run.progress.note(note)
        assert verification.labels_N is not None
        sample = answers.chosen(inputs.count, image_bytes=inputs.pick([0]).nbytes)
        kept = answers.Answers(verification.labels_N, verification.top1, tuple(sample))
        answers.write(run.folder / answers.NAME, kept)
        np.save(run.folder / answers.SAMPLE, inputs.pick(sample), allow_pickle=False)
        about = verification.labels_N, run.data.labels, run.data.scale
        for name, file in verification.files.items():
            if details := task_of(run.data.task).details(verification.top1[name], *about):
                file["outputs"] = details
        return replace(product, metrics=verification.as_dict() | mistakes(verification, inputs, run))

    def verify(self, product: Product, data: Data, progress: Progress, limit: int | None = None) -> Verification:
        """The product's files on the evaluation split, or on `limit` images of it."""
        return self._verify(product, of_split(data, limit), progress, data.task)

    def _verify(self, product: Product, inputs: Inputs, progress: Progress, task: Task) -> Verification:
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
            task=task,
        )


def mistakes(verification: Verification, inputs: Inputs, run: Run) -> dict[str, Any]:
    """Confusions of the most compressed file and of the parent's, and images that only the parent's gets right.

    Their pictures go to `wrong/` in the stage's folder. Empty for a task without classes.
    """
    labels_N, top1 = verification.labels_N, verification.top1
    if run.data.task != "classification" or labels_N is None or not top1:
        return {}
    rank: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
    file = max(reversed(list(top1)), key=lambda name: rank.get(Path(name).stem, -1))
    parent = f"parent{Path(file).suffix}"
    shown = [name for name in dict.fromkeys((file, parent)) if name in top1]
    found: dict[str, Any] = {
        "confusion": {name: confusion(labels_N, top1[name], len(run.data.labels)) for name in shown}
    }
    if len(shown) == 1:
        return found
    sure = {"compressed": verification.confidence[file], "parent": verification.confidence[parent]}
    wrong = compared(labels_N, top1[parent], top1[file], sure)
    if wrong["examples"]:
        images_NCHW = torch.from_numpy(inputs.pick([example["index"] for example in wrong["examples"]]))
        pictures_NHWC = to_pixels(images_NCHW, run.data.preprocess)
        for number, (example, pixels_HWC) in enumerate(zip(wrong["examples"], pictures_NHWC, strict=True)):
            example["image"] = f"{WRONG}/{number:02d}.png"
            save_picture(run.folder / example["image"], pixels_HWC)
    return found | {"wrong": {"file": file, "parent": parent} | wrong}


def references(product: Product) -> Mapping[str, nn.Module | None]:
    """What the files of each kind were written from, in torch; all float networks, also those without files."""
    networks = by_kind(product)
    found: dict[str, nn.Module | None] = {kind: reference(network, kind) for kind, network in networks.items()}
    for name in product.files:
        kind = Path(name).stem
        if kind not in found:
            found[kind] = reference(compressed(product), kind)
    return found
