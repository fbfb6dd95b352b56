"""Whole residual blocks that can be taken out of a network: what is left where one was is the identity.

A block adds something to what it is given: without that it returns its input, so the layers around it fit as they are.
Whether a submodule is such a block is found by computing, not by what its class is called.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.structure import SLICEABLE, inside
from compress.product import Structure

IMAGES = 1
EQUAL = 1e-5
"""Of the largest output: a sum with zeros is exact, but layers that follow may add in another order."""


@dataclass(frozen=True)
class Block:
    """A submodule that adds something to what it is given, and returns it in the same shape."""

    name: str
    layers: tuple[str, ...]
    """Names of the convolutions, linear layers and other layers with channels inside."""


def find_blocks(module: nn.Module, size: int, channels: int = 3) -> list[Block]:
    """The innermost residual blocks of `module`, in the order of execution; none inside another.

    A block is a submodule that runs once, takes one tensor and returns one of that shape, and that returns its very
    input once all of its parameters are zero: what they computed was added to it. Behind a last ReLU that holds for an
    input without negative numbers, as it comes out of the ReLU before. Needs a few forward passes of square images with
    `size` pixels a side. `module` stays as it is.
    """
    copied = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, channels, size, size, generator=generator)
    images = torch.cat([images, -images, images * 10])
    inputs = _inputs(copied, images)
    found: list[Block] = []
    for name, seen in inputs.items():  # a submodule comes before what is inside it
        block = copied.get_submodule(name)
        layers = tuple(f"{name}.{inner}" for inner, layer in block.named_modules() if isinstance(layer, SLICEABLE))
        if layers and _returns_its_input(block, seen, generator):
            found.append(Block(name, layers))
    found = [block for block in found if not any(other.name.startswith(f"{block.name}.") for other in found)]
    return [block for block in found if block.name in _right(copied, [block.name for block in found], images)]


def drop(module: nn.Module, names: Iterable[str]) -> None:
    """Puts `nn.Identity` in the place of those blocks, in place. Raises ModelError for a name that it does not have."""
    for name in names:
        known = dict(module.named_modules())
        if not name or name not in known:
            close = get_close_matches(name, known, n=3)
            raise ModelError(name, "the network has no such block", f"close: {', '.join(close)}" if close else "")
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Identity().train(module.training))


def dropped_from(structure: Structure, names: Sequence[str]) -> Structure:
    """The structure of a network without those blocks too; what it says of layers inside them is gone."""
    before = [name for name in structure.dropped if not inside(name, names)]
    kept = {name: channels for name, channels in structure.kept.items() if not inside(name, names)}
    return structure.model_copy(update={"dropped": (*before, *names), "kept": kept})


def _inputs(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each submodule is given that runs once, is known by one name, and makes of one tensor one of that shape."""
    names = Counter(child for _, child in module.named_modules(remove_duplicate=False))
    runs: Counter[str] = Counter()
    found: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, child: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            runs[name] += 1
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].is_floating_point():
                found[name] = args[0].clone()  # here, as the order of execution is that of the entries

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if name in found and not (isinstance(output, Tensor) and output.shape == found[name].shape):
                del found[name]

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))

    for name, child in module.named_modules():
        if name and names[child] == 1 and any(True for _ in child.children()):
            watch(name, child)
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen for name, seen in found.items() if runs[name] == 1}


def _returns_its_input(block: nn.Module, seen: Tensor, generator: torch.Generator) -> bool:
    """Whether the block without what its parameters make returns what it is given: anything, or nothing negative where
    that is all it ever sees."""
    silent = _silenced(copy.deepcopy(block))
    drawn = torch.randn(seen.shape, generator=generator)

    def returns(x: Tensor) -> bool:
        try:
            with torch.no_grad():
                found = silent(x.clone())
        except Exception:  # what it needs besides its input, in as many words as there are networks
            return False
        return isinstance(found, Tensor) and found.shape == x.shape and _equal(found, x)

    if returns(drawn):
        return True
    return bool((seen >= 0).all()) and returns(drawn.abs().clamp_max(6)) and returns(seen)


def _silenced(block: nn.Module) -> nn.Module:
    """The block with all its parameters 0, in place, and with BatchNorm that moves nothing."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        for norm in block.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
                norm.running_mean.zero_()
    return block


def _right(module: nn.Module, names: Sequence[str], images: Tensor) -> set[str]:
    """Those of the blocks that the network can be run without, and then answers as with the block's parameters 0."""

    def passes(chosen: Sequence[str]) -> bool:
        silent, without = copy.deepcopy(module), copy.deepcopy(module)
        with contextlib.suppress(Exception), torch.no_grad():  # a `forward` that asks the block for what it has
            for name in chosen:
                _silenced(silent.get_submodule(name))
            drop(without, chosen)
            return _equal(without(images), silent(images))
        return False

    if not names or passes(names):
        return {*names}
    return {name for name in names if passes([name])}


def _equal(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    bound = EQUAL * float(expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
    return not bool((found - expected).abs().max() > bound) and bool(found.isfinite().all())
