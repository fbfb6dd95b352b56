"""How convolutions and poolings walk over an image, and which paddings TFLite has words for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.formats.tflite.graph import Node
from compress.formats.tflite_file import Shape

Pads = tuple[tuple[int, int], ...]  # (before, after) per axis


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """What TFLite's SAME padding puts before and after `size` elements; `kernel` counts its dilation."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class Window:
    """How a convolution or pooling walks over the image; pairs are (vertical, horizontal)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: Pads

    @classmethod
    def of(cls, node: Node, image: Shape, kernel: Sequence[int], outputs: Shape) -> Window:
        """Read from the attributes; `image` and `outputs` are (height, width)."""
        strides = tuple(node.attributes.get("strides", (1, 1)))
        dilations = tuple(node.attributes.get("dilations", (1, 1)))
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        auto_pad = node.attributes.get("auto_pad", b"NOTSET")
        if auto_pad == b"NOTSET":
            begin_end = node.attributes.get("pads", (0, 0, 0, 0))
            pads = [(begin_end[0], begin_end[2]), (begin_end[1], begin_end[3])]
        elif auto_pad == b"VALID":
            pads = [(0, 0), (0, 0)]
        else:
            pads = [same_pads(*walk) for walk in zip(image, spans, strides, strict=True)]
            if auto_pad == b"SAME_LOWER":
                pads = [(after, before) for before, after in pads]
        if node.attributes.get("ceil_mode", 0):  # the last window may stand over the edge: pad as far as it reaches
            for axis, (before, after) in enumerate(pads):
                last = (outputs[axis] - 1) * strides[axis]
                if last >= image[axis] + before:
                    # ONNX shape inference counts such a window, runtimes leave it out.
                    node.refuse("with ceil_mode and a last window that sees padding only", "use ceil_mode=False")
                pads[axis] = (before, max(after, last + spans[axis] - image[axis] - before))
        return cls(tuple(kernel), strides, dilations, tuple(pads))

    def padded(self, extra: Pads) -> Window:
        summed = tuple((a + c, b + d) for (a, b), (c, d) in zip(self.pads, extra, strict=True))
        return Window(self.kernel, self.strides, self.dilations, summed)

    def is_same(self, image: Shape) -> bool:
        """TFLite's SAME puts exactly these pads around `image`."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        return self.pads == tuple(same_pads(*walk) for walk in zip(image, spans, self.strides, strict=True))

    @property
    def is_valid(self) -> bool:
        return not any(map(any, self.pads))

    def counts(self, image: Shape, outputs: Shape) -> np.ndarray:
        """How many elements of the image, and not of its padding, each window sees: (height, width) of `outputs`."""
        per_axis = []
        for axis, (before, _) in enumerate(self.pads):
            starts = np.arange(outputs[axis]) * self.strides[axis] - before
            ends = np.minimum(starts + self.kernel[axis], image[axis])
            per_axis.append(ends - np.maximum(starts, 0))
        return np.outer(*per_axis)
