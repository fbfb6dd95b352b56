"""Residual blocks that can be taken out whole, found by computing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, images_of, settle, size_of
from torch import nn

from compress import checkpoint
from compress.errors import ModelError
from compress.losses.weights import Weights
from compress.measures import macs
from compress.models.blocks import drop, dropped_from, find_blocks
from compress.models.structure import within
from compress.product import KeptChannels, Network, Preprocess, Product, Structure
from compress.pruning import MacGoal, Pruning, prune_network
from compress.schemes.netaug import augment
from compress.teachers.teacher import Frozen
from compress.teaching.default import default_losses, soft_loss

FOUND = {
    "resnet18": ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"],
    "resnext50": ["layer2.1"],
    "mobilenet_v3_small": [f"features.{number}" for number in (3, 5, 6, 7, 8, 10, 11)],
    "efficientnet_lite": ["features.4.1", "features.5.1", "features.6.1"],
    "vit": ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
    "vit_timm": ["blocks.0", "blocks.1"],
    "convnext": ["features.1.0", "features.3.0"],
    "densenet": [],
    "vgg_bn": [],
    "shufflenet_v2": [],
    "unet_nearest": [],
}


def network(name: str, num_classes: int = 5) -> Network:
    torch.manual_seed(0)
    size = size_of(name)
    module = settle(NETWORKS[name](num_classes), images_of(8, size)).eval()
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    return Network(module, Structure(model={"use": f"networks:{name}"}, num_classes=num_classes, preprocess=preprocess))


def without(given: Network, names: list[str]) -> Network:
    module = copy.deepcopy(given.module)
    drop(module, names)
    return Network(module, dropped_from(given.structure, names))


@pytest.mark.parametrize("name", FOUND)
def test_a_network_without_its_blocks_answers_as_if_they_returned_their_input(name):
    given = network(name)
    before = {key: tensor.clone() for key, tensor in given.module.state_dict().items()}
    blocks = find_blocks(given.module, size_of(name))
    assert [block.name for block in blocks] == FOUND[name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.module.state_dict().items())
    images = images_of(2, size_of(name))
    for block in blocks:
        assert block.layers
        assert all(layer.startswith(f"{block.name}.") for layer in block.layers)
    names = [block.name for block in blocks][::2]
    found = without(given, names).module(images)
    for block in names:
        given.module.get_submodule(block).register_forward_hook(lambda _, inputs, __: inputs[0])
    torch.testing.assert_close(found, given.module(images))


class Branch(nn.Module):
    """Around one convolution, what a block may be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.stride = 1

    def forward(self, x):
        y = self.norm(self.conv(x))
        match self.kind:
            case "sum":
                return x + y
            case "scaled sum":
                return x + self.scale * y
            case "sum behind ReLU":
                return torch.relu(x + y)
            case "no sum":
                return torch.relu(y)
            case "gate":
                return x * torch.sigmoid(y)
            case "two of it":
                return x + x + y
            case "norm behind":
                return torch.nn.functional.layer_norm(x + y, x.shape[1:])
            case "in place":
                return torch.relu_(x) + y
        raise AssertionError(self.kind)


class Chain(nn.Module):
    def __init__(self, block: nn.Module, behind_relu: bool = True, calls: int = 1, asks: str = "") -> None:
        super().__init__()
        self.stem, self.head, self.block = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), block
        self.behind_relu, self.calls, self.asks = behind_relu, calls, asks

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x) if self.behind_relu else x
        if self.asks:
            x = x * getattr(self.block, self.asks)
        for _ in range(self.calls):
            x = self.block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "behind_relu", "droppable"),
    [
        ("sum", True, True),
        ("sum", False, True),
        ("scaled sum", False, True),
        ("sum behind ReLU", True, True),
        ("sum behind ReLU", False, False),
        ("no sum", True, False),
        ("gate", True, False),
        ("two of it", True, False),
        ("norm behind", True, False),
        ("in place", False, False),
        ("in place", True, True),
    ],
)
def test_what_a_block_is_is_found_by_computing(kind, behind_relu, droppable):
    torch.manual_seed(0)
    found = find_blocks(Chain(Branch(kind), behind_relu).eval(), 10)
    assert [block.name for block in found] == (["block"] if droppable else [])
    assert not found or found[0].layers == ("block.conv", "block.norm")


def test_a_block_that_runs_twice_or_is_asked_for_more_than_its_answer_stays():
    torch.manual_seed(0)
    assert find_blocks(Chain(Branch("sum")).eval(), 10)
    assert not find_blocks(Chain(Branch("sum"), calls=2).eval(), 10)
    assert not find_blocks(Chain(Branch("sum"), asks="stride").eval(), 10)
    shared = Branch("sum")  # both of its places go together
    assert [block.name for block in find_blocks(Chain(nn.Sequential(shared, shared)).eval(), 10)] == ["block"]


def test_of_nested_blocks_the_innermost_are_taken():
    torch.manual_seed(0)
    nested = nn.Sequential(Branch("sum"), Branch("sum"))
    assert [block.name for block in find_blocks(Chain(nested).eval(), 10)] == ["block.0", "block.1"]


