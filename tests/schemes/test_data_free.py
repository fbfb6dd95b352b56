import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SmallNet, Stripes, randomized
from networks_taught import digest, log_probabilities, logits, pruned, stage
from pydantic import ValidationError
from torch import nn

from compress.errors import DataError, ModelError
from compress.losses.lesson import NO_LABEL
from compress.schemes.data_free import (
    DataFree,
    activation,
    information_entropy,
    one_hot,
    statistics_distance,
    watched_statistics,
)
from compress.schemes.generator import Generator, Noise
from compress.stages.export import Export
from compress.teaching import objective

SCHEME = {"use": "data_free", "steps": 2, "latent": 20, "channels": 8}


class Unseen(Stripes):
    """Data whose images nobody may look at."""

    def batches(self, split, **options):
        raise AssertionError(f"images of {split} were read")


def test_one_hot_is_the_cross_entropy_of_the_largest():
    (values,) = logits(1)
    expected = -log_probabilities(values).max(1).mean()
    assert one_hot(values).item() == pytest.approx(expected, rel=1e-12)
    assert one_hot(1e3 * values).item() == pytest.approx(0, abs=1e-9)


def test_entropy_is_in_decimal_digits_and_least_for_equal_classes():
    (values,) = logits(1)
    mean = np.exp(log_probabilities(values)).mean(0)
    assert information_entropy(values).item() == pytest.approx((mean * np.log10(mean)).sum(), rel=1e-12)
    assert information_entropy(torch.zeros(4, 5)).item() == pytest.approx(-math.log10(5))
    assert information_entropy(100 * torch.eye(5)).item() == pytest.approx(-math.log10(5))
    alike = (100 * torch.eye(5)[[2] * 4]).requires_grad_()  # one class alone: the others' probabilities underflow
    value = information_entropy(alike)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert alike.grad.isfinite().all()


def test_activation_is_minus_the_mean_of_absolute_values():
    values = torch.tensor([[1.0, -2.0], [0.0, 5.0]])
    assert activation(values).item() == -2.0


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_statistics_are_those_of_each_channel(shape):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, variance = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    rows = np.moveaxis(values.numpy(), 1, 0).reshape(3, -1)
    expected = np.sqrt(((rows.mean(1) - mean.numpy()) ** 2).sum()) + np.sqrt(
        ((rows.var(1) - variance.numpy()) ** 2).sum()
    )
    assert statistics_distance(values, mean, variance).item() == pytest.approx(expected, rel=1e-12)


def test_the_four_losses_have_the_gradients_of_finite_differences():
    values = logits(1)[0][:3].requires_grad_()
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for loss in (one_hot, information_entropy, activation, lambda x: statistics_distance(x, zeros, ones)):
        assert torch.autograd.gradcheck(loss, [values])
    dead = torch.zeros(4, 5, requires_grad=True)
    statistics_distance(dead, torch.zeros(5), torch.zeros(5)).backward()
    assert dead.grad.isfinite().all()


def test_the_statistics_watched_are_those_that_batchnorm_would_measure():
    """Images whose batch statistics a BatchNorm has just taken over are at distance 0 from it."""
    module = randomized(SmallNet())
    images = torch.randn(16, 3, 16, 16)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    with watched_statistics(module) as before:
        module(images)
    assert len(before) == len(norms) == 2
    assert all(distance > 0.1 for distance in before)
    seen = {}
    handles = [n.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0]})) for n in norms]
    for norm in norms:  # one after the other: the second reads what the first returns
        module(images)
        norm.running_var, norm.running_mean = torch.var_mean(seen[norm].detach(), (0, 2, 3), correction=0)
    for handle in handles:
        handle.remove()
    with watched_statistics(module) as after:
        module(images)
    assert all(distance.item() == pytest.approx(0, abs=1e-4) for distance in after)
    assert not any(norm._forward_pre_hooks for norm in norms)


