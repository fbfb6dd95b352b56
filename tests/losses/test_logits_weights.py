"""Intermediate weights: on networks that were really pruned, quantized and wrapped, and against numpy."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import PREPROCESS, SmallNet, randomized
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.errors import ModelError
from compress.losses import LossSettings
from compress.losses.lesson import Facts, Lesson
from compress.losses.weights import Alignment, Weights, aligned, weight_distance
from compress.models.structure import compose, within
from compress.product import Batch, KeptChannels, Network, Preprocess, Product, Structure
from compress.quantization import Quantization, fold_batchnorm, prepare
from compress.stages.prune import Prune
from compress.teachers.teacher import Frozen
from compress.teaching.objective import Distillation, objective

rng = np.random.default_rng(4)
NOTHING = torch.zeros(1, 5)


def pruned(product: Product, run, macs: float = 0.6) -> Product:
    return Prune(use="prune", goal={"macs": macs}, round_to=4, batchnorm_images=0).apply(product, run)


def facts_of(student: nn.Module, teacher: nn.Module, kept) -> Facts:
    return Facts((), (), (), classes=5, images=1, student=student, teacher=teacher, kept=kept)


def distance(loss: Weights, student: nn.Module, teacher: nn.Module, kept, parts=None) -> torch.Tensor:
    lesson = Lesson(NOTHING, NOTHING, torch.zeros(1), parts=parts, student=student, teacher=teacher, kept=kept)
    return loss(lesson)


def test_distance_and_alignment_against_numpy():
    weight, left, right = rng.normal(size=(4, 3, 2, 2)), rng.normal(size=(6, 4)), rng.normal(size=(3, 5))
    teacher = rng.normal(size=(6, 5, 2, 2))
    whole = np.zeros_like(teacher)
    for row in range(2):
        for column in range(2):
            whole[:, :, row, column] = left @ weight[:, :, row, column] @ right
    got = aligned(*map(torch.tensor, (weight, left, right)))
    np.testing.assert_allclose(got.numpy(), whole, rtol=1e-12)
    expected = np.linalg.norm((whole - teacher).reshape(-1)) ** 2
    assert weight_distance(got, torch.tensor(teacher)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_gradients_of_weight_and_alignment(kernel):
    weight, left, right = (torch.randn(s, dtype=torch.float64) for s in ((3, 2, *kernel), (4, 3), (2, 5)))
    teacher = torch.randn(4, 5, *kernel, dtype=torch.float64)
    trained = tuple(tensor.requires_grad_(True) for tensor in (weight, left, right))
    assert torch.autograd.gradcheck(lambda w, a, b: weight_distance(aligned(w, a, b), teacher), trained)


@pytest.fixture
def student(product, run) -> Product:
    return pruned(product, run)


def test_a_network_fresh_from_pruning_is_where_it_should_be(student):
    kept = student.network.structure.kept
    assert kept
    loss = Weights(use="weights")
    assert loss.parts(facts_of(student.network.module, student.parent.module, kept)) is None
    assert distance(loss, student.network.module, student.parent.module, kept).item() == 0


@pytest.mark.parametrize("name", ["unet_transposed", "regnet_x", "vit"])
def test_so_are_transposed_and_grouped_convolutions_and_transformers(name, run):
    torch.manual_seed(0)
    module, preprocess = networks.NETWORKS[name](5), Preprocess(size=networks.size_of(name))
    structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=preprocess)
    run = replace(run, data=SimpleNamespace(preprocess=preprocess))
    narrow = pruned(Product(Network(module.eval(), structure)), run, 0.8)
    kept, mine = narrow.network.structure.kept, narrow.network.module
    assert distance(Weights(use="weights"), mine, narrow.parent.module, kept).item() == 0
    for layer in mine.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.zeros_(layer.weight)
    assert distance(Weights(use="weights"), mine, narrow.parent.module, kept).item() > 0


def test_the_value_is_the_sum_of_squares_of_what_moved(student):
    """Counted by name with numpy, where the student's layers moved by known amounts."""
    module, kept = copy.deepcopy(student.network.module), student.network.structure.kept
    expected = 0.0
    for step, name in enumerate(("stem", "depthwise", "down", "head"), start=1):
        layer = module.get_submodule(name)
        with torch.no_grad():
            layer.weight += 0.1 * step
            layer.bias = None
        expected += layer.weight.numel() * (0.1 * step) ** 2
    assert distance(Weights(use="weights"), module, student.parent.module, kept).item() == pytest.approx(expected, 1e-5)
    only = Weights(use="weights", layers=("do*", "re:he.d"))
    sizes = {name: module.get_submodule(name).weight.numel() for name in ("down", "head")}
    assert distance(only, module, student.parent.module, kept).item() == pytest.approx(
        sizes["down"] * 0.3**2 + sizes["head"] * 0.4**2, 1e-5
    )