def test_a_name_that_is_no_block_is_refused():
    with pytest.raises(ModelError, match=r"layer1\.7: the network has no such block; close: layer1"):
        drop(network("resnet18").module, ["layer1.7"])


def test_what_is_said_of_a_block_s_layers_goes_with_it():
    kept = {name: KeptChannels(outputs=(0,)) for name in ("a.0.conv", "a.0.conv2", "a.01", "b")}
    structure = Structure(model={}, num_classes=2, kept=kept, dropped=("a.0.inner",))
    found = dropped_from(structure, ["a.0"])
    assert found.dropped == ("a.0",)
    assert {*found.kept} == {"a.01", "b"}
    assert dropped_from(found, ["b"]).dropped == ("a.0", "b")


def test_a_structure_that_dropped_nothing_is_written_as_before():
    structure = Structure(model={"use": "x"}, num_classes=2)
    assert "dropped" not in json.loads(structure.model_dump_json())
    assert Structure.model_validate_json(structure.model_dump_json()) == structure
    dropped = dropped_from(structure, ["a"])
    assert Structure.model_validate_json(dropped.model_dump_json()) == dropped


def test_pruned_before_and_after_a_network_without_blocks_comes_back_bit_for_bit(run, tmp_path):
    """Channels, then blocks, then channels again; loaded by the factory, the structure and safetensors alone."""
    given = network("mobilenet_v3_small")
    sized = replace(run, data=type("Sized", (), {"preprocess": given.structure.preprocess})())
    pruning = Pruning(round_to=2, batchnorm_images=0)
    first = prune_network(given, MacGoal(macs=0.8), pruning, run=sized)
    blocks = [block.name for block in find_blocks(first.module, given.structure.preprocess.size)]
    assert blocks == FOUND["mobilenet_v3_small"]
    second = without(first, blocks[1:3])
    size = given.structure.preprocess.size
    assert macs(second.module, size) < macs(first.module, size)
    third = prune_network(second, MacGoal(macs=0.8), pruning, run=sized)
    assert third.structure.dropped == tuple(blocks[1:3])
    gone = [name for name in third.structure.kept if name.startswith(tuple(f"{block}." for block in blocks[1:3]))]
    assert gone == []
    checkpoint.save(third, tmp_path / "network")
    loaded = checkpoint.load(tmp_path / "network")
    assert loaded.structure == third.structure
    images = images_of(3, size)
    with torch.no_grad():
        assert torch.equal(loaded.module(images), third.module(images))
    again = find_blocks(third.module, size)
    assert [block.name for block in again] == [name for name in blocks if name not in third.structure.dropped]


def test_a_student_without_blocks_learns_hints_and_weights_from_its_parent(run):
    """Maps behind a dropped block are of the same channels as the parent's, and its weights are the parent's."""
    parent = network("resnet18")
    size = parent.structure.preprocess.size
    sized = replace(run, data=type("Sized", (), {"preprocess": parent.structure.preprocess})())
    student = without(parent, ["layer1.1", "layer3.1"])
    student = prune_network(student, MacGoal(macs=0.7), Pruning(round_to=2, batchnorm_images=0), run=sized)
    teacher = Frozen(parent, run, related=True)
    _, hints = default_losses(student, teacher, soft_loss("classification"))
    # The last map of each stage, behind what was dropped, too.
    assert {"layer1", "layer2", "layer3", "layer4"} <= {*hints.layers}
    assert len(default_losses(without(parent, ["layer1.1"]), teacher, soft_loss("classification"))) == 2
    assert len(default_losses(parent, teacher, soft_loss("classification"))) == 1

    step = within(student.structure.kept, {}, student.structure.dropped)
    assert step == student.structure.kept
    loss = Weights(use="weights", adaptor="kept")
    pairs = loss._pairs(student.module, parent.module, step)
    assert not [name for name in pairs if name.startswith(("layer1.1", "layer3.1"))]
    assert macs(student.module, size) <= 0.7 * macs(without(parent, ["layer1.1", "layer3.1"]).module, size)


def test_netaug_widens_a_student_that_lost_blocks(run):
    parent = network("resnet18")
    size = parent.structure.preprocess.size
    sized = replace(run, data=type("Sized", (), {"preprocess": parent.structure.preprocess})())
    student = without(parent, ["layer1.1"])
    student = prune_network(student, MacGoal(macs=0.6), Pruning(round_to=2, batchnorm_images=0), run=sized)
    augmented = augment(Product(student, parent=parent), size)
    images = images_of(2, size)
    whole = augmented(student.module, images, [1.0] * len(augmented.extras)).logits_NK
    torch.testing.assert_close(whole, without(parent, ["layer1.1"]).module(images), rtol=1e-4, atol=1e-4)


def test_within_asks_nothing_of_what_was_dropped():
    teacher = {"a.conv": KeptChannels(outputs=(0, 1)), "b": KeptChannels(outputs=(1, 2))}
    student = {"b": KeptChannels(outputs=(2,))}
    assert within(student, teacher) is None
    assert within(student, teacher, ("a",)) == {"b": KeptChannels(outputs=(1,))}
