"""Zeros and shared values in weights, and that trainings keep them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.holding import held, hold, keeper
from compress.models.clusters import clustered
from compress.models.two_of_four import fits, mask


@pytest.mark.parametrize("shape", [(5, 8), (6, 12, 3, 3), (4, 4, 1, 1)])
def test_of_each_four_inputs_the_two_largest_stay(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stays = mask(weight)
    rows = weight.movedim(1, -1).reshape(-1, shape[1])
    for row, kept in zip(rows.tolist(), stays.movedim(1, -1).reshape(-1, shape[1]).tolist(), strict=True):
        for start in range(0, shape[1], 4):
            group = sorted(range(4), key=lambda i: -abs(row[start + i]))
            assert [i for i in range(4) if kept[start + i]] == sorted(group[:2])
    # No other choice of two keeps more.
    best = max(itertools.combinations(rows[0, :4].abs().tolist(), 2), key=sum)
    assert (weight * stays).movedim(1, -1).reshape(-1, shape[1])[0, :4].abs().sum() == pytest.approx(sum(best))


def test_equal_weights_lose_the_last_two():
    assert mask(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
    assert fits(nn.Conv2d(8, 3, 3))
    assert not fits(nn.Conv2d(8, 8, 3, groups=8))
    assert fits(nn.Conv2d(8, 8, 3, groups=2))
    assert not fits(nn.Conv2d(3, 8, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(2, 20))
def test_clusters_are_means_of_what_is_nearest_to_them(values, clusters):
    given_, found = torch.tensor(values), clustered(torch.tensor(values), clusters)
    centres = found.unique()
    assert len(centres) <= clusters
    if len(given_.unique()) <= clusters:
        assert torch.equal(found, given_)
        return
    scale = float(given_.abs().max()) + 1e-30
    for centre in centres:
        assert given_[found == centre].double().mean() == pytest.approx(float(centre), abs=1e-5 * scale)
    nearest = (given_[:, None] - centres).abs().min(1).values
    assert ((given_ - found).abs() <= nearest + 1e-5 * scale).all()


def test_more_clusters_are_nearer():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((clustered(values, clusters) - values).square().sum()) for clusters in (16, 32, 256)]
    assert errors == sorted(errors, reverse=True)
    evenly = torch.round((values - values.min()) / (values.max() - values.min()) * 15) / 15
    evenly = evenly * (values.max() - values.min()) + values.min()
    assert errors[0] < float((evenly - values).square().sum())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_after_each_step_zeros_are_zero_and_equal_weights_equal(optimizer):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    with torch.no_grad():
        for layer in module[0], module[2]:
            layer.weight.mul_(mask(layer.weight))
            hold(layer, ["zeros"])
        chosen = module[2].weight != 0
        module[2].weight[chosen] = clustered(module[2].weight[chosen], 16)
        hold(module[2], ["values"])
    assert held(module[2]) == ("zeros", "values")
    assert held(module[3]) == ()
    before = [layer.weight.detach().clone() for layer in (module[0], module[2], module[3])]
    _, codes = before[1].unique(return_inverse=True)
    put_back, steps = keeper(module), getattr(torch.optim, optimizer)(module.parameters(), 0.05, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        module(torch.randn(8, 16)).square().sum().backward()
        gradient, old = module[2].weight.grad.clone(), module[2].weight.detach().clone()
        steps.step()
        put_back()
    assert torch.equal(module[0].weight == 0, before[0] == 0)
    assert torch.equal(module[2].weight == 0, before[1] == 0)
    assert torch.equal(module[2].weight.unique(return_inverse=True)[1].unique(), codes.unique())
    for code in codes.unique():
        assert len(module[2].weight[codes == code].unique()) == 1
    assert all(
        not torch.equal(layer.weight, old) for layer, old in zip((module[0], module[2], module[3]), before, strict=True)
    )
    if optimizer == "SGD":  # a step along the mean of the cluster's gradients
        for code in codes.unique():
            same = (codes == code) & chosen
            if same.any():
                moved = old[same].double() * (1 - 0.05 * 0.1) - 0.05 * gradient[same].double().mean()
                torch.testing.assert_close(module[2].weight[same].double(), moved, rtol=1e-4, atol=1e-5)
