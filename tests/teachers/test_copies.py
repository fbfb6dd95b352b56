"""The student's own past as teacher: moving average, earlier epochs, and the student as it entered the stage."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet, randomized
from pydantic import ValidationError
from torch import nn

from compress.product import Batch, Network, Product, Run
from compress.stages.distill import Distill
from compress.stages.quantize import Quantize
from compress.teachers.earlier_epochs import EarlierEpochs, Snapshots
from compress.teachers.itself import Itself
from compress.teachers.moving_average import Average, MovingAverage, average_into, decay_at


@pytest.fixture
def batch(run: Run) -> Batch:
    return next(iter(run.data.batches("train", batch_size=8)))


def moved(module: nn.Module, generator: torch.Generator) -> None:
    """What a step of a training does to a network: other weights, other statistics."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).abs())
            else:
                tensor.add_(1)


def state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy().copy() for name, tensor in module.state_dict().items()}


def test_decay():
    """0, 1/2, 2/3 ...: a plain mean, until the decay is reached and stays."""
    assert [decay_at(step, 0.75) for step in range(6)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 4, 3 / 4])
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(5, 0.0) == 0.0


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.999])
def test_the_average_is_that_of_the_weights_of_all_steps(product, run, batch, decay):
    """Against numpy in float64; while the decay grows it is the mean of all weights so far."""
    generator = torch.Generator().manual_seed(0)
    student = copy.deepcopy(product.network.module)
    teacher = MovingAverage(use="moving_average", decay=decay).open(product, run)
    expected: dict[str, np.ndarray] = {}
    past = []
    for step in range(6):
        moved(student, generator)
        teacher.follow(student, replace(batch, step=step))
        past.append(state(student))
        keep = min(decay, 1 - 1 / (step + 1))
        for name, now in past[-1].items():
            floating = "num_batches" not in name
            expected[name] = keep * expected[name] + (1 - keep) * now if step and floating else now
    assert isinstance(teacher, Average)
    found = state(teacher.module)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        if decay == 0.999 and "num_batches" not in name:
            np.testing.assert_allclose(
                found[name], np.mean([each[name] for each in past], axis=0), rtol=1e-5, atol=1e-6
            )
    with torch.no_grad():
        torch.testing.assert_close(teacher.answers(batch, ()).logits_NK, teacher.module(batch.images_NCHW))
    assert teacher.network.module is teacher.module
    assert teacher.fingerprint is None


def test_averaging_leaves_the_student_alone(product):
    student, average = randomized(SmallNet(), 1), randomized(SmallNet(), 2)
    before = state(student)
    average_into(average, student, 0.5)
    assert all(np.array_equal(before[name], value) for name, value in state(student).items())
    average_into(average, student, 0.0)
    assert all(np.allclose(before[name], value, rtol=1e-6) for name, value in state(average).items())


SELVES = [MovingAverage(use="moving_average"), EarlierEpochs(use="earlier_epochs"), Itself(use="itself")]


@pytest.mark.parametrize("settings", SELVES, ids=lambda settings: settings.use)
def test_a_copy_is_frozen_and_in_eval_mode_whatever_the_student_is(product, run, batch, settings):
    teacher = settings.open(product, run)
    student = copy.deepcopy(product.network.module).train()
    expected = copy.deepcopy(student).eval()
    teacher.follow(student, batch)
    for layers in ((), ("stem", "head")):
        said = teacher.answers(batch, layers)
        assert not said.logits_NK.requires_grad
        torch.testing.assert_close(said.logits_NK, expected(batch.images_NCHW))
        assert set(said.maps) == set(layers)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    pixels = batch.images_NCHW.clone().requires_grad_(True)
    said = teacher.answers(replace(batch, images_NCHW=pixels), (), differentiable=True)
    said.logits_NK.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert settings.folders() == ()
    assert teacher.related


@pytest.mark.parametrize("settings", SELVES, ids=lambda settings: settings.use)
def test_before_the_first_step_the_network_that_entered_answers(product, run, batch, settings):
    said = settings.open(product, run).answers(batch, ("stem",))
    torch.testing.assert_close(said.logits_NK, product.network.module(batch.images_NCHW))


