"""The losses on maps as the training uses them: which layers `auto` takes, and a step with a pruned network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, size_of
from pydantic import ValidationError
from torch import Tensor, nn

from compress.errors import ModelError
from compress.losses.lesson import Lesson
from compress.losses.self_attention import SelfAttention
from compress.observation import before_activations
from compress.product import Batch, Network, Preprocess, Product, Run, Structure
from compress.pruning import MacGoal, Pruning, prune_network
from compress.stages.quantize import Quantize
from compress.teaching import Distillation, objective

ON_LAYERS = ["fitnets", "attention", "nst", "similarity", "fsp", "cwd", "activation_boundary", "self_attention"]
ON_PIXELS = ["attention_gradient", "gradient_symmetry"]


class Inverted(nn.Module):
    """Two stages of a convolution, an in-place ReLU6 and a linear bottleneck: what MobileNetV2 is made of."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.wide1, self.norm1 = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.narrow1 = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.wide2, self.norm2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.narrow2 = nn.Sequential(nn.Conv2d(16, 10, 1, bias=False), nn.BatchNorm2d(10))
        self.relu1, self.relu2 = nn.ReLU6(inplace=True), nn.ReLU6(inplace=True)
        self.head = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow1(self.relu1(self.norm1(self.wide1(x))))
        x = self.narrow2(self.relu2(self.norm2(self.wide2(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def pruned(run: Run) -> Product:
    torch.manual_seed(0)
    structure = Structure(model={"use": "none"}, num_classes=5, preprocess=run.data.preprocess)
    whole = Network(Inverted().eval(), structure)
    narrow = prune_network(whole, MacGoal(macs=0.5), Pruning(round_to=2, batchnorm_images=0), run=run)
    assert narrow.module.norm2.num_features < 16
    return Product(narrow, parent=whole)


@pytest.fixture
def batch(run: Run) -> Batch:
    return next(iter(run.data.batches("train", batch_size=8)))


@pytest.mark.parametrize(
    "settings",
    [{"use": use} for use in ON_LAYERS + ON_PIXELS] + [{"use": use, "adaptor": "linear"} for use in ON_LAYERS[:-1]],
)
def test_a_pruned_network_learns_from_each(pruned, run, batch, settings):
    use = settings["use"]
    goal = objective(Distillation(labels=0.0, losses=(settings,)), pruned, run, student=pruned.network.module)
    student = pruned.network.module.train()
    loss = goal.loss(student, batch)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.wide1.weight.grad.abs().sum() > 0
    assert (goal.companion is not None) == ("adaptor" in settings)
    if use in ON_LAYERS:
        ends = {"activation_boundary": ("norm1", "norm2"), "similarity": ("narrow2",)}.get(use, ("narrow1", "narrow2"))
        assert goal.layers == ends
        between = use in ("fsp", "self_attention")
        assert tuple(goal.layer_losses()[use]) == (("narrow1 to narrow2",) if between else ends)


@pytest.mark.parametrize("use", ["fsp", "self_attention"])
def test_layer_weights_are_of_pairs(pruned, run, batch, use):
    student = pruned.network.module
    values = []
    for factor in (1.0, 3.0):
        settings = Distillation(labels=0.0, losses=({"use": use, "layer_weights": (factor,)},))
        values.append(objective(settings, pruned, run, student=student).loss(student, batch).item())
    assert values[1] == pytest.approx(3 * values[0])
    before = replace(pruned, layer_losses={use: {"narrow1 to narrow2": 0.7}})
    carried = Distillation(labels=0.0, losses=({"use": use, "layer_weights": "carried"},))
    assert objective(carried, before, run, student=student).loss(student, batch).item() == pytest.approx(values[0])
    wrong = Distillation(losses=({"use": use, "layer_weights": (1.0, 1.0)},))
    with pytest.raises(ModelError, match="2 layer_weights for 1 pairs of layers; they are narrow1 to narrow2"):
        objective(wrong, pruned, run, student=student)


@pytest.mark.parametrize("use", ON_PIXELS)
def test_rounding_cannot_be_differentiated_twice(pruned, run, use):
    prepared = Quantize(use="quantize", epochs=0, calibration_images=8).apply(pruned, run)
    with pytest.raises(ModelError, match=f"losses.0 .{use}.*differentiates twice"):
        objective(Distillation(losses=({"use": use},)), prepared, run, student=prepared.network.module)


@pytest.mark.parametrize("asked", [{"adaptor": "linear"}, {"adaptor": "kept"}, {"layers": {"a": "b"}}])
def test_self_attention_compares_the_student_with_itself(asked):
    with pytest.raises(ValidationError, match="compares the student with itself"):
        SelfAttention(use="self_attention", **asked)


def test_self_attention_never_asks_the_teacher(pruned, run, batch):
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]
    logits = torch.zeros(2, 5)
    for teacher_maps in ([], [torch.full((1,), torch.nan)] * 2):
        given = Lesson(logits, logits, logits.argmax(1), student_maps=maps, teacher_maps=teacher_maps)
        assert SelfAttention(use="self_attention")(given).isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Heo et al. take features 4, 7, 14 and 18 of MobileNetV2, and the BatchNorm in front of a ReLU of ResNets.
        ("mobilenet_v2", [f"features.{n}.1" for n in ("2.conv.0", "4.conv.0", "7.conv.0", "14.conv.0", "18")]),
        ("resnet18", ["bn1", "layer1.1.bn1", "layer2.1.bn1", "layer3.1.bn1", "layer4.1.bn1"]),
        ("vgg_bn", ["features.1", "features.5", "features.12"]),
    ],
)
def test_layers_before_activations(name, expected):
    assert before_activations(NETWORKS[name](10), size_of(name)) == expected


def test_a_sum_with_a_shortcut_is_no_layer_before_an_activation():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(torch.relu(self.first(x)))
            y += x
            return torch.relu(y)

    assert before_activations(Block(), Preprocess(size=8).size) == ["first"]
    with pytest.raises(ModelError, match="no layer in front of an activation"):
        before_activations(nn.Sequential(nn.Conv2d(3, 3, 1)), 8)
