import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.attention import attention_transfer
from compress.losses.kd import soft_targets
from compress.product import NO_LABEL, Batch, Network, Preprocess, Product, Run
from compress.pruning import MacGoal, Pruning, prune_network
from compress.quantization import Quantization, prepare
from compress.stages.distill import Distill
from compress.stages.quantize import Quantize
from compress.teachers.teacher import Frozen
from compress.teaching import Distillation, objective


def distillation(**values: Any) -> Distillation:
    return Distillation(**values)


def distill(**values: Any) -> Distill:
    return Distill(**{"use": "distill", "epochs": 2, "batch_size": 16, "lr": 0.02, **values})


@pytest.fixture
def batch(run: Run) -> Batch:
    return next(iter(run.data.batches("train", batch_size=16)))


@pytest.fixture
def taught(product: Product) -> Product:
    return replace(product, parent=Network(randomized(SmallNet(), seed=9), product.network.structure))


@pytest.fixture
def pruned(product: Product, run: Run) -> Product:
    narrow = prune_network(product.network, MacGoal(macs=0.6), Pruning(round_to=2, batchnorm_images=0), run=run)
    return replace(product, network=narrow, parent=product.network)


def test_the_sum_of_weighted_losses(taught, run, batch):
    settings = distillation(
        labels=0.3,
        losses=({"use": "kd", "temperature": 2.0, "weight": 0.5}, {"use": "attention", "layers": ("stem", "down")}),
    )
    student, teacher = taught.network.module, taught.original.module
    x = batch.images_NCHW
    expected = 0.3 * F.cross_entropy(student(x), batch.labels_N) + 0.5 * soft_targets(student(x), teacher(x), 2.0)
    for name in ("stem", "down"):
        seen = []
        for network in (student, teacher):
            handle = network.get_submodule(name).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            network(x)
            handle.remove()
        expected = expected + settings.losses[1].weight * attention_transfer(*seen, power=2.0)
    goal = objective(settings, taught, run, student=student)
    torch.testing.assert_close(goal.loss(student, batch), expected)
    assert goal.companion is None


def test_losses_and_labels_count_in_their_part_of_the_training(taught, run, batch):
    settings = distillation(
        labels=1.0, labels_active=(0.5, 1), losses=({"use": "l2", "weight": 1.0, "active": (0, 0.5)},)
    )
    student = taught.network.module
    goal = objective(settings, taught, run, student=student)
    x = batch.images_NCHW
    first, second = (goal.loss(student, replace(batch, progress=progress)) for progress in (0.49, 0.5))
    torch.testing.assert_close(first, 0.5 * (student(x) - taught.original.module(x)).square().sum(1).mean())
    torch.testing.assert_close(second, F.cross_entropy(student(x), batch.labels_N))


def test_images_without_labels_teach_by_the_teacher_alone(taught, run, batch):
    student = taught.network.module
    labels_N = batch.labels_N.clone()
    labels_N[8:] = NO_LABEL
    goal = objective(distillation(labels=1.0), taught, run, student=student)
    x, kd = batch.images_NCHW, 0.9
    expected = F.cross_entropy(student(x[:8]), labels_N[:8]) + kd * soft_targets(
        student(x), taught.original.module(x), 4.0
    )
    torch.testing.assert_close(goal.loss(student, replace(batch, labels_N=labels_N)), expected)
    nobody = replace(batch, labels_N=torch.full_like(labels_N, NO_LABEL))
    torch.testing.assert_close(
        goal.loss(student, nobody), kd * soft_targets(student(x), taught.original.module(x), 4.0)
    )


def test_a_pruned_student_is_compared_with_the_channels_it_kept(pruned, run, batch):
    """At the first convolution, which sees the same image: there the kept slice is equal right after pruning."""
    settings = distillation(labels=0.0, losses=({"use": "fitnets", "layers": ("stem",), "adaptor": "kept"},))
    student = pruned.network.module
    assert student.stem.out_channels < pruned.original.module.stem.out_channels
    goal = objective(settings, pruned, run, student=student)
    assert goal.companion is None
    assert goal.loss(student, batch).item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        student.stem.weight[0] += 1
    assert goal.loss(student, batch).item() > 1e-3


