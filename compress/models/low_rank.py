"""Two thin layers in the place of a wide one: the truncated singular value decomposition of its weight.

Denton et al., 2014 (arXiv:1404.0736), of linear layers and 1x1 convolutions, whose weight is a matrix. Of all matrices
of a rank, the one that keeps the largest singular values is nearest (Eckart & Young, 1936).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import ModelError

FIRST, SECOND = "0", "1"
"""What the two are called, behind the layer's name and a dot."""
EQUAL = 1e-3
"""Of the largest output, between a network and itself with all of its singular values."""


@dataclass(frozen=True)
class LowRank:
    """One layer's rank."""

    name: str
    rank: int
    full: int
    """The smaller of its widths."""
    energy: float
    """The part of the sum of squared singular values that the rank keeps."""


def matrix_of(layer: nn.Module) -> Tensor | None:
    """The weight (outputs, inputs) of a linear layer or a 1x1 convolution without groups; None of any other layer."""
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.kernel_size == (1, 1) and layer.padding_mode == "zeros":
        return layer.weight.detach().flatten(1)
    return None


def least_rank(singular_values: Tensor, energy: float) -> int:
    """The fewest of the falling values whose squares add up to that part of all squares, in (0, 1]; at least 1.

    With 1 all of them, whatever rounding does to the sum.
    """
    if energy >= 1:
        return len(singular_values)
    squares = singular_values.double().square()
    kept = squares.cumsum(0)
    return min(len(squares), int((kept < energy * kept[-1]).sum()) + 1)


def low_ranks(module: nn.Module, names: Sequence[str], *, energy: float, saving: float) -> list[LowRank]:
    """The layers among `names` that need at most 1 - `saving` of their multiply-adds at the rank that keeps `energy`.

    A rank r costs r (outputs + inputs) where the layer cost outputs * inputs, at each place.
    """
    found = []
    for name in names:
        matrix_OI = matrix_of(module.get_submodule(name))
        if matrix_OI is None:
            continue
        values = torch.linalg.svdvals(matrix_OI.double().cpu())
        rank, squares = least_rank(values, energy), values.square()
        if rank * sum(matrix_OI.shape) <= (1 - saving) * matrix_OI.numel():
            part = float(squares[:rank].sum() / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny))
            found.append(LowRank(name, rank, len(values), part))
    return found


def replaceable(module: nn.Module, names: Sequence[str], size: int, channels: int = 3) -> list[str]:
    """Those of the layers that two others can stand for: with all singular values, the network answers as before.

    Not where a `forward` reads a layer's weight itself, as attention does that computes its projections in one.
    """
    images = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    whole = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        expected = whole(images)

    def passes(chosen: Sequence[str]) -> bool:
        copied = copy.deepcopy(whole)
        try:
            factorize(copied, {name: min(_widths(copied, name)) for name in chosen})
            with torch.no_grad():
                found = copied(images)
        except Exception:  # a layer that is asked for what it has no more, in as many words as there are networks
            return False
        bound = EQUAL * float(expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
        return found.shape == expected.shape and bool((found - expected).abs().max() <= bound)

    fitting = [name for name in names if matrix_of(module.get_submodule(name)) is not None]
    if not fitting or passes(fitting):
        return fitting
    return [name for name in fitting if passes([name])]


@torch.no_grad()
def factorize(module: nn.Module, ranks: Mapping[str, int]) -> None:
    """Puts two layers in the place of each, in place: one of `rank` outputs without a bias, and one with the old bias.

    The singular values are shared equally by both. A stride and a padding go with the first. Raises ModelError for a
    layer that is not there, is no matrix, or has no such rank.
    """
    for name, rank in ranks.items():
        outputs, inputs = _widths(module, name)
        if not 1 <= rank <= min(outputs, inputs):
            raise ModelError(name, f"no rank {rank}: the layer has {outputs} outputs and {inputs} inputs")
        old = module.get_submodule(name)
        matrix_OI = matrix_of(old)
        assert matrix_OI is not None
        left_OR, values_R, right_RI = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
        root_R = values_R[:rank].sqrt()
        first, second = _pair(old, rank)
        for new, weight in ((first, root_R[:, None] * right_RI[:rank]), (second, left_OR[:, :rank] * root_R)):
            new.weight.copy_(weight.reshape(new.weight.shape))
            new.to(matrix_OI.device, matrix_OI.dtype)
        if second.bias is not None:
            second.bias.copy_(old.bias)  # type: ignore[arg-type]
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Sequential(first, second).train(old.training))


def _widths(module: nn.Module, name: str) -> tuple[int, int]:
    layers = dict(module.named_modules())
    matrix_OI = matrix_of(layers[name]) if name in layers else None
    if matrix_OI is None:
        raise ModelError(name, "is no linear layer or 1x1 convolution that two could stand for")
    return int(matrix_OI.shape[0]), int(matrix_OI.shape[1])


def _pair(old: nn.Module, rank: int) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
    if isinstance(old, nn.Linear):
        first = nn.Linear(old.in_features, rank, bias=False)
        return first, nn.Linear(rank, old.out_features, bias=old.bias is not None)
    assert isinstance(old, nn.Conv2d)
    how = {"stride": old.stride, "padding": old.padding}
    thin = nn.Conv2d(old.in_channels, rank, 1, bias=False, **how)  # type: ignore[arg-type]
    return thin, nn.Conv2d(rank, old.out_channels, 1, bias=old.bias is not None)
