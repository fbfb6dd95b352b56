"""From a network's input back to pixels, where images are corrupted and attacked, and to the input again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.product import Preprocess


def to_pixels(images_NCHW: Tensor, preprocess: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, 3): the pixels that `preprocess` made this input of, to the last one."""
    mean_C, std_C = (np.asarray(values, np.float64) for values in (preprocess.mean, preprocess.std))
    images_NHWC = images_NCHW.permute(0, 2, 3, 1).cpu().numpy() * std_C + mean_C
    pixels_NHWC: np.ndarray = np.clip(np.rint(images_NHWC * 255), 0, 255).astype(np.uint8)
    return pixels_NHWC


def to_input(pixels_NHWC: np.ndarray, preprocess: Preprocess, *, channels_last: bool) -> Tensor:
    """float32 (N, 3, H, W), in memory as `Data.channels_last` says."""
    images_NCHW = torch.from_numpy(preprocess.normalize(pixels_NHWC)).permute(0, 3, 1, 2)
    return images_NCHW if channels_last else images_NCHW.contiguous()


def to_unit(pixels_NHWC: np.ndarray, *, channels_last: bool) -> Tensor:
    """float32 (N, 3, H, W) in [0, 1]."""
    unit_NCHW = torch.from_numpy(pixels_NHWC / np.float32(255)).permute(0, 3, 1, 2)
    return unit_NCHW if channels_last else unit_NCHW.contiguous()


def normalized(unit_NCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """The network's input for pixels in [0, 1]; gradients pass."""
    mean, std = (unit_NCHW.new_tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (unit_NCHW - mean) / std
