import pytest
import torch
from torch import nn

from compress.criteria.random import Random
from compress.errors import ModelError
from compress.measures import macs
from compress.models.structure import select
from compress.product import KeptChannels, Network
from compress.pruning import MacGoal, Pruning, prune_network, refuse_unreachable

SIZE = 16
FINE = Pruning(round_to=2, batchnorm_images=0)


def test_a_network_is_pruned_without_a_stage(product, run):
    network = product.network
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    pruned = prune_network(network, MacGoal(macs=0.5), FINE, run=run)
    assert 0.4 < macs(pruned.module, SIZE) / macs(network.module, SIZE) <= 0.5
    state, expected = pruned.module.state_dict(), select(network.module, pruned.structure.kept)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())
    assert network.structure.kept == {}


def test_after_each_step_comes_what_was_asked_for(product, run):
    seen = []

    def after(network: Network, step: int) -> nn.Module:
        seen.append((step, macs(network.module, SIZE), network.structure.kept))
        with torch.no_grad():
            network.module.head.bias.fill_(step)
        return network.module

    pruned = prune_network(
        product.network, MacGoal(macs=0.4), FINE.model_copy(update={"steps": 3}), run=run, after=after
    )
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert seen[2][2] == pruned.structure.kept
    assert (pruned.module.head.bias == 3).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_pruning_around_a_narrower_network_keeps_its_channels(product, run, steps):
    drawn = Pruning(criterion=Random(use="random"), round_to=2, batchnorm_images=0)
    narrow = prune_network(product.network, MacGoal(macs=0.3), drawn, run=run).structure.kept
    pruning = FINE.model_copy(update={"steps": steps})
    around = prune_network(product.network, MacGoal(macs=0.5), pruning, run=run, around=narrow).structure.kept
    free = prune_network(product.network, MacGoal(macs=0.5), pruning, run=run).structure.kept

    def held(wide: dict[str, KeptChannels]) -> list[bool]:
        both = [(channels.outputs, narrow[name].outputs) for name, channels in wide.items() if channels.outputs]
        return [set(few) <= set(many) for many, few in both]

    assert len(held(around)) > 2
    assert all(held(around))
    assert not all(held(free))


def test_channels_are_named_as_the_factory_made_them(product, run):
    """Around a network, starting from one that is pruned already."""
    once = prune_network(product.network, MacGoal(macs=0.7), FINE, run=run)
    wanted = once.structure.kept["down"].outputs[::3]
    twice = prune_network(
        once, MacGoal(macs=0.5), FINE, run=run, around={**once.structure.kept, "down": KeptChannels(outputs=wanted)}
    )
    assert set(wanted) <= set(twice.structure.kept["down"].outputs) < set(once.structure.kept["down"].outputs)


def test_mistakes_name_their_place(product, run):
    with pytest.raises(ModelError, match=r"here: `goal: \{macs: 0.01\}` is out of reach"):
        refuse_unreachable(product.network.module, MacGoal(macs=0.01), size=SIZE, place="here")
    keep = FINE.model_copy(update={"keep": ("x",)})
    with pytest.raises(ModelError, match="here: `keep: x` matches no"):
        prune_network(product.network, MacGoal(macs=0.5), keep, run=run, place="here")
    quantized = product.network.structure.model_copy(update={"quantize": {}})
    with pytest.raises(ModelError, match="here: the network is already quantized"):
        prune_network(Network(product.network.module, quantized), MacGoal(macs=0.5), run=run, place="here")
