"""What criteria are told of a network, against slower ways of finding it out."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence
from torch.nn import functional as F

from compress.criteria.activation import Activation
from compress.criteria.bn_scale import BNScale
from compress.criteria.fisher import fisher
from compress.data.sample import sample
from compress.errors import ModelError
from compress.models.coupled import find_coupled
from compress.pruning.evidence import activations, collect, evidence_of, mask_gradients, root_mean_square_gradients
from compress.tasks import task_of


class Branches(nn.Module):
    """A residual sum that a depthwise convolution and a linear layer read, on either side of a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.stem_bn = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point = nn.Conv2d(4, 4, 1)
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)), inplace=True)
        x = x + self.point(self.deep(x))
        x = F.relu(self.tokens(x.permute(0, 2, 3, 1)))  # channels last, as in ConvNeXt
        return self.head(x.permute(0, 3, 1, 2).flatten(1))


@pytest.fixture
def branches() -> nn.Module:
    torch.manual_seed(0)
    module = Branches()
    with torch.no_grad():
        module.stem_bn.weight.uniform_(0.5, 1.5)
        module.stem_bn.bias.normal_()
    return module.eval().double()


@pytest.fixture
def doubled(run, monkeypatch):
    """Data in float64, so that differences of losses are derivatives."""
    plain = run.data.batches

    def batches(*args, **named):
        for batch in plain(*args, **named):
            yield replace(batch, images_NCHW=batch.images_NCHW.double())

    monkeypatch.setattr(run.data, "batches", batches)
    return run


TASKS = ["classification", "multi_label", "regression"]


def distribution(task: str, outputs_NK: Tensor) -> Distribution:
    """What the labels' loss of a task takes the outputs for."""
    match task:
        case "classification":
            return Categorical(logits=outputs_NK)
        case "multi_label":
            return Independent(Bernoulli(logits=outputs_NK), 1)
        case _:
            return Independent(Normal(outputs_NK, torch.ones_like(outputs_NK)), 1)


def drawn_labels(module: nn.Module, run, images: int, at_once: int) -> tuple[Tensor, Tensor]:
    """Images and the labels that the network's answers give, drawn as the seed says."""
    generator = torch.Generator().manual_seed(run.seed)
    seen, drawn = [], []
    for batch in sample(run, images, batch_size=at_once):
        with torch.no_grad():
            outputs = module(batch.images_NCHW)
        seen.append(batch.images_NCHW)
        drawn.append(task_of(run.data.task).drawn(outputs, generator))
    return torch.cat(seen), torch.cat(drawn)


def scaled(module: nn.Module, coupled, unit: int, factor: float) -> nn.Module:
    """The network that reads a unit's channels times a factor: their columns of every reader's weight are scaled."""
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for (name, side), channels in coupled.places.items():
            if side == "inputs":
                changed.get_submodule(name).weight[:, channels[unit]] *= factor
    return changed


