"""Layers that are likely to suffer on int8 grids, with the reason and what to do: looked at before any training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.doctor.damage import sqnr_db
from compress.doctor.switches import quantizers, rounding_only
from compress.doctor.words import counted
from compress.quantization import ActivationQuantizer, Frozen, freeze

SPREAD = 8.0
"""A channel eight times smaller than the one that sets the grid has three bits less: 32 of its 256 steps."""
DEAD = 1 / 254
"""A channel whose largest weight is smaller than half a step (of 127) of the layer's median channel."""
OUTLIER = 4.0
"""A maximum four times the 99.9th percentile leaves 999 of 1,000 values two bits less."""
BLOWN_UP = 32.0
"""A BatchNorm that multiplies a channel by 32 times what it multiplies the median one by: five bits."""
QUANTILE = 0.999
LARGEST_SAMPLE = 1 << 20
"""Values that a percentile is taken of."""

Weighted = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
Pairs = Sequence[tuple[str, str]] | None
"""Layers that `quantize.equalize` can bring together; None where the recipe has it already."""

PER_TENSOR = "range ratio of weights"
NEAR_DEAD = "near-dead channels"
TINY_VARIANCE = "BatchNorm blows up weights"
ACTIVATION_SPREAD = "range ratio of activations"
ACTIVATION_OUTLIERS = "activation outliers"
BIAS = "bias beyond int32"


@dataclass(frozen=True)
class Risk:
    """One reason why a layer may lose accuracy on its grids."""

    kind: str
    layer: str
    severity: float
    """How many times over the threshold; the worst of a kind is shown first."""
    finding: str
    """What was seen, in numbers."""
    remedy: str
    """Keys are those of the recipe's `quantize` stage."""


def weight_risks(folded: fx.GraphModule, pairs: Pairs = None) -> list[Risk]:
    """What the weights alone say, with BatchNorm folded as it will be.

    The files have one step per output channel, so that a wide spread of weights costs no accuracy by itself. It does
    when the results share one grid (see `activation_risks`), and in any tool that quantizes weights per tensor.
    """
    found = []
    for name, layer in folded.named_modules():
        if not isinstance(layer, Weighted):
            continue
        ranges_C = output_ranges(layer)
        median = float(ranges_C.median())
        if median == 0:
            found.append(Risk(NEAR_DEAD, name, 1.0, "more than half of its channels have no weights", "prune them"))
            continue
        largest = int(ranges_C.argmax())
        ratio = float(ranges_C[largest]) / median
        if ratio > SPREAD:
            found.append(
                Risk(
                    PER_TENSOR,
                    name,
                    ratio / SPREAD,
                    f"channel {largest} is {ratio:.3g} times the median channel; {_effect(layer)}"
                    + (" (depthwise)" if is_depthwise(layer) else ""),
                    _equalize(name, pairs),
                )
            )
        dead = int((ranges_C < DEAD * median).sum())
        if dead:
            found.append(
                Risk(
                    NEAR_DEAD,
                    name,
                    dead / len(ranges_C),
                    f"{dead} of {len(ranges_C)} channels: all weights below half a step of the median channel",
                    "they cost time and compute nothing: prune them (a `prune` stage)",
                )
            )
    return found


def _effect(layer: Weighted) -> str:
    """What the median channel's weights keep of themselves on one step for the layer and on a step of its own."""
    ranges_C = output_ranges(layer)
    channel = by_output(layer)[int((ranges_C - ranges_C.median()).abs().argmin())]

    def kept_db(step: Tensor) -> float:
        return sqnr_db(channel, torch.round(channel / step) * step)

    shared, own = kept_db(ranges_C.max() / 127), kept_db(channel.abs().max() / 127)
    return f"its weights keep {shared:.0f} dB on one step for the layer, {own:.0f} dB on their own as in our files"


def _equalize(name: str, pairs: Pairs) -> str:
    if pairs is not None and any(name in pair for pair in pairs):
        return "equalize: true"
    return f"keep_float: [{name}], if its damage is high"


