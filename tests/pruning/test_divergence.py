"""Importance in nats: of changed answers, and of residual blocks."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import Stripes
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from compress.data.sample import sample
from compress.models.blocks import find_blocks
from compress.pruning.depth import block_scores
from compress.pruning.divergence import divergence, held_out, mean_divergence, outputs
from compress.training import reestimated_batchnorm


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_it_is_the_kullback_leibler_divergence_of_what_the_outputs_mean(task):
    generator = torch.Generator().manual_seed(0)
    whole, changed = (4 * torch.randn(6, 5, generator=generator) for _ in range(2))

    def meant(outputs_NK):
        match task:
            case "classification":
                return Categorical(logits=outputs_NK)
            case "multi_label":
                return Independent(Bernoulli(logits=outputs_NK), 1)
        return Independent(Normal(outputs_NK, torch.ones(())), 1)

    expected = kl_divergence(meant(whole.double()), meant(changed.double()))
    torch.testing.assert_close(divergence(changed.double(), whole.double(), task), expected)
    assert divergence(whole, whole, task).abs().max() == 0


def test_a_label_is_two_classes():
    whole, changed = torch.tensor([[3.0], [-40.0], [0.0]]), torch.tensor([[-2.0], [40.0], [90.0]])
    as_classes = [torch.cat([torch.zeros_like(logits), logits], 1) for logits in (changed, whole)]
    torch.testing.assert_close(
        divergence(changed, whole, "multi_label"), divergence(as_classes[0], as_classes[1], "classification")
    )


@pytest.mark.parametrize(("images", "statistics", "expected"), [(16, 24, (16, 24)), (32, 96, (16, 48)), (8, 0, (8, 0))])
def test_images_that_are_compared_serve_no_statistics(run, images, statistics, expected):
    compared, others = held_out(run, images, statistics)
    assert tuple(sum(len(batch.images_NCHW) for batch in batches) for batches in (compared, others)) == expected
    rows = [{image.numpy().tobytes() for batch in part for image in batch.images_NCHW} for part in (compared, others)]
    assert not rows[0] & rows[1]
    again, _ = held_out(run, images, statistics)
    assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(compared, again, strict=True))


def test_a_single_image_serves_both(run):
    compared, statistics = held_out(replace(run, data=Stripes(train=1)), 8, 8)
    assert compared
    assert compared is statistics


def test_answers_that_are_no_numbers_are_infinitely_far(product, run):
    module = product.network.module
    batches, _ = held_out(run, 8, 8)
    whole_NK = outputs(module, batches, run.device)
    assert mean_divergence(module, whole_NK, batches, run) == 0
    with torch.no_grad():
        module.head.bias.fill_(math.nan)
    assert mean_divergence(module, whole_NK, batches, run) == math.inf


class Deep(nn.Module):
    """Residual blocks whose branches are of different sizes; the second adds nothing."""

    def __init__(self, gains=(1.0, 0.0, 0.1)) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(Residual(gain) for gain in gains))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        with torch.no_grad():
            self.branch[-1].weight.mul_(gain)
            self.branch[-1].bias.mul_(gain)

    def forward(self, x):
        return x + self.branch(x)


def test_a_block_is_worth_what_the_answers_lose_without_it(run):
    torch.manual_seed(0)
    module = reestimated_batchnorm(Deep(), held_out(run, 24, 24)[1], run.device)  # as trained
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    blocks = find_blocks(module, 16)
    scores = block_scores(module, blocks, run, 24)
    assert [*scores] == [f"blocks.{number}" for number in range(3)]
    assert scores["blocks.1"] < 1e-9
    assert scores["blocks.0"] > scores["blocks.2"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert block_scores(module, [], run, 24) == {}

    # By hand: the block's place, BatchNorm from the other images, probabilities.
    together = torch.cat([batch.images_NCHW for batch in sample(run, 48, batch_size=64)])
    compared, statistics = held_out(run, 24, 24)
    assert torch.equal(torch.cat([batch.images_NCHW for batch in (*compared, *statistics)]), together)
    shallow = copy.deepcopy(module)
    shallow.blocks[2] = nn.Identity()
    shallow = reestimated_batchnorm(shallow, statistics, run.device)
    with torch.no_grad():
        p, q = (net(together[:24]).double().softmax(1) for net in (module, shallow))
    assert scores["blocks.2"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks_have_blocks_too(run, task):
    torch.manual_seed(0)
    other = replace(run, data=type("Other", (Stripes,), {"task": task})())
    module = reestimated_batchnorm(Deep(), held_out(other, 16, 16)[1], run.device)
    scores = block_scores(module, find_blocks(module, 16), other, 16)
    assert scores["blocks.1"] < 1e-9 < scores["blocks.2"] < scores["blocks.0"]
