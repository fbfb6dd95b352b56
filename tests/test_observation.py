import copy

import pytest
import torch
from networks import NETWORKS, images_of, settle, size_of
from torch import nn

from compress.errors import ModelError
from compress.observation import observable, observe, stage_ends
from compress.product import Batch, Preprocess
from compress.quantization import Quantization, calibrate, fold_batchnorm, prepare


def settled(name: str) -> tuple[nn.Module, torch.Tensor]:
    images = images_of(8, size_of(name))
    return settle(NETWORKS[name](10), images).eval(), images


def direction(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features.18"]),
        ("regnet_y", ["stem", "trunk_output.0", "trunk_output.1", "trunk_output.2", "trunk_output.3"]),
    ],
)
def test_stages_end_where_people_say_they_do(name, ends):
    """After the published tables of the three architectures."""
    module, images = settled(name)
    assert stage_ends(module, images.shape[-1]) == ends


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "efficientnet_lite", "densenet", "vgg_bn", "unet_nearest"]
)
def test_layers_are_the_same_in_every_form_of_a_network(name):
    """By their values: float with BatchNorm, folded, and with fake quantization, which rounds."""
    module, images = settled(name)
    ends = stage_ends(module, images.shape[-1])
    prepared = prepare(module, Quantization(), Preprocess(size=images.shape[-1]))
    calibrate(prepared, [Batch(images, torch.zeros(8, dtype=torch.int64))], torch.device("cpu"))
    with torch.no_grad():
        plain = observe(module, images, ends)
        torch.testing.assert_close(plain.logits_NK, module(images), rtol=0, atol=0)
        folded = fold_batchnorm(module)
        for end in ends:
            if end in observable(folded):  # a sum is a function, and cannot be watched in a folded network
                assert direction(plain.maps[end], observe(folded, images, [end]).maps[end]) > 0.99999
        rounded = observe(prepared.eval(), images, ends)
        torch.testing.assert_close(rounded.logits_NK, prepared(images), rtol=0, atol=0)
        first = ends[0]
        assert direction(plain.maps[first], rounded.maps[first]) > 0.98
        for end in ends:
            assert rounded.maps[end].shape == plain.maps[end].shape


def test_values_before_an_inplace_relu_are_those_before_it():
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    module = nn.Sequential(*layers)
    images = images_of(4, 8)
    before = observe(module, images, ["1"]).maps["1"]
    torch.testing.assert_close(before, module[1](module[0](images)))
    assert (before < 0).any()
    loss = before.square().mean()
    loss.backward()
    assert module[0].weight.grad.abs().sum() > 0


def test_the_patches_of_a_transformer_are_no_stage():
    module, images = settled("vit")
    with pytest.raises(ModelError, match="`auto` found no layer that returns maps but the first, conv_proj"):
        stage_ends(module, images.shape[-1])


def test_maps_with_channels_last_are_not_taken_for_others():
    """A Swin transformer's are (N, H, W, C)."""
    module, images = settled("swin")
    ends = stage_ends(module, images.shape[-1])
    with torch.no_grad():
        maps = observe(module, images, ends).maps
    channels = {
        module.get_submodule(end).out_channels for end in ends if hasattr(module.get_submodule(end), "out_channels")
    }
    assert {values.shape[1] for values in maps.values()} >= channels
    assert not any(end.endswith("norm") for end in ends)


def test_gradients_of_losses_come_in_the_order_of_the_map():
    """mse_loss returns its gradient in the order of the axes; a BatchNorm takes twice as long with it."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    orders, gradients = [], {}
    for memory in (torch.channels_last, torch.contiguous_format):
        module = copy.deepcopy(layers).to(memory_format=memory)
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=memory)
        answers = observe(module, images, ["1"])
        answers.maps["1"].register_hook(lambda gradient: orders.append(gradient.stride()))
        loss = answers.logits_NK.square().mean() + nn.functional.mse_loss(answers.maps["1"], torch.zeros(2, 4, 6, 6))
        loss.backward()
        gradients[memory] = module[0].weight.grad
    assert orders == [(144, 1, 24, 4), (144, 36, 6, 1)]
    torch.testing.assert_close(*gradients.values())


def test_nothing_stays_behind_after_a_pass():
    module, images = settled("resnet18")
    observe(module, images, ["layer1", "layer2"])
    with pytest.raises(ModelError, match="layer nowhere: cannot be observed here"):
        observe(module, images, ["layer1", "nowhere"])
    assert not any(child._forward_hooks for child in module.modules())


def test_layers_that_cannot_be_told_are_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.idle, self.pair = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Pair()

        def forward(self, x):
            return self.pair(self.conv(self.conv(x)))[0].mean((2, 3))

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    images = images_of(2, 8)
    for name, said in (("conv", "runs twice"), ("idle", "does not run"), ("pair", "returns tuple")):
        with pytest.raises(ModelError, match=f"layer {name}: {said}"):
            observe(Twice(), images, [name])