def norm_risks(module: nn.Module) -> list[Risk]:
    """BatchNorms that saw next to no variance in a channel: folding multiplies its weights by gamma/sqrt(var + eps)."""
    found = []
    for name, norm in module.named_modules():
        if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) or norm.running_var is None:
            continue
        gamma_C = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach().abs()
        factors_C = gamma_C / (norm.running_var + norm.eps).sqrt()
        median = float(factors_C.median())
        still_C = norm.running_var < norm.eps
        blown = int((still_C & (factors_C > BLOWN_UP * median)).sum()) if median else 0
        if blown:
            worst = float(factors_C[still_C].max()) / median
            found.append(
                Risk(
                    TINY_VARIANCE,
                    name,
                    worst / BLOWN_UP,
                    f"{counted(blown, 'channel')} with a variance below eps ({norm.eps:g}): folded, up to"
                    f" {worst:.3g} times the median channel",
                    "channels that never changed in training: prune them, or train on",
                )
            )
    return found


def activation_risks(prepared: fx.GraphModule, images_NCHW: Tensor, pairs: Pairs = None) -> list[Risk]:
    """What one batch says of each tensor that gets a grid: channels far apart, and few values far out."""
    found: list[Risk] = []
    handles = []
    with rounding_only(prepared), torch.inference_mode():
        for quantizer in quantizers(prepared).values():
            if quantizer.fixed is None:
                look = functools.partial(_look, found=found, pairs=pairs)
                handles.append(quantizer.register_forward_hook(look))
        try:
            prepared(images_NCHW)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _look(
    quantizer: nn.Module,
    _: tuple[Tensor, ...],
    result: Tensor,
    *,
    found: list[Risk],
    pairs: Pairs,
) -> None:
    assert isinstance(quantizer, ActivationQuantizer)
    values = result.detach().abs()
    largest = float(values.max())
    if largest == 0:
        return
    usual = float(torch.quantile(_sample(values), QUANTILE))
    if usual == 0 or largest / usual > OUTLIER:
        times = largest / usual if usual else float("inf")
        found.append(
            Risk(
                ACTIVATION_OUTLIERS,
                quantizer.layer,
                times / OUTLIER,
                f"maximum {largest:.3g} is {times:.3g} times the 99.9th percentile",
                "calibration: percentile or mse, or training with learned steps",
            )
        )
    channels = values.transpose(0, 1).flatten(1).amax(1) if values.ndim == 4 else None
    if channels is not None and len(channels) > 1:
        median = float(channels[channels > 0].median())
        times = largest / median
        if times > SPREAD:
            found.append(
                Risk(
                    ACTIVATION_SPREAD,
                    quantizer.layer,
                    times / SPREAD,
                    f"channel {int(channels.argmax())} reaches {largest:.3g}, the median one {median:.3g}:"
                    f" {max(1, round(256 / times))} of 256 steps for it",
                    _equalize(quantizer.layer, pairs),
                )
            )


def _sample(values: Tensor) -> Tensor:
    """All values, or evenly spaced ones of many: torch.quantile takes at most 16 million, and sorts."""
    flat = values.flatten().float()
    return flat[:: -(-flat.numel() // LARGEST_SAMPLE)]


def bias_risks(prepared: fx.GraphModule, frozen: Frozen | None = None) -> list[Risk]:
    """Layers with a channel whose bias is more than int32 holds at input step x weight step.

    `freeze` gives such a channel larger weight steps, which its weights pay for.
    """
    frozen = frozen or freeze(prepared)
    modules = dict(prepared.named_modules())
    found = []
    for name, integers in frozen.integers.items():
        wanted = modules[name].weight_scale.detach()
        times = integers.weight_scale / wanted
        widened = times > 1.0001
        if bool(widened.any()):
            found.append(
                Risk(
                    BIAS,
                    name,
                    float(times.max()),
                    f"{counted(int(widened.sum()), 'channel')}: the bias needs weight steps up to"
                    f" {float(times.max()):.3g} times as large",
                    "channels of nearly no weight and a large bias: prune them (a `prune` stage)",
                )
            )
    return found


def by_output(layer: Weighted) -> Tensor:
    """The weight with output channels first, whatever the layer's own order."""
    weight = layer.weight.detach()
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])  # (groups, inputs, outputs, ...), both within the group
    return grouped.transpose(1, 2).flatten(0, 1)


def output_ranges(layer: Weighted) -> Tensor:
    """The largest absolute weight of each output channel."""
    return by_output(layer).abs().flatten(1).amax(1)


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
