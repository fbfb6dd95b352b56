"""Which channels a pruned network kept, told by what its layers return."""

import copy

import pytest
import torch
from networks import NETWORKS, images_of, settle, size_of
from torch import nn

from compress.models.blocks import drop, dropped_from
from compress.models.structure import resize, sizes
from compress.observation import observe, stage_ends
from compress.product import KeptChannels, Network, Preprocess, Structure
from compress.pruning import MacGoal, Pruning, prune_network
from compress.teaching.alignment import channels, kept


def silenced(original: nn.Module, removed: dict[str, KeptChannels]) -> nn.Module:
    """The original network, computing zero in each channel that was taken out."""
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for name, layer in copied.named_modules():
            if name not in removed or removed[name].outputs is None:
                continue
            gone = torch.ones(sizes(name, layer)[0], dtype=torch.bool)
            gone[list(removed[name].outputs)] = False
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter[gone] = 0
    return copied


@pytest.fixture
def pruned(run):
    def prune(name: str, dropped: list[str] | None = None) -> tuple[Network, Network, torch.Tensor]:
        size = size_of(name)
        images = images_of(8, size)
        module = settle(NETWORKS[name](10), images).eval()
        preprocess = Preprocess(size=size)
        network = Network(module, Structure(model={"use": name}, num_classes=10, preprocess=preprocess))

        class Sized:
            preprocess = network.structure.preprocess

        from dataclasses import replace

        shallow = copy.deepcopy(module)
        drop(shallow, dropped or [])
        shallow = Network(shallow, dropped_from(network.structure, dropped or []))
        pruning = Pruning(round_to=2, batchnorm_images=0)
        return network, prune_network(shallow, MacGoal(macs=0.6), pruning, run=replace(run, data=Sized())), images

    return prune


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("resnet18", []),
        ("resnet18", ["layer1.1", "layer1.0", "layer3.1"]),
        ("mobilenet_v2", []),
        ("mobilenet_v2", ["features.5", "features.13"]),
        ("densenet", []),
        ("googlenet", []),
        ("regnet_x", []),
        ("vgg_bn", []),
        ("efficientnet_lite", []),
        ("mobilenet_v3_small", []),
    ],
)
def test_the_kept_slice_is_what_the_original_computes_without_the_other_channels(pruned, name, dropped):
    original, student, images = pruned(name, dropped)
    layers = stage_ends(student.module, images.shape[-1])
    here, there = channels(student, layers), channels(original, layers)
    whole = silenced(original.module, student.structure.kept)
    for block in dropped:
        whole.get_submodule(block).register_forward_hook(lambda _, inputs, __: inputs[0])
    with torch.no_grad():
        mine, theirs = observe(student.module, images, layers), observe(whole, images, layers)
    narrower = 0
    for layer in layers:
        index = kept(here[layer], there[layer])
        assert index is not None, layer
        torch.testing.assert_close(mine.maps[layer], theirs.maps[layer][:, index], rtol=1e-3, atol=1e-4)
        narrower += len(index) < theirs.maps[layer].shape[1]
    assert narrower, "nothing was pruned at these layers"


def test_a_student_of_another_pruned_network_is_aligned_where_that_one_has_its_channels(pruned, run):
    original, assistant, _ = pruned("vgg_bn")
    layer = stage_ends(assistant.module, 32)[2]
    of_assistant, of_original = channels(assistant, [layer])[layer], channels(original, [layer])[layer]
    index = kept(of_assistant, of_original)
    assert kept(of_original, of_assistant) is None
    assert [of_original[i] for i in index] == list(of_assistant)


def test_channels_that_cannot_be_followed_are_unknown():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, 8, 1), nn.Identity()

        def forward(self, x):
            y = self.conv(x)
            n, c, h, w = y.shape
            return self.after(y.reshape(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w)).mean((2, 3))

    structure = Structure(model={}, num_classes=8, preprocess=Preprocess(size=8))
    assert channels(Network(Shuffled().eval(), structure), ["after", "conv"])["after"] is None


def test_resized_networks_name_channels_by_their_factory():
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(256, 2)
    )
    chosen = {"0": KeptChannels(outputs=(1, 4, 5)), "2": KeptChannels(inputs=(1, 4, 5))}
    structure = Structure(model={}, num_classes=2, preprocess=Preprocess(size=8), kept=chosen)
    original = Network(copy.deepcopy(module), structure.model_copy(update={"kept": {}}))
    resize(module, chosen)
    of_student = channels(Network(module, structure), ["1"])["1"]
    assert of_student == (("0", 1), ("0", 4), ("0", 5))
    assert kept(of_student, channels(original, ["1"])["1"]).tolist() == [1, 4, 5]