def test_the_gradient_pulls_the_weights_back_and_leaves_the_teacher_alone(student):
    """The loss is quadratic: one step of half its gradient lands on the teacher's weights."""
    module, kept = copy.deepcopy(student.network.module), student.network.structure.kept
    teacher = copy.deepcopy(student.parent.module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    loss = Weights(use="weights")
    far = distance(loss, module, teacher, kept)
    assert far.item() > 1
    far.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    pulled = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert pulled == {f"{name}.weight" for name in ("stem", "depthwise", "point", "down", "head")}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert distance(loss, module, teacher, kept).item() == pytest.approx(0, abs=1e-8)


def test_alignments_start_as_the_kept_channels(student):
    """At first what is missing is what pruning took; with one less to explain, training A and B makes it smaller."""
    module, teacher, kept = student.network.module, student.parent.module, student.network.structure.kept
    loss = Weights(use="weights", adaptor="linear", layers=("down", "head", "point"))
    parts = loss.parts(facts_of(module, teacher, kept))
    names = ("down", "head", "point")
    whole = sum(teacher.get_submodule(name).weight.square().sum().item() for name in names)
    left = sum(module.get_submodule(name).weight.square().sum().item() for name in names)
    start = distance(loss, module, teacher, kept, parts)
    assert start.item() == pytest.approx(whole - left, rel=1e-4)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        distance(loss, module, teacher, kept, parts).backward()
        optimizer.step()
    assert distance(loss, module, teacher, kept, parts).item() < 0.9 * start.item()


def test_networks_of_other_widths_are_compared_through_alignments():
    """No kept channels: `auto` is `linear`, and the shapes are each teacher's own."""

    def net(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 1), nn.Linear(2 * width, 5))

    narrow, wide = net(4), net(6)
    loss = Weights(use="weights")
    parts = loss.parts(facts_of(narrow, wide, None))
    assert [(part.left.shape, part.right.shape) for part in parts] == [
        ((6, 4), (3, 3)),
        ((12, 8), (4, 6)),
        ((5, 5), (8, 12)),
    ]
    value = distance(loss, narrow, wide, None, parts)
    value.backward()
    assert all(parameter.grad.any() for part in parts for parameter in part.parameters())
    assert all(layer.weight.grad.any() for layer in narrow)
    for part, mine, theirs in zip(parts, narrow, wide, strict=True):
        torch.testing.assert_close(part(mine.weight).shape, theirs.weight.shape)


def test_an_alignment_takes_each_column_to_its_place():
    start = Alignment(torch.zeros(2, 3), torch.zeros(4, 3), first=(1, 3))
    assert start.left.tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]
    assert start.right.tolist() == torch.eye(3).tolist()


def quantized(network: Network) -> nn.Module:
    return prepare(network.module, Quantization(), network.structure.preprocess)


def test_a_fake_quantized_student_is_compared_with_a_folded_teacher(student):
    """Its weights hold the BatchNorm. What was kept of the folded teacher is exactly them, before training."""
    module, kept = quantized(student.network), student.network.structure.kept
    loss = Weights(use="weights")
    value = distance(loss, module, fold_batchnorm(student.parent.module), kept)
    assert value.item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        module.get_submodule("down").weight += 0.5
    value = distance(loss, module, fold_batchnorm(student.parent.module), kept)
    value.backward()
    assert value.item() == pytest.approx(0.25 * module.get_submodule("down").weight.numel(), 1e-4)
    assert module.get_submodule("down").weight.grad.any()
    with pytest.raises(ModelError, match=r"layer stem_bn: only the teacher has this BatchNorm"):
        distance(loss, module, student.parent.module, kept)
    with pytest.raises(ModelError, match=r"layer stem_bn: only the student has this BatchNorm"):
        distance(loss, student.network.module, fold_batchnorm(student.parent.module), kept)


