"""An ncnn file opened for comparison: float, so its outputs are all there is to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.formats.ncnn import read_metadata
from compress.targets import open_model
from compress.verification.facts import Grid


class NcnnFile:
    """Raises CompressError for a file that is none, or that cannot be run."""

    quantized = False
    storage = "float"
    input_grid: Grid | None = None
    output_grid: Grid | None = None

    def __init__(self, path: Path, *, name: str = "", threads: int = 1) -> None:
        self.path, self.name, self.threads = path, name or path.name, threads
        self.model = open_model(path, threads=threads)
        self.notes = list(self.model.notes)
        self.metadata = read_metadata(path.read_bytes())

    def predict(self, images_NCHW: np.ndarray) -> np.ndarray:
        """The outputs as real numbers, (N, K)."""
        return self.model.predict(images_NCHW)