@pytest.mark.parametrize(
    ("every", "ago", "expected"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5, 6, 7]),  # the end of the epoch before, which is how this epoch began
        (1, 3, [0, 0, 0, 1, 2, 3, 4, 5]),
        (3, 1, [0, 0, 0, 3, 3, 3, 6, 6]),
        (3, 2, [0, 0, 0, 0, 0, 0, 3, 3]),
        (20, 1, [0] * 8),
    ],
)
def test_which_epoch_teaches(product, run, batch, every, ago, expected):
    """`expected[epoch]` is the epoch at whose start the student was as its teacher is."""
    student = copy.deepcopy(product.network.module)
    teacher = EarlierEpochs(use="earlier_epochs", every=every, ago=ago).open(product, run)
    generator = torch.Generator().manual_seed(0)
    begun = []
    for epoch in range(8):
        begun.append(copy.deepcopy(student).eval())
        for _ in range(2):
            teacher.follow(student, replace(batch, epoch=epoch))
            said = teacher.answers(batch, ()).logits_NK
            torch.testing.assert_close(said, begun[expected[epoch]](batch.images_NCHW), rtol=0, atol=0)
            moved(student, generator)
    assert isinstance(teacher, Snapshots)
    assert len(teacher.copies) <= ago
    assert teacher.network.module is teacher.copies[0]


def test_itself_stays_as_it_entered(product, run, batch):
    teacher = Itself(use="itself").open(product, run)
    before = copy.deepcopy(product.network.module)
    student = copy.deepcopy(product.network.module)
    moved(student, torch.Generator().manual_seed(0))
    teacher.follow(student, batch)
    torch.testing.assert_close(teacher.answers(batch, ()).logits_NK, before(batch.images_NCHW))
    assert teacher.fingerprint is not None


@pytest.mark.parametrize("settings", SELVES, ids=lambda settings: settings.use)
@pytest.mark.parametrize("views", [None, 1])
def test_trainings(product: Product, run: Run, settings: Any, views: int | None):
    """Soft targets and maps of oneself: the student gets nearer the labels, and nothing of what entered moves."""
    before = copy.deepcopy(product.network.module.state_dict())
    losses = ({"use": "kd"}, {"use": "attention", "weight": 1.0})
    options = {"epochs": 3, "batch_size": 16, "lr": 0.02, "labels": 1.0, "losses": losses, "views": views}
    distilled = Distill(use="distill", teacher=settings, **options).apply(product, run)
    history = distilled.metrics["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(before[name], value) for name, value in product.network.module.state_dict().items())


@pytest.mark.parametrize("settings", SELVES, ids=lambda settings: settings.use)
def test_a_quantized_student_learns_from_itself(product: Product, run: Run, settings: Any):
    """The student in training has fake quantization that the network which entered has not."""
    block = {"teacher": settings, "losses": ({"use": "kd"}, {"use": "attention", "weight": 1.0, "layers": ("down",)})}
    stage = Quantize(
        use="quantize", epochs=2, batch_size=16, lr=0.001, calibration_images=16, distill=block, hold_grids_after=0.5
    )
    quantized = stage.apply(product, run)
    assert quantized.network.structure.quantize is not None


def test_mistakes_are_refused():
    for wrong in ({"decay": 1.0}, {"decay": -0.1}, {"every": 1}):
        with pytest.raises(ValidationError):
            MovingAverage(use="moving_average", **wrong)
    for wrong in ({"every": 0}, {"ago": 0}, {"ago": 1.5}):
        with pytest.raises(ValidationError):
            EarlierEpochs(use="earlier_epochs", **wrong)


def test_the_teacher_of_a_network_that_cannot_be_traced(product, run, batch):
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    product = replace(product, network=Network(randomized(Branching()), product.network.structure))
    for settings in SELVES:
        teacher = settings.open(product, run)
        teacher.follow(product.network.module, batch)
        torch.testing.assert_close(teacher.answers(batch, ()).logits_NK, product.network.module(batch.images_NCHW))
