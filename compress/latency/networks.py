"""Whole networks to fit and to check a prediction: narrower versions of one by chance, as int8 files.

Their time does not depend on weights, so nothing is calibrated or trained.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import defaultdict
from collections.abc import Sequence

import onnx
from torch import nn

from compress.errors import ModelError
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.models.coupled import Coupled, Side, without
from compress.models.structure import resize
from compress.product import Preprocess
from compress.quantization import Quantization, fold_batchnorm, freeze, prepare
from compress.targets import Runtime

LEAST = 0.2
"""Share of its channels that a layer of a narrower network keeps at least."""


def narrower(
    module: nn.Module, sets: Sequence[Coupled], *, seed: int, round_to: int, most: float = 1.0, least: float = LEAST
) -> nn.Module:
    """A copy that keeps of each of `sets` a share drawn from [least, most], as a multiple of `round_to`."""
    rng = random.Random(seed)
    gone: defaultdict[tuple[str, Side], set[int]] = defaultdict(set)
    for coupled in sets:
        share = rng.uniform(least, most)
        stay = min(coupled.units, max(round_to, round_to * round(coupled.units * share / round_to)))
        if stay < coupled.units:
            for place, channels_UC in coupled.places.items():
                gone[place].update(channels_UC[stay:].flatten().tolist())
    narrow = copy.deepcopy(module)
    resize(narrow, without(narrow, gone))
    return narrow


def int8_file(
    module: nn.Module, preprocess: Preprocess, runtime: Runtime, quantization: Quantization | None = None
) -> bytes:
    """The network as the stages quantize and export would write it for the runtime, but for its numbers.

    Raises ModelError where int8 has no counterpart for something in it.
    """
    return int8_files(module, preprocess, [runtime], quantization)[runtime]


def int8_files(
    module: nn.Module, preprocess: Preprocess, runtimes: Sequence[Runtime], quantization: Quantization | None = None
) -> dict[Runtime, bytes]:
    """The same for several runtimes, quantized once."""
    frozen = freeze(prepare(copy.deepcopy(module).eval(), quantization or Quantization(), preprocess))
    model = int8_onnx(frozen, preprocess.size, {}, preprocess.channels)
    return {runtime: _written(model, runtime) for runtime in runtimes}


def float_file(module: nn.Module, preprocess: Preprocess, runtime: Runtime) -> bytes:
    """The network in float32 with BatchNorm folded, as the stage export would write it. Raises ModelError."""
    module = copy.deepcopy(module).eval()
    with contextlib.suppress(ModelError):  # control flow that fx cannot follow; torch.onnx often can
        module = fold_batchnorm(module)
    return _written(float_onnx(module, preprocess.size, {}, preprocess.channels), runtime)


def _written(model: onnx.ModelProto, runtime: Runtime) -> bytes:
    return to_tflite(model, {}) if runtime == "litert" else bytes(model.SerializeToString())