def test_a_linear_adaptor_is_trained_along_and_thrown_away(pruned, run):
    losses = ({"use": "fitnets", "layers": ("stem", "down"), "adaptor": "linear"},)
    settings = distill(losses=losses, epochs=6)
    goal = objective(settings, pruned, run, student=pruned.network.module)
    widths = [tuple(adaptor.weight.shape[:2]) for adaptor in goal.companion]
    networks = (pruned.original.module, pruned.network.module)
    assert widths == [tuple(n.get_submodule(name).out_channels for n in networks) for name in ("stem", "down")]
    done = settings.apply(pruned, run)
    assert done.network.module.state_dict().keys() == pruned.network.module.state_dict().keys()
    first, last = (done.metrics["history"][epoch]["loss"] for epoch in (0, -1))
    assert last < first


def test_a_teacher_never_moves_whatever_the_loss(pruned, run):
    before = copy.deepcopy(pruned.original.module.state_dict())
    distill(losses=({"use": "kd"}, {"use": "attention"}, {"use": "fitnets"}), labels=1.0).apply(pruned, run)
    assert all(torch.equal(before[name], value) for name, value in pruned.original.module.state_dict().items())


def test_feature_losses_teach_a_network_with_fake_quantization(pruned, run):
    """The teacher's maps against those on the student's grids; the loss falls."""
    block = {"labels": 0.0, "losses": ({"use": "attention"}, {"use": "fitnets"})}
    stage = Quantize(use="quantize", epochs=6, lr=0.01, batch_size=16, calibration_images=32, distill=block)
    done = stage.apply(pruned, run)
    first, last = (done.metrics["history"][epoch]["loss"] for epoch in (0, -1))
    assert last < 0.9 * first


def test_carried_layer_weights_are_the_last_losses_with_mean_one(pruned, run, batch):
    losses = ({"use": "attention", "layers": ("stem", "depthwise", "down")},)
    done = distill(losses=losses, epochs=1).apply(pruned, run)
    carried = done.layer_losses["attention"]
    assert set(carried) == {"stem", "depthwise", "down"}
    assert done.metrics["layer_losses"] == done.layer_losses
    weighted = ({"use": "attention", "layers": ("stem", "depthwise", "down"), "layer_weights": "carried"},)
    student = done.network.module
    plain = objective(distillation(losses=losses, labels=0.0), done, run, student=student)
    value = objective(distillation(losses=weighted, labels=0.0), done, run, student=student).loss(student, batch)
    mean = sum(carried.values()) / 3
    plain.loss(student, batch)
    expected = sum(1000 * now * carried[name] / mean for name, now in plain.layer_losses()["attention"].items())
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"use": "attention", "layers": ("nothing.*",)}, "`layers: nothing.*` matches no layer"),
        ({"use": "attention", "layers": {"stem": "away"}}, "the teacher has no layer `away`"),
        ({"use": "attention", "layers": ("stem",), "layer_weights": (1.0, 2.0)}, "2 layer_weights for 1 layers"),
        (
            {"use": "attention", "layers": ("stem",), "layer_weights": "carried"},
            "no stage before had this loss on stem",
        ),
    ],
)
def test_misfits_are_refused_by_place(taught, run, loss, said):
    with pytest.raises(ModelError, match=r"stage distill: losses\.0 \(attention\): ") as caught:
        objective(distillation(losses=(loss,)), taught, run, student=taught.network.module)
    assert said in str(caught.value)


class Other(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, stride=2), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_channels_of_another_network_need_an_adaptor(taught, run):
    structure = taught.network.structure.model_copy(update={"model": {"use": "tests:other"}})
    other = replace(taught, parent=Network(randomized(Other()), structure))
    student = taught.network.module
    loss = {"use": "fitnets", "layers": ("stem",)}
    with pytest.raises(ModelError, match="does not hold the channels of the student's stem; use `adaptor: linear`"):
        objective(distillation(losses=({**loss, "adaptor": "kept"},)), other, run, student=student)
    with pytest.raises(ModelError, match="use `adaptor: linear` or other layers"):
        objective(distillation(losses=({**loss, "adaptor": "none"},)), other, run, student=student)
    goal = objective(distillation(losses=(loss,)), other, run, student=student)
    assert [tuple(adaptor.weight.shape) for adaptor in goal.companion] == [(20, 16, 1, 1)]


