"""Networks that torch-pruning's rules follow in part: what cannot be told stays whole, and nothing fails."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, size_of
from torch import nn

from compress.measures import macs
from compress.models.coupled import UNFOLLOWED, find_coupled, without
from compress.models.structure import resize


def cut(module, sets, share):
    """The network without that share of every set's units, and with the same channels unread."""
    generator = torch.Generator().manual_seed(3)
    gone = {}
    for coupled in sets:
        units = torch.randperm(coupled.units, generator=generator)[: int(coupled.units * share)]
        for place, channels in coupled.places.items():
            gone.setdefault(place, set()).update(channels[units].flatten().tolist())
    kept = without(module, gone)
    resize(module, kept)
    return kept


@pytest.mark.parametrize("name", ["ghostnet", "shufflenet_v2", "mobilevit", "swin", "vit_timm", "densenet", "regnet_y"])
def test_a_cut_network_runs_and_one_channel_less_is_less(name):
    torch.manual_seed(0)
    size = size_of(name)
    module = NETWORKS[name](10).eval()
    before = macs(module, size)
    sets, whole = find_coupled(module, size)
    assert sets, whole
    for sentence in whole:
        assert "keeps all its channels" in sentence
    cut(module, sets, 0.5)
    assert module(torch.zeros(2, 3, size, size)).shape == (2, 10)
    assert macs(module, size) < before


class Shuffled(nn.Module):
    """Halves of its channels change places, which no rule of torch-pruning knows; a plain path beside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.mixed, self.plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.stack((x[:, 4:], x[:, :4]), 2).flatten(1, 2)
        x = torch.relu(self.mixed(x))
        return self.head(torch.relu(self.plain(x)).mean((2, 3)))


def test_what_a_rule_gets_wrong_stays_whole_and_the_rest_may_go():
    sets, whole = find_coupled(Shuffled().eval(), 8)
    producers = {name for coupled in sets for name in coupled.producers}
    assert "stem" not in producers
    assert {"mixed", "plain"} <= producers
    assert [sentence for sentence in whole if sentence.startswith("stem")] == [
        f"stem keeps all its channels: {UNFOLLOWED}"
    ]