@pytest.mark.parametrize("size", [8, 16, 20, 32, 97])
def test_generated_images_have_the_size_and_the_scale_of_normalised_ones(size):
    generator = Generator(10, size, channels=4).train()
    images = generator(torch.randn(6, 10, 1, 1))
    assert images.shape == (6, 3, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert not torch.allclose(images[0], images[1], atol=0.05)
    assert max(generator.sides[0], 8) <= 8


def test_noise_is_new_for_each_step_epoch_process_and_seed_and_the_same_again():
    noise = Noise(Unseen(), latent=7, images=24)

    def rows(**options):
        batches = list(noise.batches("train", batch_size=4, **options))
        assert all((batch.labels_N == NO_LABEL).all() for batch in batches)
        return torch.cat([batch.images_NCHW for batch in batches])

    first = rows(seed=1, epoch=0)
    assert first.shape == (24, 7, 1, 1)
    assert torch.equal(first, rows(seed=1, epoch=0, shuffle=True, augment=True, view=None))
    parts = [rows(seed=1, epoch=0, rank=rank, world_size=2) for rank in (0, 1)]
    assert parts[0].shape == (12, 7, 1, 1)
    others = [rows(seed=1, epoch=1), rows(seed=2, epoch=0), *parts]
    values = torch.cat([first, *others]).flatten()
    assert len(values.unique()) > 0.8 * len(values)  # rank 0 begins as a process alone does
    assert not torch.equal(*parts)
    assert (noise.count("train"), noise.count("evaluation")) == (24, 0)
    assert (noise.labels, noise.preprocess) == (Stripes.labels, Stripes.preprocess)
    with pytest.raises(DataError, match="noise only trains"):
        list(noise.batches("evaluation", batch_size=4))


def test_each_side_gets_the_gradients_of_its_own_loss(product, run):
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module).train()
    module.dropout.p = 0.0
    blind = replace(run, data=Noise(Unseen(), 20, 32))
    scheme = DataFree(**SCHEME, batchnorm=0.1)
    goal = objective(stage(None, losses=[{"use": "kd"}, {"use": "attention"}]), student, blind, student=module)
    teacher = copy.deepcopy(student.parent.module).eval().requires_grad_(False)
    generator = Generator(20, 16, 8).train()
    batch = next(iter(blind.data.batches("train", batch_size=8)))

    scheme.step(goal, generator, teacher, "pool", module, batch).backward()
    found = [[p.grad.clone() for p in side.parameters()] for side in (generator, module)]
    generator.zero_grad()
    module.zero_grad()
    images = generator(batch.images_NCHW)
    scheme.of_generator(teacher, images, "pool").backward()
    given = replace(batch, images_NCHW=images.detach())
    goal.loss(module, given).backward()
    expected = [[p.grad for p in side.parameters()] for side in (generator, module)]
    for mine, theirs in zip(found, expected, strict=True):
        assert any(gradient.abs().max() > 1e-6 for gradient in theirs)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batchnorm", [0.0, 1.0])
def test_from_a_recipe_no_image_is_read_and_no_teacher_moves(product, run, batchnorm):
    student = pruned(product, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    losses = [{"use": "kd", "temperature": 6.0, "weight": 1.0}, {"use": "attention"}]
    distill = stage({**SCHEME, "batchnorm": batchnorm, "generator_lr": 0.01}, epochs=2, batch_size=8, losses=losses)
    result = distill.apply(student, replace(run, data=Unseen()))
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert list(result.network.module.state_dict()) == list(student.network.module.state_dict())
    assert len(result.metrics["history"]) == 2
    assert result.metrics["scheme"] == "data_free"
    assert Export(use="export").apply(result, run).files


def test_what_needs_images_is_refused(run):
    for idle in ({"views": 2}, {"cache": "kept"}, {"unlabeled": {"path": "more"}}):
        with pytest.raises(ValidationError, match="`data_free` generates its images: no `views`"):
            stage(SCHEME, **idle)

    class Plain(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5))

    with pytest.raises(ModelError, match="`batchnorm`: the teacher has no BatchNorm layer"):
        stage({**SCHEME, "batchnorm": 1.0}).check(Plain(), run.data.preprocess)
