"""Tensors by name, as files hold them, and modules that take them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`load_state_dict` for tensors from a file, which does not say what version of its layers they are of.

    They are taken to be of the version that is installed: some networks (torchvision's MNASNet) refuse to guess. Raises
    RuntimeError as torch does.
    """
    state = OrderedDict(tensors)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state, strict=strict)
