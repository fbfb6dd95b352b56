"""From pixels, where images are corrupted and attacked, to a network's input."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.product import Preprocess


def to_input(pixels_NHWC: np.ndarray, preprocess: Preprocess, *, channels_last: bool) -> Tensor:
    """float32 (N, C, H, W), in memory as `Data.channels_last` says."""
    images_NCHW = torch.from_numpy(preprocess.normalize(pixels_NHWC)).permute(0, 3, 1, 2)
    return images_NCHW if channels_last else images_NCHW.contiguous()


def to_unit(pixels_NHWC: np.ndarray, *, channels_last: bool) -> Tensor:
    """float32 (N, C, H, W) in [0, 1]."""
    unit_NCHW = torch.from_numpy(pixels_NHWC / np.float32(255)).permute(0, 3, 1, 2)
    return unit_NCHW if channels_last else unit_NCHW.contiguous()


def normalized(unit_NCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """The network's input for pixels in [0, 1]; gradients pass."""
    mean, std = (unit_NCHW.new_tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (unit_NCHW - mean) / std
