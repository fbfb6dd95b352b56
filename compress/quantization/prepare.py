"""From a float network to one that trains with the arithmetic of its int8 files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from compress.errors import ModelError
from compress.product import Preprocess
from compress.quantization.equalize import equalize
from compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
    largest_step,
)
from compress.quantization.fold import fold_batchnorm
from compress.quantization.graph import (
    CALLS,
    hand_over_results,
    insert_after,
    is_tensor,
    kind_of,
    layer_name,
    operands,
    set_module,
)
from compress.quantization.operators import Role, is_sigmoid, rectifier, role_of, zero_pads
from compress.quantization.rewrite import (
    batchnorm_as_convolution,
    drop_casts,
    fold_sizes,
    merge_moves,
    out_of_place,
    rewrite_activations,
    rows_as_matrix,
)
from compress.settings import Settings

SIGMOID_GRID = (1 / 256, 0)
"""The only output grid of TFLite's int8 LOGISTIC, as uint8."""

REGEX = "re:"
SAME_FUNCTION = 1e-2
"""Of the largest logit: folded BatchNorm rounds differently, a wrong graph differs by far more."""


class Quantization(Settings):
    """How the network is quantized: part of a saved network's structure."""

    step_size: Literal["learned", "minmax"] = "learned"
    """`learned` trains the grids (LSQ); `minmax` lets them follow the extremes of weights and activations."""
    learn_activations: bool = True
    """Let activations' grids move in training; false leaves them where calibration put them."""
    keep_float: tuple[str, ...] = ()
    """Layers that stay float32 in the int8 files: names, with `*` (`classifier.*`), or `re:` and a regular expression
    that matches from the name's beginning (`re:features\\.1[0-7]`)."""
    rewrite_activations: bool = False
    """Hard-swish becomes ReLU6 and hard-sigmoid the sigmoid, which int8 kernels know; needs training (`epochs`)."""
    equalize: bool = False
    """Cross-layer equalization: the function stays the same, so layers around a ReLU6 are left alone."""
    weight_bits: int = Field(default=8, ge=2, le=8)
    """Below 8 the network is simulated in training and no int8 file is written."""
    activation_bits: int = Field(default=8, ge=2, le=8)
    """Below 8 the network is simulated in training and no int8 file is written."""

    @field_validator("keep_float")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith(REGEX):
                try:
                    re.compile(pattern.removeprefix(REGEX))
                except re.error as error:
                    raise ValueError(f"`{pattern}` is no regular expression ({error})") from error
        return patterns

    @property
    def simulated(self) -> bool:
        """No runtime here executes it."""
        return self.weight_bits < 8 or self.activation_bits < 8


def prepare(module: nn.Module, settings: Quantization, preprocess: Preprocess) -> fx.GraphModule:
    """A trainable graph with BatchNorm folded, weights fake-quantized and tensors on grids.

    Each value that an integer kernel reads or writes lies on a grid; operators without one compute in float between.
    `module` is not changed. Grids are meaningless until `calibrate` ran or a state dict is loaded.
    Raises ModelError that names the first layer or operator which has no place here.
    """
    graph_module = fold_batchnorm(module)
    name = type(module).__name__
    expected = _answers(module, preprocess, name)
    if settings.rewrite_activations or settings.equalize:
        _refuse_another_function(name, expected, graph_module, preprocess)
        if settings.rewrite_activations:
            rewrite_activations(graph_module)
        if settings.equalize:
            equalize(graph_module)
        expected = _answers(graph_module, preprocess, name)
    _ask(name, lambda: fold_sizes(graph_module, preprocess.size, preprocess.channels))
    out_of_place(graph_module)
    graph_module.graph.eliminate_dead_code()
    _refuse_another_function(name, expected, graph_module, preprocess)
    _propagate_shapes(graph_module, preprocess, name)
    drop_casts(graph_module)
    keep = kept_float(graph_module, settings.keep_float)
    _merge_pads(graph_module, keep)
    batchnorm_as_convolution(graph_module, keep)
    _refuse_layers(graph_module, keep)
    rows_as_matrix(graph_module, keep)
    merge_moves(graph_module)
    _quantize_layers(graph_module, settings, keep)
    _propagate_shapes(graph_module, preprocess, name)
    grids = _Grids(graph_module, settings, preprocess, keep)
    _refuse_idle_patterns(graph_module, settings.keep_float, grids)
    grids.place()
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.train()


