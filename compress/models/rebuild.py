"""From a factory's network to the one that a structure describes."""

from __future__ import annotations

from torch import nn

from compress.errors import ModelError
from compress.holding import hold
from compress.models.blocks import drop
from compress.models.low_rank import factorize
from compress.models.structure import resize
from compress.product import Structure


def rebuild(module: nn.Module, structure: Structure) -> None:
    """Takes the blocks and channels out of the factory's `module` that the structure does without, in place, puts two
    layers where one was factored, and marks the layers whose weights keep traits.

    Its state dict is then the described float network's. Raises ModelError for a block or layer that `module` does not
    have in this shape.
    """
    drop(module, structure.dropped)
    resize(module, structure.kept)
    factorize(module, structure.factored)
    layers = dict(module.named_modules())
    for name, kinds in structure.held.items():
        if name not in layers:
            raise ModelError(name, "the network has no such layer")
        hold(layers[name], kinds)


def refuse_to_cut(structure: Structure, place: str) -> None:
    """Raises ModelError, which names `place`, for a network that no channel or block can be taken out of any more."""
    if structure.quantize is not None:
        raise ModelError(place, "the network is already quantized", "put prune before quantize")
    if structure.factored:
        raise ModelError(place, "some of its layers are factored already", "put prune before factorize")
    if structure.held:
        raise ModelError(place, "some of its weights are held already", "put prune before sparsify and cluster")
