"""What can be said of a network in numbers: its score, parameters, multiply-adds, layer by layer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.labels import Task
from compress.product import Batch
from compress.tasks import Rules, task_of


def params(module: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def deflated(content: bytes) -> int:
    """Bytes of `content` once compressed as in zip and gzip (DEFLATE, level 9)."""
    return len(zlib.compress(content, 9))


def deflated_weights(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a float network, one behind the other, once compressed."""
    state = module.state_dict().values()
    return deflated(b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in state))


def layers(module: nn.Module, input_size: int, channels: int = 3) -> list[dict[str, Any]]:
    """One entry per convolution and linear layer, in the order of execution, with its multiply-adds at batch 1.

    A layer that runs twice in one forward pass is listed once with the sum of both.
    """
    found: dict[str, dict[str, Any]] = {}
    hooks = []

    def watch(name: str, layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Weight elements per output element: each costs one multiply-add.
            if isinstance(layer, nn.ConvTranspose2d):
                macs = layer.weight.numel() * inputs[0][0, 0].numel()
            elif isinstance(layer, nn.Conv2d):
                macs = layer.weight.numel() * output[0, 0].numel()
            else:
                macs = layer.weight.numel() * (output[0].numel() // output.shape[-1])
            if name in found:
                found[name]["macs"] += macs
                return
            linear = isinstance(layer, nn.Linear)
            found[name] = {
                "name": name,
                "kind": type(layer).__name__,
                "inputs": layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels,
                "outputs": layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels,
                "groups": 1 if isinstance(layer, nn.Linear) else layer.groups,
                "kernel": [] if linear else list(layer.weight.shape[2:]),
                "macs": macs,
                "params": layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()),
            }

        hooks.append(layer.register_forward_hook(hook))

    for name, child in module.named_modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            watch(name, child)
    was_training = module.training
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, input_size, input_size, device=device))
    finally:
        for handle in hooks:
            handle.remove()
        module.train(was_training)
    return list(found.values())


def macs(module: nn.Module, input_size: int, channels: int = 3) -> int:
    """Multiply-adds of all convolutions and linear layers for one square image of `input_size` pixels a side."""
    return sum(layer["macs"] for layer in layers(module, input_size, channels))


def score(module: nn.Module, batches: Iterable[Batch], device: torch.device, task: Task = "classification") -> float:
    """The task's score over all images of `batches`: top-1 accuracy in [0, 1], mean average precision, or R2."""
    rules = task_of(task)
    return rules.score(*answered(module, batches, device, rules))


def answered(
    module: nn.Module, batches: Iterable[Batch], device: torch.device, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """What a score needs of the outputs, and the labels; the module runs in eval mode and gets its mode back."""
    was_training = module.training
    module.eval().to(device)
    kept, labels = [], []
    with torch.inference_mode():
        for batch in batches:
            kept.append(rules.kept(module(batch.images_NCHW.to(device)).float().cpu().numpy()))
            labels.append(batch.labels_N.cpu().numpy())
    module.to("cpu").train(was_training)
    return np.concatenate(kept), np.concatenate(labels)
