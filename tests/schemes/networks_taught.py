"""What the tests of schemes start from: a pruned network, and the stage that trains it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.product import Product, Run
from compress.stages.distill import Distill
from compress.stages.prune import Prune


def pruned(product: Product, run: Run, macs: float = 0.4, **settings: Any) -> Product:
    """The product without some of its channels, untrained."""
    settings = {"use": "prune", "goal": {"macs": macs}, "round_to": 2, "batchnorm_images": 64, **settings}
    return Prune.model_validate_json(json.dumps(settings)).apply(product, run)


def stage(scheme: dict[str, Any] | None, **settings: Any) -> Distill:
    """`distill` as a recipe gives it: two steps of 32 images."""
    settings = {"use": "distill", "epochs": 1, "batch_size": 32, "lr": 0.02, "warmup_epochs": 0, **settings}
    return Distill.model_validate_json(json.dumps({**settings, "scheme": scheme}))


def digest(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()


def without_dropout(product: Product) -> Product:
    """In place: with dropout, whoever draws random numbers changes what the student sees."""
    for layer in product.network.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return product


def log_probabilities(logits_NK: Tensor, temperature: float = 1.0) -> Any:
    """In numpy."""
    values = logits_NK.detach().double().numpy() / temperature
    values = values - values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def logits(count: int, seed: int = 0, *, images: int = 6, classes: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(images, classes, generator=generator, dtype=torch.float64) for _ in range(count)]
