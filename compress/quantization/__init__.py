"""int8 quantization: fake quant for training (`prepare`, `calibrate`), plain integers for export (`freeze`).

The arithmetic is the one that ONNX Runtime and LiteRT execute: weights per output channel, symmetric, on [-127, 127];
activations per tensor, affine, 8 bits; biases as int32 on the grid input scale x weight scale.
"""

from compress.quantization.calibration import calibrate
from compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
)
from compress.quantization.fold import fold_batchnorm
from compress.quantization.freeze import Frozen, Grid, Integers, freeze
from compress.quantization.integer import IntegerResult, run_integers
from compress.quantization.prepare import Quantization, prepare

__all__ = [
    "ActivationQuantizer",
    "Frozen",
    "Grid",
    "IntegerResult",
    "Integers",
    "Quantization",
    "QuantizedConv2d",
    "QuantizedConvTranspose2d",
    "QuantizedLinear",
    "calibrate",
    "fold_batchnorm",
    "freeze",
    "prepare",
    "run_integers",
]
