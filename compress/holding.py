"""What training leaves as it is in a layer's weights: zeros, and values that are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from compress.product import Held


def hold(layer: nn.Module, kinds: Iterable[Held]) -> None:
    """Marks the layer: trainings keep these traits of its weight, as do copies and what quantization makes of it."""
    layer.held = tuple(dict.fromkeys((*held(layer), *kinds)))  # type: ignore[assignment]


def held(layer: nn.Module) -> tuple[Held, ...]:
    """What training keeps of the layer's weight."""
    kinds: tuple[Held, ...] = getattr(layer, "held", ())
    return kinds


def keeper(module: nn.Module) -> Callable[[], None]:
    """What puts the weights back after each step of a training: zeros to zero, and weights that are equal now to their
    mean, which is a step along the mean of their gradients (Han et al., 2016, arXiv:1510.00149, section 3.3)."""
    kept: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = []
    for layer in module.modules():
        kinds, weight = held(layer), getattr(layer, "weight", None)
        if not kinds or not isinstance(weight, Tensor):
            continue
        now = weight.detach()
        codes = counts = None
        if "values" in kinds:
            _, codes, counts = torch.unique(now, return_inverse=True, return_counts=True)
        kept.append((weight, (now != 0).to(now) if "zeros" in kinds else None, codes, counts))

    @torch.no_grad()
    def put_back() -> None:
        for weight, mask, codes, counts in kept:
            if codes is not None and counts is not None:
                sums = torch.zeros(len(counts), dtype=torch.float64, device=weight.device)
                sums.index_add_(0, codes.flatten(), weight.flatten().double())
                weight.copy_((sums / counts)[codes])
            if mask is not None:
                weight.mul_(mask)

    return put_back