def test_a_student_of_several_processes_is_the_one_inside(student, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(student.network.module))
        value = distance(Weights(use="weights"), wrapped, student.parent.module, student.network.structure.kept)
        assert value.item() == 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("adaptor", ["kept", "linear"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_layer_that_one_network_lacks_is_named(student, who, adaptor):
    mine, theirs = copy.deepcopy(student.network.module), copy.deepcopy(student.parent.module)
    (mine if who == "student" else theirs).down = nn.Identity()
    kept = student.network.structure.kept
    loss = Weights(use="weights", layers=("stem", "down"), adaptor=adaptor)
    with pytest.raises(ModelError, match=rf"layer down: the {who} has no such convolution or linear layer"):
        loss.parts(facts_of(mine, theirs, kept))
    rest = Weights(use="weights", adaptor="kept")
    assert distance(rest, mine, theirs, kept).item() == 0  # `auto` compares what both have


def test_what_cannot_be_compared_is_refused_before_training(student):
    mine, theirs, kept = student.network.module, student.parent.module, student.network.structure.kept
    with pytest.raises(ModelError, match=r"`layers: dwon` matches no layer; close: down"):
        Weights(use="weights", layers=("dwon",)).parts(facts_of(mine, theirs, kept))
    with pytest.raises(ModelError, match=r"`adaptor: kept`: the student was not pruned from this teacher"):
        Weights(use="weights", adaptor="kept").parts(facts_of(mine, theirs, None))
    with pytest.raises(ModelError, match=r"layer \w+: the student's weight is .*, what was kept of the teacher's"):
        Weights(use="weights").parts(facts_of(mine, theirs, {}))
    other = nn.Module()
    other.stem = nn.Conv2d(3, 16, 5)
    with pytest.raises(ModelError, match=r"layer stem: the student's kernel is \(3, 3\), the teacher's \(5, 5\)"):
        Weights(use="weights").parts(facts_of(mine, other, None))
    with pytest.raises(ModelError, match="no convolution or linear layer has the same name"):
        Weights(use="weights").parts(facts_of(mine, nn.Module(), None))


def by_objective(student: Product, run, module: nn.Module, loss: dict, teacher=None) -> tuple[float, nn.Module | None]:
    """What training minimises where this loss is all there is, and what is trained along."""
    distillation = Distillation(labels=0.0, losses=({"use": "weights", "weight": 1.0, **loss},))
    goal = objective(distillation, student, run, student=module, teacher=teacher)
    batch = Batch(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    return goal.loss(module, batch).item(), goal.companion


def test_training_hands_it_the_two_networks_in_one_form(student, run):
    """Right after pruning and right after quantization there is nothing to pull back."""
    for module in (student.network.module, quantized(student.network)):
        assert by_objective(student, run, module, {}) == (pytest.approx(0, abs=1e-9), None)
        moved = copy.deepcopy(module)
        with torch.no_grad():
            moved.get_submodule("down").weight += 0.5
        expected = 0.25 * moved.get_submodule("down").weight.numel()
        assert by_objective(student, run, moved, {})[0] == pytest.approx(expected, rel=1e-4)
        value, companion = by_objective(student, run, module, {"adaptor": "linear"})
        assert value > 1
        assert sum(parameter.numel() for parameter in companion.parameters()) > 0


def test_training_under_a_pruned_teacher_counts_the_teachers_channels(student, run):
    narrower = pruned(student, run, 0.7)
    module = narrower.network.module
    teacher = Frozen(student.network, run, related=True)
    assert by_objective(narrower, run, module, {}, teacher) == (0, None)
    stranger = Frozen(student.network, run, related=False)
    value, companion = by_objective(narrower, run, module, {}, stranger)
    assert value > 1
    assert companion is not None
    with pytest.raises(ModelError, match="was not pruned from this teacher"):
        by_objective(narrower, run, module, {"adaptor": "kept"}, stranger)


def test_recipes_name_it():
    settings = TypeAdapter(LossSettings)
    loss = settings.validate_json('{"use": "weights", "layers": ["features.*", "re:head"], "adaptor": "linear"}')
    assert loss == Weights(use="weights", layers=("features.*", "re:head"), adaptor="linear")
    for text in ('"layers": ["re:("]', '"layers": []', '"adaptor": "none"'):
        with pytest.raises(ValidationError):
            settings.validate_json(f'{{"use": "weights", {text}}}')


def test_what_a_narrower_network_kept_of_a_narrow_one(run):
    """A teacher may be pruned itself: the channels are then its own, not the factory's."""
    structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=PREPROCESS)
    first = pruned(Product(Network(randomized(SmallNet()), structure)), run, 0.8)
    second = pruned(first, run, 0.6)
    teacher, student = first.network.structure.kept, second.network.structure.kept
    step = within(student, teacher)
    assert step
    assert compose(teacher, step) == student
    assert distance(Weights(use="weights"), second.network.module, first.network.module, step).item() == 0
    assert within(student, student) == {}
    assert within(student, {}) == student
    assert within(teacher, student) is None  # the wider one has channels that the narrow one lost
    assert within({}, {"a": KeptChannels(outputs=(1,))}) is None
