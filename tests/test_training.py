import copy
import itertools
import math
import platform
import resource
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn

from compress.allocator import memory_kept
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_the_textbooks(run, optimizer):
    """One step from rest on the whole split, computed by hand from the gradients (channels_last weights included)."""
    module = randomized(SmallNet())
    one = settings(epochs=1, batch_size=64, warmup_epochs=0, lr=0.1, optimizer=optimizer, weight_decay=0.01)
    one = one.model_copy(update={"clip_norm": None})
    found: dict[str, torch.Tensor] = {}

    def loss(student, batch):
        torch.manual_seed(1)  # dropout
        value = LOSS(student, batch)
        names = [name for name, _ in student.named_parameters()]
        found.update(zip(names, torch.autograd.grad(value, list(student.parameters())), strict=True))
        torch.manual_seed(1)
        return LOSS(student, batch)

    trained, _ = fit(module, loss=loss, run=run, settings=one, label="x")
    for name, start in module.named_parameters():
        decay = 0.01 if start.ndim > 1 else 0.0
        if optimizer == "sgd":  # Nesterov's first step: gradient + 0.9 x gradient
            expected = start - 0.1 * 1.9 * (found[name] + decay * start)
        else:  # Adam's first step is the gradient's sign
            expected = start * (1 - 0.1 * decay) - 0.1 * found[name] / (found[name].abs() + 1e-8)
        torch.testing.assert_close(trained.get_parameter(name), expected, rtol=1e-3, atol=1e-5)


def test_what_is_stopped_in_mid_training_moves_no_more(run):
    """4 steps an epoch: after half of 2 epochs, one epoch has moved it."""
    module = randomized(SmallNet())
    seen: list[torch.Tensor] = []

    def watching(student, batch):
        seen.append(student.head.weight.detach().clone())
        return LOSS(student, batch)

    stopped, _ = fit(
        module,
        loss=watching,
        run=run,
        settings=settings(),
        label="x",
        after=(0.5, lambda n: n.head.requires_grad_(False)),
    )
    assert [not torch.equal(a, b) for a, b in itertools.pairwise([*seen, stopped.head.weight])] == [True] * 4 + [
        False
    ] * 4
    assert not torch.equal(stopped.point.weight, module.point.weight)
    assert all(parameter.requires_grad for parameter in stopped.parameters())


def test_views_repeat_and_epochs_without_them_do_not(run):
    for views, expected in ((None, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0])):
        seen = []

        def watching(student, batch, seen=seen):
            seen.append(batch.view)
            return LOSS(student, batch)

        fit(randomized(SmallNet()), loss=watching, run=run, settings=settings(epochs=5), label="x", views=views)
        assert seen[::4] == expected
        assert len(seen) == 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_tensor_and_given_back_at_the_end():
    """Faults of pages that the process got for its tensors: few once memory is kept; the memory is gone afterwards."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(12 * 2**20)  # 48 MB, 12,288 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident()
    with memory_kept():
        faults()
        with memory_kept():
            pass
        assert faults() < 6_000
    assert resident() - before < 6_000


def test_it_gives_memory_back_after_an_error():
    with pytest.raises(ZeroDivisionError), memory_kept():
        1 / 0  # noqa: B018
