"""What the stages pass on (`Product`) and what they may use while they work (`Run`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from compress.epochs import Epochs
from compress.labels import Task
from compress.progress import Progress
from compress.settings import SEVERAL, Settings

GREY: dict[str, Any] = {"mean": (0.449,), "std": (0.226,)}
"""Where a network of one channel says no other: the averages of the three colours' defaults."""


class Preprocess(Settings):
    """From an image to the network's input; written into every exported file, so a board feeds the same.

    The image is made RGB, or grey (ITU-R BT.601) for one channel; the shorter side is resized to `size / crop`
    (antialiased), the centre `size` x `size` cut out, and each channel becomes `(pixel / 255 - mean) / std`.
    """

    size: int = Field(default=224, ge=8)
    """Side of the square input, in pixels."""
    channels: Literal[1, 3] = 3
    """3: RGB; 1: grey."""
    # Not strict: what a validator has looked at before is Python's to pydantic, where a list is no tuple.
    mean: Annotated[tuple[float, ...], Field(strict=False)] = (0.485, 0.456, 0.406)
    """One number per channel, on pixels scaled to [0, 1]; 0.449 where grey and not given."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)] = (0.229, 0.224, 0.225)
    """One number per channel, on pixels scaled to [0, 1]; 0.226 where grey and not given."""
    crop: float = Field(default=0.875, gt=0, le=1)
    """Part of the resized shorter side that the evaluation crop keeps."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Pillow's, which average over all pixels that become one: as torchvision and timm resize."""

    @model_validator(mode="before")
    @classmethod
    def _grey(cls, given: Any) -> Any:
        return GREY | given if isinstance(given, dict) and given.get("channels") == 1 else given

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> Preprocess:
        wanted = "3 numbers, one for each of R, G and B" if self.channels == 3 else "1 number, as `channels` is 1"
        wrong = [
            ((name,), f"must have {wanted}, not {len(values)}")
            for name, values in (("mean", self.mean), ("std", self.std))
            if len(values) != self.channels
        ]
        if wrong:
            text = "; ".join(f"{name}: {reason}" for (name,), reason in wrong)
            raise PydanticCustomError(SEVERAL, "{text}", {"text": text, "mistakes": wrong})
        return self

    def normalize(self, pixels_NHWC: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) to float32 of the same layout, in the operation order that every runtime is fed with."""
        count, height, width, channels = pixels_NHWC.shape
        # Mean and std repeated along a row: numpy works on whole rows, 8 times faster than on three numbers at a time.
        rows = pixels_NHWC.reshape(count, height, width * channels).astype(np.float32)
        rows /= np.float32(255)
        rows -= np.tile(np.asarray(self.mean, np.float32), width)
        rows /= np.tile(np.asarray(self.std, np.float32), width)
        return rows.reshape(pixels_NHWC.shape)


class KeptChannels(Settings):
    """Which channels of the factory's layer a pruned layer still has, by their original indices."""

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    groups: int | None = None


class Scale(Settings):
    """The unit of a regression's outputs: output = (number - mean) / std, of the numbers of the training images.

    So outputs of very different sizes share one loss, one learning rate and one int8 grid; a board computes
    `output * std + mean`.
    """

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]


Held = Literal["zeros", "values"]
"""What trainings keep of a layer's weights: zeros stay zero, values that are equal stay equal."""
LATER = ("dropped", "factored", "held")
"""Fields of a structure that are written only where they say something."""


class Structure(Settings):
    """How to build a network again without a pickle: the factory's arguments, the channels kept, fake quant."""

    model: dict[str, Any]
    """The recipe's `model` section."""
    num_classes: int
    preprocess: Preprocess = Preprocess()
    kept: dict[str, KeptChannels] = {}
    """By module name; layers that pruning did not touch are absent."""
    dropped: tuple[str, ...] = ()
    """Names of the residual blocks that were taken out whole; `kept` says nothing of what was inside."""
    factored: dict[str, int] = {}
    """By the name of a layer for which two stand, how many channels lie between the two; `kept` is of the one layer."""
    held: dict[str, tuple[Held, ...]] = {}
    """By the name of a layer, what trainings keep of its weights."""
    quantize: dict[str, Any] | None = None
    """Settings of the fake quantization, or None for a float network."""
    task: Task = "classification"
    """What the outputs are."""
    scale: Scale | None = None
    """The unit of a regression's outputs."""

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is not used, so that a network's description stays what it was, byte by byte."""
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if value or name not in LATER}


@dataclass(frozen=True)
class Network:
    """A torch module in eval mode on the CPU, with the description it can be rebuilt from."""

    module: nn.Module
    structure: Structure


