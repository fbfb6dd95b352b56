import copy
import itertools
import math

import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn

from compress.errors import ModelError, TrainingError
from compress.training import Fit, fit, labels_loss, learning_rate, reestimated_batchnorm

LOSS = labels_loss()


def settings(**values) -> Fit:
    return Fit(**{"epochs": 2, "batch_size": 16, "lr": 0.05, "warmup_epochs": 0.5, "augment": False, **values})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_it_learns_and_leaves_its_input_alone(run):
    module = randomized(SmallNet())
    before = copy.deepcopy(module)
    trained, history = fit(module, loss=LOSS, run=run, settings=settings(epochs=15), label="train")
    assert same(module, before)
    assert not same(trained, before)
    assert [entry["epoch"] for entry in history] == list(range(1, 16))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert not trained.training


def test_same_seed_same_bytes_other_seed_other_bytes(run):
    from dataclasses import replace

    module = randomized(SmallNet())
    first, second = (fit(module, loss=LOSS, run=run, settings=settings(), label="x")[0] for _ in range(2))
    other, _ = fit(module, loss=LOSS, run=replace(run, seed=4), settings=settings(), label="x")
    assert same(first, second)
    assert not same(first, other)


def test_no_epochs_is_a_copy(run):
    module = randomized(SmallNet())
    trained, history = fit(module, loss=LOSS, run=run, settings=settings(epochs=0), label="x")
    assert same(trained, module)
    assert trained is not module
    assert history == []


def test_learning_rate_is_a_warm_up_and_a_half_cosine():
    rates = [learning_rate(step, total=110, warmup=10, peak=0.4) for step in range(110)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert max(rates) == 0.4
    assert rates[60] == pytest.approx(0.2)  # half-way down
    assert rates[-1] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 99 / 100)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_only_the_named_parameters_move_and_frozen_batchnorm_keeps_its_statistics(run):
    module = randomized(SmallNet())
    trained, _ = fit(module, loss=LOSS, run=run, settings=settings(only=("head.*",)), label="x")
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, module.state_dict()[name])}
    assert moved == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_a_pattern_that_matches_nothing_is_an_error(run):
    with pytest.raises(ModelError, match=r"stage x: `only: haed\.\*` matches no parameter"):
        fit(randomized(SmallNet()), loss=LOSS, run=run, settings=settings(only=("haed.*",)), label="x")


def test_a_loss_that_is_not_finite_stops_with_stage_epoch_and_step(run):
    steps = []

    def loss(module, batch):
        steps.append(1)
        value = LOSS(module, batch)
        return value * math.nan if len(steps) == 6 else value

    with pytest.raises(TrainingError, match=r"stage distill: the loss is nan at epoch 2, step 2; try a lower lr"):
        fit(randomized(SmallNet()), loss=loss, run=run, settings=settings(), label="distill")


def test_gradients_are_clipped(run):
    """With a norm of 1e-6 allowed, one step moves the weights by at most lr x 1e-6 (Nesterov: x 1.9)."""
    module = randomized(SmallNet())
    one = settings(epochs=1, batch_size=64, clip_norm=1e-6, weight_decay=0.0, warmup_epochs=0, lr=1.0)
    trained, _ = fit(module, loss=LOSS, run=run, settings=one, label="x")
    squares = [
        (a - b).detach().square().sum().item() for a, b in zip(trained.parameters(), module.parameters(), strict=True)
    ]
    assert 0 < math.sqrt(sum(squares)) <= 1.91e-6


def test_moving_average_against_its_definition(run):
    """One batch an epoch: the average is recomputed here from the weights that plain training passes through."""
    module = randomized(SmallNet())
    decay = 0.5
    whole = {"epochs": 4, "batch_size": 64}
    averaged, _ = fit(module, loss=LOSS, run=run, settings=settings(**whole, ema=decay), label="x")
    passed: list[torch.Tensor] = []

    def watching(student, batch):
        if student.training:
            passed.append(student.head.weight.detach().clone())
        return LOSS(student, batch)

    last, _ = fit(module, loss=watching, run=run, settings=settings(**whole), label="x")
    weights = [*passed[1:], last.head.weight]  # after steps 1, 2, 3, 4
    expected = weights[0]
    for count, value in enumerate(weights[1:], start=1):
        ramped = min(decay, (1 + count) / (10 + count))
        expected = ramped * expected + (1 - ramped) * value
    torch.testing.assert_close(averaged.head.weight, expected)


def test_weight_decay_spares_biases_and_batchnorm(run):
    module = randomized(SmallNet())

    def nothing(student, batch):
        return 0.0 * LOSS(student, batch)

    trained, _ = fit(module, loss=nothing, run=run, settings=settings(weight_decay=0.1), label="x")
    for name, parameter in module.named_parameters():
        shrunk = not torch.equal(trained.get_parameter(name), parameter)
        assert shrunk == (parameter.ndim > 1), name


def test_batchnorm_statistics_are_those_of_the_images(run):
    module = randomized(SmallNet())
    batches = list(run.data.batches("train", batch_size=64))
    again = reestimated_batchnorm(module, batches, run.device)
    features = module.stem(nn.functional.pad(batches[0].images_NCHW, (0, 1, 0, 1)))
    torch.testing.assert_close(again.stem_bn.running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(again.stem_bn.running_var, features.var((0, 2, 3)))
    assert again.stem_bn.momentum == module.stem_bn.momentum
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
