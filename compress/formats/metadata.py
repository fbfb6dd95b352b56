"""What an exported file says of itself, as text keys and values: the same in ONNX and TFLite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from compress import __version__
from compress.product import Preprocess


def metadata(
    *, kind: str, layout: Literal["NCHW", "NHWC"], preprocess: Preprocess, labels: Sequence[str], recipe_hash: str
) -> dict[str, str]:
    """Keys under `compress.`: how to make the input of an RGB image, what the outputs mean, where the file is from."""
    return {
        "compress.version": __version__,
        "compress.kind": kind,
        "compress.preprocess": json.dumps(
            {**preprocess.model_dump(), "channels": "RGB", "layout": layout, "resize": "bilinear", "scale": 1 / 255}
        ),
        "compress.labels": json.dumps(list(labels), ensure_ascii=False),
        "compress.recipe": recipe_hash,
    }