@dataclass(frozen=True)
class Product:
    """The network as the stages so far left it. A stage returns a new one and never edits the one it got."""

    network: Network
    parent: Network | None = None
    """The network before anything was taken from it: teacher and baseline. None until a stage compresses."""
    float_network: Network | None = None
    """The last float network, kept when `quantize` replaces it by a fake-quantized one."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Exported files by name: parent.onnx, float.onnx, int8.onnx and the same with .tflite."""
    layer_losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What each layer's loss was at the end of the last training with it, by the loss's name; for `carried` weights."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What the stage that made this product measured (JSON); not carried on to the next."""

    @property
    def original(self) -> Network:
        """The parent, or the network itself while nothing has been compressed."""
        return self.parent or self.network

    def taught(self, network: Network, metrics: Mapping[str, Any]) -> Product:
        """The product with the network of a training and what its manifest says; losses of layers are carried on."""
        layer_losses = {**self.layer_losses, **metrics.get("layer_losses", {})}
        return replace(self, network=network, layer_losses=layer_losses, metrics=metrics)


NO_LABEL = -1
"""The class of an image that has none; cross entropies ignore it. Numbers that are not known are NaN."""


def labelled(labels_N: Tensor) -> Tensor:
    """bool (N,): the images of a batch that have a label, whatever the task."""
    if labels_N.is_floating_point():
        return ~labels_N.isnan().flatten(1).any(1)
    return labels_N != NO_LABEL


@dataclass(frozen=True)
class Batch:
    images_NCHW: Tensor
    """float32, normalised; in memory as `Data.channels_last` says."""
    labels_N: Tensor
    """int64 (N,) classes, `NO_LABEL` where an image has none; for the other tasks float32 (N, K), of which a row is NaN
    where the image has none: 0 or 1 of each label (multi_label), or numbers (regression)."""
    indices_N: Tensor | None = None
    """int64: which images of the split these are; None where the data does not number them."""
    view: int = 0
    """Which augmentation of its images this is: the same images and view are the same pixels."""
    epoch: int = 0
    """Of the training that the batch is used in, counted from 0."""
    progress: float = 0.0
    """Part of the training that is over, in [0, 1)."""
    step: int = 0
    """Of the training that the batch is used in, counted from 0."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        indices_N = None if self.indices_N is None else self.indices_N.to(device, non_blocking=True)
        return replace(
            self,
            images_NCHW=self.images_NCHW.to(device, non_blocking=True),
            labels_N=self.labels_N.to(device, non_blocking=True),
            indices_N=indices_N,
        )


Split = Literal["train", "evaluation"]


class Data(Protocol):
    """Two splits that share no image. Only `train` may shape the network (training, calibration, pruning scores)."""

    @property
    def task(self) -> Task: ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What the network's outputs are called: classes, labels or numbers."""
        ...

    @property
    def scale(self) -> Scale | None:
        """The unit of a regression's labels, which are standardised; None for the other tasks."""
        ...

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        """What the labels' loss of each output is weighted with, where classes are balanced so; None weighs none."""
        ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def channels_last(self) -> bool:
        """Memory order of the batches: NHWC (1.7 times faster to train on CPUs) or NCHW."""
        ...

    def in_nchw(self) -> Data:
        """The same data in NCHW order, for a network whose `.view` cannot read channels_last."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of both splits."""
        ...

    def count(self, split: Split) -> int: ...

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        augment: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        view: int | None = None,
    ) -> Iterable[Batch]:
        """Batches on the CPU. Same seed and epoch: same images and same augmentation, whatever the number of workers.

        The augmentation is drawn anew for each epoch, or for each `view` where one is given.

        With `shuffle`, incomplete batches are dropped (never all of them: a split smaller than a batch gives a smaller
        one); without, every image comes exactly once. `limit` takes that many images, chosen by `seed` and spread
        over the classes, or over what stands for them in another task. With world_size > 1 each rank gets its own
        share, all ranks the same number of batches.
        """
        ...


@dataclass(frozen=True)
class Run:
    """What a stage may use: its own folder, the data, the device, a seed."""

    folder: Path
    """The running stage's folder, empty at its start; exported files go here."""
    data: Data
    device: torch.device
    seed: int
    progress: Progress
    recipe_hash: str
    """SHA-256 of the resolved recipe up to this stage, for the metadata of exported files."""
    stage: str = ""
    """What messages call the running stage: `02-train`."""
    target: str = "local"
    """The machine that measures, as the recipe names it."""
    setup: bool = False
    """Whether that machine may get an environment of ours, with a runtime, if it is a board."""
    rank: int = 0
    world_size: int = 1
    epochs: Epochs = field(default_factory=Epochs)
    """Where trainings keep what they have reached."""
