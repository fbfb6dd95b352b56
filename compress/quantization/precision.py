"""In which numbers a network computes, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.product import Network
from compress.quantization.operators import QUANTIZED

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def simulated(quantize: Mapping[str, Any] | None) -> str:
    """`W4A8` for weights of 4 bits and activations of 8, which no runtime here executes; empty for int8 and float.

    `quantize` holds settings of `Quantization`, defaults left out or not.
    """
    weights, activations = ((quantize or {}).get(f"{what}_bits", 8) for what in ("weight", "activation"))
    return "" if weights == activations == 8 else f"W{weights}A{activations}"


def precision(network: Network) -> str:
    """`float32`, `int8 (fake quant)`, `int8 + 2 layers float32 (fake quant)`, `W4A8 (simulated)`."""
    quantize = network.structure.quantize
    if quantize is None:
        return "float32"
    bits = simulated(quantize)
    layers = [module for module in network.module.modules() if isinstance(module, LAYERS)]
    kept = sum(not isinstance(layer, QUANTIZED) for layer in layers) if quantize.get("keep_float") else 0
    beside = f" + {kept} layer{'s' if kept > 1 else ''} float32" if kept else ""
    return f"{bits or 'int8'}{beside} ({'simulated' if bits else 'fake quant'})"
