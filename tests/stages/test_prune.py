import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress.errors import ModelError
from compress.measures import layers, macs
from compress.models.mobilenet_v2 import MobileNetV2Settings, build_mobilenet_v2
from compress.models.structure import resize, select
from compress.product import Batch, KeptChannels, Network, Preprocess, Product, Run, Structure
from compress.pruning.evidence import root_mean_square_gradients
from compress.stages.prune import Prune

SIZE = 16


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 40, 3, padding=1), nn.PReLU(40), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(40 * 16, 48), nn.ReLU(), nn.Linear(48, 4)),
        )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(
            *(nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)),
        )
        self.last = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.classifier = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = torch.relu(features + self.inner(features))
        return self.classifier(self.last(features).mean((2, 3)))


class Separable(nn.Sequential):
    def __init__(self) -> None:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
            pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
            return [
                depthwise,
                nn.BatchNorm2d(inputs),
                nn.ReLU6(),
                pointwise,
                nn.BatchNorm2d(outputs),
                nn.ReLU6(),
            ]

        super().__init__(
            *(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU6()),
            *(*block(24, 48), *block(48, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)),
        )


class Branches(nn.Module):
    """Concatenation, a grouped and a transposed convolution, and a last convolution for a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 24, 3, padding=1)
        self.skip = nn.Conv2d(3, 40, 1)
        self.narrow, self.grouped = nn.Conv2d(40, 32, 1), nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(64, 24, 2, 2)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], dim=1) + self.skip(images)
        features = torch.relu(self.grouped(torch.relu(self.narrow(torch.relu(both)))))
        return self.head(torch.relu(self.up(features))).mean((2, 3))


def mobilenet() -> nn.Module:
    return build_mobilenet_v2(MobileNetV2Settings(use="mobilenet_v2", width=0.35), 4)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "separable": Separable,
    "branches": Branches,
    "mobilenet_v2": mobilenet,
}
SMALL = ["plain", "residual", "separable", "branches"]


class Images:
    """Noise with labels, in the shape of `compress.product.Data`."""

    labels = ("a", "b", "c", "d")
    fingerprint = ""
    channels_last = True
    task = "classification"
    scale = None
    label_weights = None

    def __init__(self, size: int) -> None:
        self.preprocess = Preprocess(size=size)
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(64, 3, size, size, generator=generator)
        self.classes = torch.arange(64) % 4

    def count(self, split: str) -> int:
        return len(self.images)

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Iterator[Batch]:
        assert split == "train", "only training images may shape the network"
        assert not _.get("augment") or "epoch" in _
        last = min(limit or 64, 64)
        for start in range(0, last - batch_size + 1, batch_size):
            yield Batch(self.images[start : start + batch_size], self.classes[start : start + batch_size])


@dataclass
class Notes:
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, kind: str, **facts: object) -> None:
        pass

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: None


def a_run(size: int = SIZE, seed: int = 0) -> Run:
    return Run(
        folder=Path(),
        data=Images(size),
        device=torch.device("cpu"),
        seed=seed,
        progress=Notes(),
        recipe_hash="",
    )


def built(name: str) -> nn.Module:
    """A network whose BatchNorm statistics, scales and shifts are not the trivial ones."""
    torch.manual_seed(5)
    module = FACTORIES[name]().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


def a_product(name: str) -> Product:
    return Product(Network(built(name), Structure(model={"use": name}, num_classes=4)))


def prune(product: Product, run: Run | None = None, **settings: Any) -> Product:
    settings = {"use": "prune", "goal": {"macs": 0.4}, "batchnorm_images": 0, **settings}
    return Prune.model_validate_json(json.dumps(settings)).apply(product, run or a_run())


def digest(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()


def zeroed(original: nn.Module, kept: dict[str, KeptChannels]) -> nn.Module:
    """The original with the removed channels giving zero: filters, biases, BatchNorm scales and shifts."""
    module = copy.deepcopy(original)
    for name, channels in kept.items():
        layer = module.get_submodule(name)
        if channels.outputs is None or isinstance(layer, nn.PReLU):
            continue
        with torch.no_grad():
            outputs = layer.weight
            if isinstance(layer, nn.ConvTranspose2d):
                outputs = layer.weight.transpose(0, 1)
            removed = [index for index in range(len(outputs)) if index not in channels.outputs]
            outputs[removed] = 0
            if layer.bias is not None:
                layer.bias[removed] = 0
    return module


def images(size: int = SIZE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "lamp", "fpgm", "fisher", "obd", "activation", "random"])
@pytest.mark.parametrize("name", FACTORIES)
def test_pruning_takes_channels_out_and_changes_nothing_else(name: str, criterion: str) -> None:
    product, size = a_product(name), 32 if name == "mobilenet_v2" else SIZE
    before = digest(product.network.module)
    pruned = prune(product, a_run(size), criterion={"use": criterion})
    original, kept = product.network.module, pruned.network.structure.kept
    assert kept

    # The product that entered is as it was, and is the parent of the one that left.
    assert digest(original) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in original.parameters())
    assert product.network.structure.kept == {}
    assert pruned.parent is product.network

    # The weights are the original's.
    state = pruned.network.module.state_dict()
    expected = select(original, kept)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)

    # The function is the original's with zeros in the removed channels.
    with torch.no_grad():
        outputs = pruned.network.module(images(size))
        torch.testing.assert_close(outputs, zeroed(original, kept)(images(size)), rtol=1e-4, atol=1e-5)
        assert not torch.equal(outputs, original(images(size)))

    # Factory, structure and state dict give the network back, bit for bit.
    torch.manual_seed(99)
    rebuilt = FACTORIES[name]().eval()
    resize(rebuilt, kept)
    rebuilt.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(images(size)), outputs)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("name", SMALL)
def test_widths_and_the_goal_are_held(name: str, round_to: int, scope: str) -> None:
    product = a_product(name)
    pruned = prune(product, round_to=round_to, scope=scope)
    wide = {layer["name"]: layer for layer in layers(product.network.module, SIZE)}
    for layer in layers(pruned.network.module, SIZE):
        before = wide[layer["name"]]["outputs"]
        assert layer["outputs"] == before or layer["outputs"] % round_to == 0
        assert layer["outputs"] >= 0.2 * before
        channels = pruned.network.structure.kept.get(layer["name"])
        if channels is not None:
            assert len(channels.outputs or range(before)) == layer["outputs"]
            assert len(channels.inputs or range(wide[layer["name"]]["inputs"])) == layer["inputs"]

    metrics = pruned.metrics
    assert metrics["macs_before"] == macs(product.network.module, SIZE)
    assert metrics["macs_after"] == macs(pruned.network.module, SIZE) <= 0.4 * metrics["macs_before"]
    assert metrics["reached"] == metrics["macs_after"] / metrics["macs_before"]
    assert metrics["reached"] > {1: 0.36, 4: 0.34, 8: 0.30}[round_to]


def test_mobilenet_reaches_the_goal_from_below() -> None:
    reached = prune(a_product("mobilenet_v2"), a_run(32), goal={"macs": 0.5}).metrics["reached"]
    assert 0.48 < reached <= 0.5


def test_local_takes_the_same_share_of_every_layer() -> None:
    pruned = prune(a_product("plain"), scope="local", round_to=1, goal={"macs": 0.5}).network.module
    shares = [pruned[0].out_channels / 32, pruned[3].out_channels / 40, pruned[7].out_features / 48]
    assert max(shares) - min(shares) < 0.05


def test_magnitude_takes_the_small_channels() -> None:
    product = a_product("plain")
    small = [1, 4, 5, 9, 11, 14, 20, 21, 30]
    with torch.no_grad():
        product.network.module[0].weight[small] = 0
        product.network.module[3].weight[:, small] = 0
    pruned = prune(product, goal={"macs": 0.7}, round_to=1, keep=["3", "7"])
    assert not set(small) & set(pruned.network.structure.kept["0"].outputs)


def test_taylor_takes_the_channels_that_the_loss_does_not_feel() -> None:
    """Wide filters that nothing reads: large in magnitude, without gradient."""
    product = a_product("plain")
    unread = [1, 4, 5, 9, 11, 14, 20, 21, 30]
    with torch.no_grad():
        product.network.module[0].weight[unread] *= 100
        product.network.module[3].weight[:, unread] = 0
    settings = {"goal": {"macs": 0.72}, "round_to": 1, "keep": ["3", "7"]}
    by_taylor = prune(product, criterion={"use": "taylor"}, **settings).network.structure.kept["0"].outputs
    by_magnitude = prune(product, criterion={"use": "magnitude"}, **settings).network.structure.kept["0"].outputs
    assert not set(unread) & set(by_taylor)
    assert set(unread) <= set(by_magnitude)


def test_gradients_are_root_mean_squares_over_mini_batches() -> None:
    """Against torch.func on the same two mini-batches; BatchNorm's statistics stay."""
    run, module = a_run(), built("separable")
    before = digest(module)
    weight = {"0.weight": module[0].weight.detach()}

    def loss(weight: dict[str, Tensor], batch: Batch) -> Tensor:
        logits = torch.func.functional_call(module, weight, (batch.images_NCHW,))
        return nn.functional.cross_entropy(logits, batch.labels_N)

    by_batch = [torch.func.grad(loss)(weight, batch)["0.weight"] for batch in run.data.batches("train", batch_size=32)]
    assert len(by_batch) == 2
    expected = ((by_batch[0] ** 2 + by_batch[1] ** 2) / 2).sqrt()
    torch.testing.assert_close(root_mean_square_gradients(module, run, 64, at_once=32)["0.weight"], expected)
    assert digest(module) == before


