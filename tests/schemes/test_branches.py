import math

import networks
import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn

from compress.errors import ModelError
from compress.observation import observe, stage_ends
from compress.product import Preprocess
from compress.schemes.branches import copies_of, pooled, ramp, split, tail_after, with_features


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2", "squeezenet", "densenet", "ghostnet", "swin"])
def test_the_tail_takes_the_map_to_the_same_logits(name):
    size = networks.size_of(name)
    module = networks.settle(networks.NETWORKS[name](10), networks.images_of(8, size))
    cut, tail = split(module, "auto", Preprocess(size=size))
    images = networks.images_of(3, size, seed=1)
    with torch.no_grad():
        said = observe(module, images, (cut,))
        torch.testing.assert_close(tail(said.maps[cut]), said.logits_NK)
    assert said.logits_NK.std() > 0.1
    behind = {name for name, _ in tail.named_parameters()}
    assert 0 < len(behind) < len(list(module.parameters()))
    assert behind < {name for name, _ in module.named_parameters()}


def test_a_tail_is_a_copy_and_leaves_what_it_reads_as_it_is():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.relu, self.head = nn.Linear(12, 4), nn.ReLU(inplace=True), nn.Linear(4, 5)

        def forward(self, x):
            x = self.relu(self.first(x.flatten(1)))
            x += 1
            return self.head(x)

    module = InPlace().eval()
    tail = tail_after(module, "first")
    images = torch.randn(6, 3, 2, 2)
    with torch.no_grad():
        said = observe(module, images, ("first",))
        shared = said.maps["first"].clone()
        assert shared.min() < 0
        torch.testing.assert_close(tail(said.maps["first"]), said.logits_NK)
        torch.testing.assert_close(tail(said.maps["first"]), said.logits_NK)
        assert torch.equal(said.maps["first"], shared)
        tail.head.weight.zero_()
    assert module.head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("relu", r"layer relu: `after` runs more than once; some are "),
        ("dwon", r"layer dwon: `after` is no layer that the network's graph runs; some are .*down"),
        ("point", r"layer point: the network cannot be cut here: other values pass by this layer \(.*\)"),
        ("depthwise", r"layer depthwise: the network cannot be cut here"),
        ("head", r"layer head: no layer with parameters is behind it; name an earlier layer"),
    ],
)
def test_a_layer_where_the_network_cannot_be_cut_is_refused_by_name(after, message):
    with pytest.raises(ModelError, match=message):
        tail_after(SmallNet(), after)


def test_auto_goes_back_to_a_stage_end_where_the_network_can_be_cut():
    module = networks.unet_nearest().eval()
    with pytest.raises(ModelError, match="cannot be cut here"):
        tail_after(module, stage_ends(module, 32)[-2])
    cut, tail = split(module, "auto", Preprocess(size=32))
    images = torch.randn(2, 3, 32, 32)
    said = observe(module, images, (cut,))
    torch.testing.assert_close(tail(said.maps[cut]), said.logits_NK)


def test_a_network_without_a_place_to_cut_is_refused():
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    with pytest.raises(ModelError, match="cannot be traced as one graph"):
        tail_after(Branching(), "down")
    with pytest.raises(ModelError, match="the network cannot be cut here"):
        split(networks.convnext(), "auto", Preprocess(size=32))
    with pytest.raises(ModelError, match="`auto` found no layer that returns maps but the first"):
        split(networks.vit(), "auto", Preprocess(size=32))


def test_features_are_what_the_last_layer_reads():
    module = randomized(SmallNet())
    tail = with_features(tail_after(module, "down"))
    map_NCHW = torch.randn(4, 24, 4, 4)
    with torch.no_grad():
        features, logits_NK = tail(map_NCHW)
        torch.testing.assert_close(module.head(features), logits_NK)
        torch.testing.assert_close(tail_after(module, "down")(map_NCHW), logits_NK)
    assert features.shape == (4, 96)
    assert {name for name, _ in tail.named_parameters()} == {"head.weight", "head.bias"}


def test_copies_differ_by_noise_in_units_of_each_weight():
    tail = tail_after(randomized(SmallNet()), "stem_bn")
    first, second = copies_of(tail, 2, noise=0.5, generator=torch.Generator().manual_seed(0))
    for (name, weight), one, two in zip(tail.named_parameters(), first.parameters(), second.parameters(), strict=True):
        if weight.ndim == 1:
            assert torch.equal(weight, one)
            continue
        change = ((one - weight).std() / weight.std()).item()
        assert change == pytest.approx(0.5, rel=0.2), name
        assert not torch.allclose(one, two)
    assert first.training
    assert first.head.weight.requires_grad
    (same,) = copies_of(tail, 1, noise=0.0, generator=torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(tail.parameters(), same.parameters(), strict=True))


def test_pooling_is_over_everything_but_images_and_channels():
    values = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(values), values.flatten(2).mean(2))
    tokens = torch.randn(2, 7, 3)
    torch.testing.assert_close(pooled(tokens), tokens.sum(1) / 7)
    assert torch.equal(pooled(tokens[:, 0]), tokens[:, 0])


def test_the_ramp_ends_at_one():
    assert ramp(0.0, 0.27) == pytest.approx(math.exp(-5))
    assert ramp(0.135, 0.27) == pytest.approx(math.exp(-5 / 4))
    assert ramp(0.27, 0.27) == ramp(0.9, 0.27) == ramp(0.0, 0.0) == 1.0
