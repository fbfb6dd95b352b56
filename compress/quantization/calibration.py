"""Where the grids of activations lie before training starts, or for good (PTQ)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from compress.product import Batch
from compress.quantization.fake_quant import ActivationQuantizer


def calibrate(graph_module: nn.Module, batches: Iterable[Batch], device: torch.device) -> None:
    """Puts every grid over the mean extremes of its tensor in float arithmetic; changes `graph_module` in place."""
    quantizers = [m for m in graph_module.modules() if isinstance(m, ActivationQuantizer) and m.layer != "input"]
    was_training = graph_module.training
    graph_module.eval().to(device)
    for quantizer in quantizers:
        quantizer.calibrating = True
        quantizer.batches.zero_()
        quantizer.extremes.zero_()
    with torch.no_grad():
        for batch in batches:
            graph_module(batch.images_NCHW.to(device))
    for quantizer in quantizers:
        quantizer.calibrating = False
    graph_module.to("cpu").train(was_training)