def test_taylor_needs_no_more_images_than_there_are() -> None:
    few = prune(a_product("residual"), criterion={"use": "taylor"}, images=32).network.structure.kept
    many = prune(a_product("residual"), criterion={"use": "taylor"}, images=5000).network.structure.kept
    assert few != many


def test_random_differs_by_seed_and_repeats_with_it() -> None:
    def kept(seed: int) -> dict[str, KeptChannels]:
        product = prune(a_product("residual"), a_run(seed=seed), criterion={"use": "random"})
        return product.network.structure.kept

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_limits_of_single_layers_replace_the_general_one() -> None:
    settings = {"goal": {"macs": 0.8}, "round_to": 1}
    free = prune(a_product("residual"), max_ratio=0.9, **settings).network.module
    held = prune(
        a_product("residual"),
        max_ratio=0.9,
        layer_ratios={"inner.*": 0.125, "re:inner\\.[01]": 0.5, "stem.0": 0.4},
        **settings,
    ).network.module
    assert free.inner[0].out_channels < 42
    assert held.inner[0].out_channels >= 42  # the smaller of the two that match
    assert held.stem[0].out_channels >= 28  # tied to inner.3 by the addition


def test_kept_layers_keep_their_outputs() -> None:
    pruned = prune(a_product("residual"), keep=["inner.0", "re:stem.*"], goal={"macs": 0.96}, round_to=1)
    module = pruned.network.module
    assert (module.inner[0].out_channels, module.stem[0].out_channels, module.inner[3].out_channels) == (
        48,
        32,
        32,
    )
    assert module.last[0].out_channels < 64