@pytest.mark.parametrize("task", TASKS)
def test_mask_gradients_are_the_losss_slopes(branches, doubled, task) -> None:
    doubled.data.task = task
    images, labels = drawn_labels(branches, doubled, 48, 32)
    sets, _ = find_coupled(branches.float(), 16)
    branches.double()
    found = mask_gradients(branches, sets, doubled, 48)
    step = 1e-5
    for coupled, gradients_NC in zip(sets, found, strict=True):
        assert gradients_NC.shape == (len(images), coupled.units)
        for unit in range(coupled.units):
            above, below = (
                -distribution(task, scaled(branches, coupled, unit, 1 + sign * step)(images)).log_prob(labels)
                for sign in (1, -1)
            )
            slope_N = (above - below).detach() / (2 * step)
            torch.testing.assert_close(gradients_NC[:, unit].double(), slope_N, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_fisher_is_the_second_order_rise_of_the_divergence(branches, doubled, task) -> None:
    # KL(answers || answers with a unit's factor at 1 - e) = e^2 times the score, but for higher orders and the draw.
    doubled.data.task = task
    sets, _ = find_coupled(branches.float(), 16)
    branches.double()
    images = torch.cat([batch.images_NCHW for batch in sample(doubled, 64, batch_size=64)])
    drawn = [mask_gradients(branches, sets, replace(doubled, seed=seed), 64) for seed in range(60)]
    step = 1e-3
    with torch.no_grad():
        answers = distribution(task, branches(images))
        for number, coupled in enumerate(sets):
            scores = torch.stack([fisher(found[number].double()) for found in drawn])
            rises = torch.stack(
                [
                    kl_divergence(answers, distribution(task, scaled(branches, coupled, unit, 1 - step)(images))).mean()
                    for unit in range(coupled.units)
                ]
            )
            expected, noise = rises / step**2, scores.std(0) / len(scores) ** 0.5
            assert ((scores.mean(0) - expected).abs() <= 5 * noise + 1e-2 * expected).all()
            assert expected.max() > 0
            assert (noise <= 0.15 * expected).all()  # the comparison can tell; a dead unit has 0 of both


@pytest.mark.parametrize("task", TASKS)
def test_weights_of_classes_change_nothing_in_what_is_drawn(branches, doubled, task) -> None:
    doubled.data.task = task
    sets, _ = find_coupled(branches.float(), 16)
    branches.double()
    before = mask_gradients(branches, sets, doubled, 32)
    doubled.data.label_weights = (9.0, 1.0, 1.0, 1.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, mask_gradients(branches, sets, doubled, 32), strict=True))


def test_sampled_gradients_are_those_of_single_images(branches, doubled) -> None:
    images, labels = drawn_labels(branches, doubled, 12, 1)
    squares = torch.zeros_like(branches.point.weight)
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(branches(image[None]), label[None])
        squares += torch.autograd.grad(loss, branches.point.weight)[0].square()
    found = root_mean_square_gradients(branches, doubled, 12, at_once=1, sampled=True)["point.weight"]
    torch.testing.assert_close(found, (squares / len(images)).sqrt())


@pytest.mark.parametrize("statistic", ["mean", "nonzero"])
def test_activations_are_what_the_readers_are_given(branches, doubled, statistic) -> None:
    criterion = Activation(use="activation", statistic=statistic)
    sets, _ = find_coupled(branches.float(), 16)
    branches.double()
    number = next(index for index, coupled in enumerate(sets) if coupled.producers[0] == "tokens")
    found = activations(branches, sets, criterion.taken, doubled, 32)[number]
    images = torch.cat([batch.images_NCHW for batch in sample(doubled, 32, batch_size=32)])
    with torch.no_grad():
        x = F.relu(branches.stem_bn(branches.stem(images)))
        read = F.relu(branches.tokens((x + branches.point(branches.deep(x))).permute(0, 2, 3, 1)))
    expected = read.abs().mean((1, 2)) if statistic == "mean" else (read != 0).double().mean((1, 2))
    order = sets[number].places["tokens", "outputs"].flatten()
    torch.testing.assert_close(found, expected[:, order])


def test_a_set_without_batchnorm_is_refused_by_its_scales(branches, run) -> None:
    sets, _ = find_coupled(branches.float(), 16)
    criterion = BNScale(use="bn_scale")
    collected = collect(branches, sets, criterion, run, 8)
    number = next(index for index, coupled in enumerate(sets) if coupled.producers[0] == "tokens")
    with pytest.raises(ModelError, match=r"tokens: no BatchNorm scales its channels.*keep: \[tokens\]"):
        evidence_of(sets[number], number, branches, collected, criterion, torch.Generator())


def test_nothing_of_the_network_is_changed(branches, run) -> None:
    branches.float()
    before = {name: value.clone() for name, value in branches.state_dict().items()}
    sets, _ = find_coupled(branches, 16)
    mask_gradients(branches, sets, run, 32)
    activations(branches, sets, Activation(use="activation").taken, run, 32)
    root_mean_square_gradients(branches, run, 4, at_once=1, sampled=True)
    assert all(torch.equal(before[name], value) for name, value in branches.state_dict().items())
    assert not branches.stem._forward_pre_hooks
    assert not branches.head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in branches.parameters())
