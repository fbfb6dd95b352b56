"""L1 on BatchNorm's scales: network slimming, Liu et al., 2017 (arXiv:1708.06519), equation 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.coupled import find_coupled
from compress.product import Batch, Preprocess, Run
from compress.settings import Settings


def absolute_sum(scales: Sequence[Tensor]) -> Tensor:
    """The sum of |gamma| over all scales; its derivative at 0 is 0."""
    return torch.stack([scale.abs().sum() for scale in scales]).sum()


def scaled_channels(module: nn.Module, size: int, channels: int) -> dict[str, Tensor]:
    """By BatchNorm layer the channels, int64, that may go; layers without scales are absent."""
    found: dict[str, list[Tensor]] = {}
    for coupled in find_coupled(module, size, channels)[0]:
        for (name, _), indices in coupled.places.items():
            layer = module.get_submodule(name)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
                found.setdefault(name, []).append(indices.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class _Penalty:
    channels: Mapping[str, Tensor]
    weight: float

    def penalty(self, student: nn.Module, batch: Batch) -> Tensor:
        scales = [student.get_parameter(f"{name}.weight") for name in self.channels]
        parts = [
            scale[channels.to(scale.device)] for scale, channels in zip(scales, self.channels.values(), strict=True)
        ]
        return self.weight * absolute_sum(parts)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


class BNScaleL1(Settings):
    """Makes the scales of BatchNorm sparse; goes with `criterion: {use: bn_scale}`."""

    use: Literal["bn_scale"]
    weight: float = Field(default=1e-4, ge=0)
    """Of the sum of |gamma|, over the channels that may go."""

    def check(self, module: nn.Module, preprocess: Preprocess, place: str) -> None:
        """Raises ModelError where no BatchNorm scales any channel that may go."""
        if not scaled_channels(module, preprocess.size, preprocess.channels):
            raise ModelError(
                place, "`sparsity: bn_scale` finds no BatchNorm with channels that may go", "use group_norm"
            )

    def open(self, module: nn.Module, run: Run) -> _Penalty:
        preprocess = run.data.preprocess
        self.check(module, preprocess, f"stage {run.stage}")
        return _Penalty(scaled_channels(module, preprocess.size, preprocess.channels), self.weight)