@pytest.mark.parametrize(
    "settings", [{"keep": ["iner.0"]}, {"layer_ratios": {"inner.0.conv": 0.5}}, {"keep": ["re:inner.9"]}]
)
def test_a_pattern_without_a_layer_lists_close_names(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"matches no convolution or linear layer; close: .*inner\.0"):
        prune(a_product("residual"), **settings)


def test_a_goal_out_of_reach_names_what_can_be_had() -> None:
    with pytest.raises(ModelError, match=r"out of reach.* (0\.\d+) of the multiply-adds remain") as caught:
        prune(a_product("residual"), goal={"macs": 0.05}, max_ratio=0.5)
    fraction = float(caught.value.problem.split("limits ")[1].split()[0])
    reached = prune(a_product("residual"), goal={"macs": fraction}, max_ratio=0.5).metrics["reached"]
    assert fraction - 0.001 < reached <= fraction


def test_steps_compose() -> None:
    product = a_product("residual")
    pruned = prune(product, steps=3, criterion={"use": "taylor"}, round_to=2)
    assert pruned.metrics["reached"] <= 0.4
    state, expected = (
        pruned.network.module.state_dict(),
        select(product.network.module, pruned.network.structure.kept),
    )
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_limits_are_of_the_network_that_enters_whatever_the_number_of_steps() -> None:
    module = prune(a_product("residual"), steps=4, round_to=1, max_ratio=0.45).network.module
    assert module.inner[0].out_channels >= 0.55 * 48
    assert module.stem[0].out_channels >= 0.55 * 32


@pytest.mark.parametrize("name", SMALL)
def test_pruning_twice_composes(name: str) -> None:
    product = a_product(name)
    once = prune(product, goal={"macs": 0.7}, round_to=4)
    twice = prune(once, goal={"macs": 0.6}, round_to=4)
    assert twice.parent is product.network
    assert macs(twice.network.module, SIZE) <= 0.6 * 0.7 * macs(product.network.module, SIZE)
    state, expected = (
        twice.network.module.state_dict(),
        select(product.network.module, twice.network.structure.kept),
    )
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("distill", [None, {"losses": [{"use": "kd"}]}])
def test_finetuning_after_each_step_trains_what_is_left(distill: dict[str, Any] | None) -> None:
    product = a_product("residual")
    before = digest(product.network.module)
    fit = {"epochs": 2, "batch_size": 16, "lr": 0.01, "augment": False}
    pruned = prune(product, steps=2, finetune=fit, distill=distill)
    assert digest(product.network.module) == before
    assert [(entry["step"], entry["epoch"]) for entry in pruned.metrics["history"]] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    rebuilt = Residual().eval()
    resize(rebuilt, pruned.network.structure.kept)
    rebuilt.load_state_dict(pruned.network.module.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(images()), pruned.network.module(images()))


def test_a_layer_that_cannot_be_sliced_keeps_its_channels_and_is_named() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    ).eval()
    run = a_run()
    pruned = prune(Product(Network(module, Structure(model={}, num_classes=4))), run, goal={"macs": 0.6})
    assert pruned.network.module[0].out_channels == 32
    assert run.progress.notes == ["0 keeps all its channels: 1 (GroupNorm) depends on them and cannot be pruned"]


def test_a_quantized_network_is_refused() -> None:
    product = a_product("plain")
    structure = product.network.structure.model_copy(update={"quantize": {}})
    with pytest.raises(ModelError, match="put prune before quantize"):
        prune(replace(product, network=Network(product.network.module, structure)))


@pytest.mark.parametrize(
    "settings",
    [
        {"goal": {"macs": 1.0}},
        {"goal": {"macs": 0.5, "fps": 30}},
        {"keep": ["re:("]},
        {"max_ratio": 1.0},
        {"layer_ratios": {"a": -0.1}},
        {"distill": {}},
    ],
)
def test_mistakes_of_the_recipe_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Prune.model_validate_json(json.dumps({"use": "prune", "goal": {"macs": 0.5}, **settings}))