def test_a_strangers_channels_are_not_trusted_even_where_the_widths_agree(taught, run):
    structure = taught.network.structure
    stranger = Frozen(Network(randomized(SmallNet(), seed=5), structure), run, related=False)
    loss = {"use": "fitnets", "layers": ("stem",)}
    student = taught.network.module
    goal = objective(distillation(losses=(loss,)), taught, run, student=student, teacher=stranger)
    assert [tuple(adaptor.weight.shape) for adaptor in goal.companion] == [(16, 16, 1, 1)]
    assert objective(distillation(losses=(loss,)), taught, run, student=student).companion is None


def test_the_default_is_kd_and_hints_on_the_channels_that_pruning_kept(pruned, taught, run, batch):
    """For a float student that is narrower than the network it was pruned from; `kd` alone for all others."""

    def losses(product: Product, student: nn.Module, **values: Any) -> list[str]:
        goal = objective(distillation(**values), product, run, student=student)
        assert goal.companion is None
        return [loss["use"] for loss in goal.metrics()["losses"]]

    narrow = pruned.network.module
    assert losses(pruned, narrow) == ["kd", "fitnets"]
    assert losses(pruned, prepare(narrow, Quantization(), run.data.preprocess)) == ["kd"]
    assert losses(taught, taught.network.module) == ["kd"]  # as wide as its teacher
    assert losses(pruned, narrow, teacher={"use": "itself"}) == ["kd"]
    named = ({"use": "kd"}, {"use": "fitnets", "adaptor": "kept"})
    values = [
        objective(distillation(**v), pruned, run, student=narrow).loss(narrow, batch) for v in ({}, {"losses": named})
    ]
    torch.testing.assert_close(*values)


def test_a_layer_before_batchnorm_has_no_place_under_fake_quantization(pruned, run):
    """BatchNorm is folded into it: comparing what it returns then would be comparing two different things."""
    prepared = prepare(pruned.network.module, Quantization(), run.data.preprocess)
    with pytest.raises(ModelError, match="the student has no layer `stem` to observe"):
        objective(distillation(losses=({"use": "fitnets", "layers": ("stem",)},)), pruned, run, student=prepared)
    goal = objective(distillation(losses=({"use": "fitnets", "layers": ("stem*",)},)), pruned, run, student=prepared)
    assert goal.layers == ("stem_bn",)


def test_two_losses_of_one_name_keep_the_losses_of_all_their_layers(pruned, run):
    losses = ({"use": "attention", "layers": ("stem",)}, {"use": "attention", "layers": ("down",)})
    done = distill(losses=losses, epochs=1).apply(pruned, run)
    assert set(done.layer_losses["attention"]) == {"stem", "down"}


def test_misfits_are_found_before_training(pruned, run):
    """With the network as the recipe builds it, and no data."""
    module, size = pruned.original.module, run.data.preprocess.size
    for loss, said in (
        ({"use": "attention", "layers": {"stem": "away"}}, "the teacher has no layer `away`"),
        ({"use": "attention", "layers": ("stem",), "layer_weights": (1.0, 2.0)}, "2 layer_weights for 1 layers"),
        ({"use": "fsp", "layers": ("stem",)}, "fsp"),
        ({"use": "attention", "layers": ("head",)}, "attention"),
    ):
        with pytest.raises(ModelError) as caught:
            distillation(losses=(loss,)).refuse_misfits(module, Preprocess(size=size), "stage distill")
        assert str(caught.value).startswith(f"stage distill: losses.0 ({loss['use']}): ")
        assert said in str(caught.value)
    twice = distillation(losses=({"use": "attention_gradient"},))
    twice.refuse_misfits(module, Preprocess(size=size), "stage distill")
    with pytest.raises(ModelError, match="rounding has no second derivative"):
        twice.refuse_misfits(module, Preprocess(size=size), "stage quantize", quantized=True)


def test_kept_answers_are_not_promised_where_the_teacher_is_asked_anyway(pruned, run):
    notes: list[str] = []

    class Listening:
        def note(self, text: str) -> None:
            notes.append(text)

    listening = replace(run, progress=Listening())
    objective(distillation(views=2), pruned, listening, student=pruned.network.module)
    assert notes[0].startswith("No losses are named: `kd`, and hints on the kept channels of ")
    assert notes[1:] == ["The teacher is asked at every step: `fitnets` needs more of it than logits."]
