"""Files of several layers side by side compute each layer, with weights of its own, in both runtimes."""

from __future__ import annotations

import numpy as np
import pytest

from compress.latency.shapes import Shape
from compress.latency.single import layer_file
from compress.targets import open_model

SHAPES = [
    Shape("conv", 5, 9, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 9)),
    Shape("depthwise", 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6, (7, 7)),
    Shape("grouped", 8, 12, (3, 3), (1, 1), (1, 1), (1, 1), 4, (5, 5)),
    Shape("linear", 10, 12, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
def test_the_layers_of_a_file_are_one_layer_with_other_weights(shape, runtime, tmp_path):
    models = []
    for count in (1, 3):
        path = tmp_path / f"{count}.{'onnx' if runtime == 'onnxruntime' else 'tflite'}"
        path.write_bytes(layer_file(shape, runtime, count))
        models.append(open_model(path))
    one, three = models
    assert one.input.shape == three.input.shape
    assert {one.input.dtype.kind, three.input.dtype.kind} <= {"i", "u"}  # no conversion is timed
    image = np.random.default_rng(0).integers(0, 127, one.input.shape).astype(one.input.dtype)
    alone, together = one.infer(image), three.infer(image)
    assert len(together) == 3
    matches = [np.array_equal(alone[0], other) for other in together]
    assert sum(matches) == 1
    assert all(other.shape == alone[0].shape for other in together)
    assert not np.array_equal(together[1], together[2])  # equal weights might be kept once


def test_signatures_leave_only_the_widths_out():
    conv, depthwise, grouped, _ = SHAPES
    assert conv.signature.with_channels(5, 9) == conv
    assert depthwise.signature.with_channels(6, 6) == depthwise
    assert depthwise.signature.with_channels(48, 48).groups == 48
    assert grouped.signature.with_channels(8, 12) == grouped
    assert grouped.signature.with_channels(16, 24).groups == 4
    assert [shape.family for shape in SHAPES] == ["conv 3x3", "depthwise 3x3", "grouped 3x3", "linear"]
    assert len({shape.signature for shape in SHAPES}) == 4