def kept_float(graph_module: fx.GraphModule, patterns: Collection[str]) -> set[str]:
    """Names of the layers and operators that a pattern of `keep_float` matches.

    A pattern may match a container, and then all that is in it. Raises ModelError for one that matches nothing.
    """
    names = [layer_name(node) for node in graph_module.graph.nodes if node.op in CALLS]
    kept: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(REGEX):
            expression = re.compile(pattern.removeprefix(REGEX))
            found = {name for name in names if expression.match(name)}
        else:
            found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            close = get_close_matches(pattern.removeprefix(REGEX), names, 3, 0.3) or names[-3:]
            raise ModelError("stage quantize", f"`keep_float: {pattern}` matches no layer", f"some are {close}")
        kept |= found
    return kept


def _refuse_idle_patterns(graph_module: fx.GraphModule, patterns: Collection[str], grids: _Grids) -> None:
    """Raises ModelError for a pattern of `keep_float` that changes nothing, and where all layers are kept."""
    for pattern in patterns:
        if not kept_float(graph_module, (pattern,)) & grids.kept:
            raise ModelError(
                "stage quantize",
                f"`keep_float: {pattern}` matches no operator that computes in integers",
                "name convolutions, linear layers or sums; what is behind them follows",
            )
    if patterns and not any(role is Role.LAYER for role in grids.roles.values()):
        raise ModelError("stage quantize", "`keep_float` leaves no layer to quantize", "leave out the stage instead")


