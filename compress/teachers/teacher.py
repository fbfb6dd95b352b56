"""A teacher while it teaches: what all kinds of them have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import ModelError
from compress.models.weights import state_sha256
from compress.observation import Answers, observe
from compress.product import Batch, Data, Network, Run
from compress.quantization import fold_batchnorm


class Teacher(Protocol):
    """Answers a batch; its parameters never move but by its own `follow`."""

    network: Network | None
    """Where there is one network behind the answers: for kept channels and weights."""
    related: bool
    """Whether student and teacher come from one network, so that a channel is the same in both."""
    fingerprint: str | None
    """SHA-256 of all that the answers depend on, the image aside; None where they change during the training."""

    def answers(self, batch: Batch, layers: Sequence[str], *, differentiable: bool = False) -> Answers:
        """Logits and maps for the batch, which lies on the run's device; with a graph only if `differentiable`."""
        ...

    def follow(self, student: nn.Module, batch: Batch) -> None:
        """Called before each step with the student as it is then; most teachers do nothing."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What following has left after an epoch; empty for teachers that do not follow."""
        ...

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        """As it was after that epoch; copies are made from `student` as the network that they are of."""
        ...


class Frozen:
    """A network that answers as it is: in eval mode, on the run's device, from a copy."""

    def __init__(self, network: Network, run: Run, *, related: bool) -> None:
        self.network: Network | None = network
        self.related = related
        self.run = run
        self.fingerprint: str | None = fingerprint(network)
        self._folded: nn.Module | None = None
        self._whole: nn.Module | None = None

    def answers(self, batch: Batch, layers: Sequence[str], *, differentiable: bool = False) -> Answers:
        module = self.whole if layers or differentiable else self.folded
        assert self.network is not None
        size = self.network.structure.preprocess.size
        return asked(module, batch, layers, differentiable=differentiable, size=size)

    def follow(self, student: nn.Module, batch: Batch) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        pass

    @property
    def folded(self) -> nn.Module:
        """With BatchNorm in the convolutions, which is faster; the same network where it cannot be traced."""
        if self._folded is None:
            assert self.network is not None
            try:
                self._folded = on_device(fold_batchnorm(self.network.module), self.run)
            except ModelError:  # its control flow cannot be traced
                self._folded = self.whole
        return self._folded

    @property
    def whole(self) -> nn.Module:
        """With all its layers, for losses on what they return."""
        if self._whole is None:
            assert self.network is not None
            self._whole = copied(self.network.module, self.run)
        return self._whole


def copied(module: nn.Module, run: Run) -> nn.Module:
    """The network as it is now, frozen, in eval mode: BatchNorm uses its running statistics, dropout does nothing."""
    return on_device(copy.deepcopy(module), run)


def asked(
    module: nn.Module, batch: Batch, layers: Sequence[str], *, differentiable: bool, size: int | None = None
) -> Answers:
    """What a frozen network makes of the batch, and what its `layers` return.

    Images of another side than `size` are resized for it: a network of larger images teaches one of smaller ones.
    """
    images_NCHW = batch.images_NCHW
    if size is not None and images_NCHW.shape[-1] != size:
        images_NCHW = functional.interpolate(images_NCHW, size=(size, size), mode="bilinear", antialias=True)
    with nullcontext() if differentiable else torch.no_grad():
        return observe(module, images_NCHW, layers)


def on_device(module: nn.Module, run: Run) -> nn.Module:
    """`module` itself, frozen, in eval mode, where and how the run's batches lie."""
    layout = torch.channels_last if run.data.channels_last else torch.contiguous_format
    module.requires_grad_(False).eval().to(run.device, memory_format=layout)  # type: ignore[call-overload]
    return module


def fingerprint(network: Network) -> str:
    """SHA-256 over the network's structure and every bit of its state."""
    return state_sha256(network.module.state_dict(), network.structure.model_dump_json())


def refuse_other_task(network: Network, data: Data, place: str) -> None:
    """Raises ModelError where a teacher sees other pixels or knows other classes than the run's data."""
    if network.structure.preprocess.model_copy(update={"size": data.preprocess.size}) != data.preprocess:
        raise ModelError(
            place,
            f"this teacher sees other pixels ({network.structure.preprocess})",
            "name a network trained with this recipe's `preprocess`",
        )
    task, scale = network.structure.task, network.structure.scale
    if task != data.task:
        raise ModelError(
            place, f"this teacher was trained for {task}, the data is for {data.task}", "name one of the same task"
        )
    if scale != data.scale:
        raise ModelError(
            place,
            "this teacher's numbers have another unit: it was trained on images with another mean or spread of them",
            "name a network trained on the same images",
        )
    classes = network.structure.num_classes
    if classes != len(data.labels):
        raise ModelError(
            place,
            f"this teacher knows {classes} classes, the data has {len(data.labels)}",
            "name a network trained on the same classes",
        )
