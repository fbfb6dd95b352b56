"""The networks themselves as witnesses: on whole numbers (`Frozen`), and before anything was rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quantization import ActivationQuantizer, Frozen, run_integers
from compress.quantization.freeze import Grid as FrozenGrid
from compress.quantization.operators import QUANTIZED
from compress.verification.facts import Facts, Grid, Parameters, trimmed

FROZEN, TRAINED = "frozen torch int8", "trained torch int8"
"""The network on whole numbers, which the int8 files copy; and the fake-quantized network that was trained."""


class FrozenNetwork:
    """The third witness beside two files: what both of them were written from."""

    def __init__(self, frozen: Frozen, name: str = FROZEN) -> None:
        self.frozen, self.name = frozen, name
        self.grids = {grid.layer: _grid(grid) for grid in frozen.grids()}

    @property
    def output_grid(self) -> Grid | None:
        return None if self.frozen.output is None else _grid(self.frozen.output)

    @property
    def output_tensor(self) -> str:
        return "" if self.frozen.output is None else self.frozen.output.layer

    @property
    def facts(self) -> Facts:
        modules = dict(self.frozen.module.named_modules())
        parameters = {}
        for layer, integers in self.frozen.integers.items():
            weight = integers.weight.numpy()
            if integers.axis == 1:  # a transposed convolution: (inputs, outputs / groups, ...)
                groups = int(getattr(modules[layer], "groups", 1))
                inputs, outputs, *window = weight.shape
                weight = weight.reshape(groups, inputs // groups, outputs, *window).swapaxes(1, 2)
                weight = weight.reshape(groups * outputs, inputs // groups, *window)
            parameters[layer] = Parameters(
                layer=layer,
                source="",
                weight=trimmed(weight),
                weight_scale=integers.weight_scale.numpy(),
                bias=integers.bias.numpy(),
                bias_scale=integers.bias_scale.numpy(),
            )
        return Facts(self.name, self.grids, parameters)

    def predict(self, images_NCHW: np.ndarray) -> np.ndarray:
        return run_integers(self.frozen, torch.from_numpy(images_NCHW)).logits_NK.numpy()

    def steps(self, images_NCHW: np.ndarray) -> dict[str, np.ndarray]:
        """Every quantized tensor, int32 steps from zero, (N, 1, ...), by name in the order of execution."""
        rows = [
            run_integers(self.frozen, image[None], keep_steps=True).steps for image in torch.from_numpy(images_NCHW)
        ]
        return {layer: np.stack([row[layer].numpy() for row in rows]) for layer in rows[0]}


class UnroundedNetwork:
    """The fake-quantized network with every rounding left out: its float twin, with the same names as the int8 files.

    It has the weights that training left, before they become integers; so what differs from the int8 files is
    quantization alone, also where training moved the weights away from an earlier float network.
    """

    name = "the network before rounding"

    def __init__(self, prepared: fx.GraphModule, frozen: Frozen) -> None:
        self.module = prepared.eval()
        modules = dict(frozen.module.named_modules())
        self.layers = {}
        """Names of the grids by the name of their node, which freezing keeps."""
        for node in frozen.module.graph.nodes:
            grid = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(grid, FrozenGrid):
                self.layers[node.name] = grid.layer
        present = {node.name for node in prepared.graph.nodes}
        self.layers = {node: layer for node, layer in self.layers.items() if node in present}

    @property
    def output_tensor(self) -> str:
        """Known by the name of its grid, where it has one."""
        return ""

    def float_names(self) -> list[str]:
        return [layer for layer in self.layers.values() if layer != "input"]

    def floats(self, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        """The float values at the grids `names`, (N, 1, ...)."""
        rows = [_Unrounded(self).values_of(image) for image in images]
        return {name: np.stack([row[name] for row in rows]) for name in names}

    def floats_alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value of `given` as the network computes it when all values before it are the given ones."""
        rows = []
        for index, image in enumerate(images):
            own = {name: torch.from_numpy(values[index]) for name, values in given.items()}
            rows.append(_Unrounded(self, given=own).values_of(image))
        return {name: np.stack([row[name] for row in rows]) for name in given}

    def disturbed(self, images: np.ndarray, errors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (N, K) by name: what the network answers when the error of that one value is added to it."""
        first = _Unrounded(self)
        first(torch.from_numpy(images))
        result = {}
        for name, error in errors.items():
            # All images at once where they are rows of the value, one by one where the network mixes its axes.
            together = torch.from_numpy(error.reshape(-1, *error.shape[2:]))
            if together.shape == first.values[name].shape and error.shape[1] == 1:
                result[name] = _Unrounded(self, {name: together}, first.history).run_again(images)
                continue
            rows = []
            for index, image in enumerate(images):
                own = _Unrounded(self, {name: torch.from_numpy(error[index])})
                rows.append(own(torch.from_numpy(image[None])).numpy())
            result[name] = np.concatenate(rows)
        return result

    def predict(self, images: np.ndarray) -> np.ndarray:
        return _Unrounded(self)(torch.from_numpy(images)).numpy()


class _Unrounded(fx.Interpreter):
    def __init__(
        self,
        network: UnroundedNetwork,
        errors: Mapping[str, Tensor] | None = None,
        history: Mapping[fx.Node, Any] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(network.module, garbage_collect_values=False)
        self.network, self.errors = network, errors or {}
        self.given = given or {}
        self.values: dict[str, Tensor] = {}
        self.history = dict(history or {})

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            result: Tensor = self.run(images)
        self.history = dict(self.env)
        return result

    def values_of(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Every value at a grid for one image."""
        self(torch.from_numpy(image[None]))
        return {name: values.numpy() for name, values in self.values.items()}

    def run_again(self, images: np.ndarray) -> np.ndarray:
        """Only what comes after the first error is computed again."""
        begin = next(n for n in self.network.module.graph.nodes if self.network.layers.get(n.name) in self.errors)
        before: dict[fx.Node, Any] = {}
        for node in self.network.module.graph.nodes:
            if node is begin:
                break
            before[node] = self.history[node]
        with torch.inference_mode():
            result: Tensor = self.run(torch.from_numpy(images), initial_env=before)
        return result.numpy()

    def run_node(self, n: fx.Node) -> Any:
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, ActivationQuantizer):
            return self._at_grid(n, layer, self.env[n.all_input_nodes[0]])
        if isinstance(layer, QUANTIZED):
            return _in_float(layer, self.env[n.all_input_nodes[0]])
        return super().run_node(n)

    def _at_grid(self, node: fx.Node, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        """The value as it is, clipped where the grid stands for a rectifier."""
        if quantizer.nonnegative:
            x = x.clamp(0, quantizer.limit)
        name = self.network.layers.get(node.name)
        if name is not None:
            if name in self.errors:
                x = x + self.errors[name]
            self.values[name] = x
            x = self.given.get(name, x)
        return x


def _in_float(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with the weights that it rounds, unrounded."""
    pads = getattr(layer, "pads", ())
    if any(pads):
        x = F.pad(x, pads)
    plain = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn"))
    result: Tensor = plain.forward(layer, x)  # type: ignore[attr-defined]
    return result


def _grid(grid: FrozenGrid) -> Grid:
    return Grid(np.float32(grid.scale), grid.zero_point)