class _Grids:
    """Decides which values lie on a grid, and puts a quantizer behind each."""

    def __init__(
        self, graph_module: fx.GraphModule, settings: Quantization, preprocess: Preprocess, keep: Collection[str]
    ) -> None:
        self.graph_module, self.settings, self.preprocess = graph_module, settings, preprocess
        self.modules = dict(graph_module.named_modules())
        self.grids: dict[fx.Node, str] = {}
        """The quantizer on whose grid a node's value lies, by module name."""
        self.kept: set[str] = set()
        """Operators that `keep_float` keeps from computing in integers."""
        self.roles = self._find_roles(keep)
        self.wanted = self._find_wanted()
        graph_module.add_submodule("grids", nn.Module())

    def _find_roles(self, keep: Collection[str]) -> dict[fx.Node, Role]:
        roles: dict[fx.Node, Role] = {}
        constants: set[fx.Node] = set()
        for node in self.graph_module.graph.nodes:
            if node.op == "output" or not is_tensor(node):
                continue  # sizes and other plain numbers
            role = role_of(node, self.modules, constants)
            if role is None:
                raise _no_counterpart(node, kind_of(node, self.modules))
            layered = isinstance(kind_of(node, self.modules), (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            if layer_name(node) in keep and (layered or role is Role.JOINT):
                self.kept.add(layer_name(node))
                role = Role.ISLAND
            roles[node] = role
            if role is Role.CONSTANT:
                constants.add(node)
        return roles

    def _find_wanted(self) -> set[fx.Node]:
        """Values that an integer layer reads, by way of moves too."""
        wanted: set[fx.Node] = set()
        for node in reversed(self.roles):
            users = [(user, self.roles[user]) for user in node.users if user in self.roles]
            if any(role is Role.LAYER or (role is Role.MOVE and user in wanted) for user, role in users):
                wanted.add(node)
        return wanted

    def place(self) -> None:
        for node, role in self.roles.items():
            sources = operands(node)
            on_grid = bool(sources) and all(source in self.grids for source in sources)
            if role is Role.INPUT:
                if node in self.wanted:
                    self._own(node, "input")
            elif role is Role.LAYER or (role is Role.JOINT and on_grid):
                if not self._feeds_only_rectifier(node):
                    self._own(node, layer_name(node), fixed=self._fixed(node))
            elif role is Role.RECTIFIER:
                if on_grid or node in self.wanted or self._computes_in_integers(sources[0]):
                    self._rectify(node)
            elif role in (Role.JOINT, Role.ISLAND):
                if node in self.wanted:
                    self._own(node, layer_name(node), fixed=self._fixed(node))
            elif role is Role.MOVE and on_grid:
                self.grids[node] = self.grids[sources[0]]

    def _insert(self, node: fx.Node, quantizer: ActivationQuantizer) -> None:
        name = f"grids.{node.name}"
        self.graph_module.add_submodule(name, quantizer)
        new = insert_after(self.graph_module, node, name)
        hand_over_results(node, new)
        self.grids[new] = name

    def _own(self, node: fx.Node, layer: str, **how: Any) -> None:
        settings = self.settings
        if node.op == "placeholder":
            # The input's 8 bits are the camera's.
            self._insert(node, ActivationQuantizer("input", fixed=_input_grid(self.preprocess)))
            return
        learned = settings.step_size == "learned" and settings.learn_activations
        follows = settings.step_size == "minmax" and settings.learn_activations
        bits = 8 if how.get("fixed") else settings.activation_bits
        self._insert(node, ActivationQuantizer(layer, learned=learned, follows=follows, bits=bits, **how))

    def _rectify(self, node: fx.Node) -> None:
        """Puts a grid in the rectifier's place: one that starts at zero clips as the rectifier did."""
        source = operands(node)[0]
        layer = layer_name(source if source not in self.grids else node)
        how = rectifier(node, self.modules)
        assert how is not None
        self._own(node, layer, **how)
        node.replace_all_uses_with(source)
        self.graph_module.graph.erase_node(node)

    def _fixed(self, node: fx.Node) -> tuple[float, int] | None:
        return SIGMOID_GRID if is_sigmoid(node, self.modules) and self.settings.activation_bits == 8 else None

    def _computes_in_integers(self, node: fx.Node) -> bool:
        """Whether the node is a layer or joint whose grid was left to the rectifier behind it."""
        role = self.roles.get(node)
        if role is Role.JOINT:
            return all(source in self.grids for source in operands(node))
        return role is Role.LAYER

    def _feeds_only_rectifier(self, node: fx.Node) -> bool:
        """Whether the only user of the node's value is a rectifier, whose grid then serves both."""
        users = list(node.users)
        return len(users) == 1 and self.roles.get(users[0]) is Role.RECTIFIER and self._fixed(node) is None


def _answers(module: nn.Module, preprocess: Preprocess, name: str) -> torch.Tensor:
    """What the network makes of a few random images, in eval mode."""
    # Five of them: sizes that depend on the batch were asked for at two and three.
    shape = (5, preprocess.channels, preprocess.size, preprocess.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    was_training = module.training
    found: list[Any] = []
    with torch.no_grad():
        _ask(name, lambda: found.append(module.eval()(images)))
    module.train(was_training)
    if not isinstance(found[0], torch.Tensor):
        raise ModelError(name, f"returns {type(found[0]).__name__}", "a network returns one tensor of logits")
    return found[0]


def _refuse_another_function(
    name: str, expected: torch.Tensor, graph_module: fx.GraphModule, preprocess: Preprocess
) -> None:
    """Raises ModelError where tracing, folding or rewriting changed what the network computes."""
    traced = _answers(graph_module, preprocess, name)
    if traced.shape != expected.shape or (traced - expected).abs().max() > SAME_FUNCTION * expected.abs().max():
        raise ModelError(
            name,
            "computes something else as a traced graph",
            "it may overwrite a tensor (`x += y`, inplace=True) that is read again, or depend on more than the image",
        )


def _propagate_shapes(graph_module: fx.GraphModule, preprocess: Preprocess, name: str) -> None:
    def propagate() -> None:
        was_training = graph_module.training
        with torch.no_grad():
            shape = (1, preprocess.channels, preprocess.size, preprocess.size)
            ShapeProp(graph_module.eval()).propagate(torch.zeros(shape))
        graph_module.train(was_training)

    _ask(name, propagate)


def _ask(name: str, question: Callable[[], None]) -> None:
    """Runs the traced network; what fails in it is a ModelError."""
    try:
        question()
    except Exception as error:
        raise ModelError(
            name,
            f"fails as a traced graph ({(str(error).strip().splitlines() or [type(error).__name__])[0]})",
            "its forward must not depend on anything but the image",
        ) from error


def _quantize_layers(graph_module: fx.GraphModule, settings: Quantization, keep: Collection[str]) -> None:
    """Puts fake-quantized layers in the place of the float ones."""
    how: dict[str, Any] = {"bits": settings.weight_bits, "learned": settings.step_size == "learned"}
    for name, layer in list(graph_module.named_modules()):
        if name in keep:
            continue
        if type(layer) is nn.Conv2d:
            pads = getattr(layer, "pads", (0, 0, 0, 0))
            set_module(graph_module, name, QuantizedConv2d.of(layer, pads, **how))
        elif type(layer) is nn.Linear:
            set_module(graph_module, name, QuantizedLinear.of(layer, **how))
        elif type(layer) is nn.ConvTranspose2d and layer.groups == 1:
            # A grouped one has more outputs than ONNX can store scales for along a weight's axis: it stays in float.
            set_module(graph_module, name, QuantizedConvTranspose2d.of(layer, **how))


def _input_grid(preprocess: Preprocess) -> tuple[float, int]:
    """A fixed grid over all pixel values.

    254 steps and not 255: with mean = std = 0.5 the 256 pixel values would otherwise fall half-way between steps, and
    rounding half to even would merge them in pairs.
    """
    low = min((0 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True))
    high = max((1 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (largest_step(8) - 1)
    return scale, round(0.5 - low / scale)


def _no_counterpart(node: fx.Node, kind: Any) -> ModelError:
    if isinstance(kind, nn.Module):
        operator_name = type(kind).__name__
    else:
        operator_name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return ModelError(
        f"layer {layer_name(node)}",
        f"operator {operator_name} has no int8 counterpart here",
        "replace it, or leave `quantize` out of the recipe",
    )


def _merge_pads(graph_module: fx.GraphModule, keep: Collection[str]) -> None:
    """Moves a constant zero padding into the one convolution that reads it."""
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        pads = zero_pads(node, modules)
        if pads is None or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        conv = modules.get(str(user.target)) if user.op == "call_module" else None
        if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        if layer_name(user) in keep:
            continue
        conv.pads = pads  # type: ignore[assignment]
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)


def _refuse_layers(graph_module: fx.GraphModule, keep: Collection[str]) -> None:
    """Raises ModelError for layers whose meaning would change in silence."""
    modules = dict(graph_module.named_modules())
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        kind = kind_of(node, modules) if node.op in CALLS else None
        if isinstance(kind, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if node.target in seen and node.target not in keep:
                raise ModelError(
                    f"layer {node.target}",
                    "runs twice in one forward pass, so its weights would need two grids",
                    "give each call a layer of its own, or leave `quantize` out of the recipe",
                )
            seen.add(node.target)
        if isinstance(kind, nn.Conv2d) and kind.padding_mode != "zeros" and node.target not in keep:
            raise ModelError(
                f"layer {node.target}",
                f"padding_mode {kind.padding_mode} has no int8 counterpart here",
                "use zeros, or leave `quantize` out of the recipe",
            )
