import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks_taught import digest, log_probabilities, logits, pruned, stage
from pydantic import ValidationError
from test_data_free import Unseen

from compress.schemes.generator import Generator, Noise
from compress.schemes.hard_examples import HardExamples, as_given, discrepancy
from compress.stages.export import Export
from compress.teaching import objective

SCHEME = {"use": "hard_examples", "steps": 6, "student_steps": 3, "latent": 20, "channels": 8}


def test_the_discrepancies_against_numpy():
    student, teacher = logits(2)
    assert discrepancy(student, teacher, "l1").item() == pytest.approx(np.abs(student.numpy() - teacher.numpy()).mean())
    log_p, log_q = log_probabilities(teacher), log_probabilities(student)
    kl = discrepancy(student, teacher, "kl")
    assert kl.item() == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    assert discrepancy(teacher, student, "kl").item() != pytest.approx(kl.item())
    assert discrepancy(student, student, "l1").item() == discrepancy(student, student, "kl").item() == 0
    for loss in ("l1", "kl"):
        pair = [value[:2].requires_grad_() for value in logits(2)]
        assert torch.autograd.gradcheck(lambda s, t, loss=loss: discrepancy(s, t, loss), pair)


def test_a_network_as_given_answers_the_same_and_keeps_still(product):
    module = product.network.module.train()
    module.dropout.p = 0.0
    images = torch.randn(8, 3, 16, 16, requires_grad=True)
    before = digest(module)
    found = as_given(module, images)
    assert digest(module) == before
    found.square().sum().backward()
    assert images.grad.any()
    assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(found, module(images))
    assert digest(module) != before  # the statistics of a forward pass in training


@pytest.mark.parametrize("loss", ["l1", "kl"])
def test_the_generator_goes_up_where_the_student_goes_down(product, run, loss):
    """The generator's gradient is minus that of the discrepancy, through student and teacher; the student's is that of
    its own loss on images that are given."""
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module).train()
    module.dropout.p = 0.0
    blind = replace(run, data=Noise(Unseen(), 20, 32))
    scheme = HardExamples(**SCHEME, loss=loss, weight=2.0)
    goal = objective(stage(None), student, blind, student=module)
    generator = Generator(20, 16, 8).train()
    batch = next(iter(blind.data.batches("train", batch_size=8)))

    value = scheme.step(goal, generator, module, batch, generators_turn=True)
    value.backward()
    found = [[p.grad.clone() for p in side.parameters()] for side in (generator, module)]
    for side in (generator, module):
        side.zero_grad()
    alone = scheme.step(goal, generator, module, batch, generators_turn=False)
    alone.backward()
    assert value.item() == pytest.approx(alone.item(), rel=1e-5)
    torch.testing.assert_close(found[1], [p.grad for p in module.parameters()])
    assert all(p.grad is None for p in generator.parameters())

    module.zero_grad()
    teacher = copy.deepcopy(student.parent.module).eval()
    images = generator(batch.images_NCHW)
    (2.0 * discrepancy(module(images), teacher(images), loss)).backward()
    torch.testing.assert_close(found[0], [-p.grad for p in generator.parameters()], atol=1e-6, rtol=1e-3)


def test_a_step_up_makes_images_on_which_they_differ_more(product, run):
    student = pruned(product, run)
    module = student.network.module
    blind = replace(run, data=Noise(Unseen(), 20, 32))
    scheme = HardExamples(**SCHEME)
    goal = objective(stage(None), student, blind, student=module)
    torch.manual_seed(0)
    generator = Generator(20, 16, 8).train()
    batch = next(iter(blind.data.batches("train", batch_size=16)))
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        made = replace(batch, images_NCHW=generator(batch.images_NCHW))
        loss = scheme.of_generator(goal, module, made)
        loss.backward()
        optimizer.step()
        values.append(-loss.item())
    assert values[-1] > 1.1 * values[0]


@pytest.mark.parametrize("loss", ["l1", "kl"])
def test_from_a_recipe_no_image_is_read_and_no_teacher_moves(product, run, loss):
    student = pruned(product, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    distill = stage({**SCHEME, "loss": loss}, epochs=2, batch_size=8, losses=[{"use": "kd", "weight": 0.0}])
    result = distill.apply(student, replace(run, data=Unseen()))
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert list(result.network.module.state_dict()) == list(student.network.module.state_dict())
    assert result.metrics["scheme"] == "hard_examples"
    assert Export(use="export").apply(result, run).files


def test_the_generator_moves_in_its_turn_only(product, run, monkeypatch):
    student = pruned(product, run)
    turns = []
    step = HardExamples.step

    def watched(self, goal, generator, module, batch, *, generators_turn):
        turns.append((generators_turn, digest(generator.first)))
        return step(self, goal, generator, module, batch, generators_turn=generators_turn)

    monkeypatch.setattr(HardExamples, "step", watched)
    stage(SCHEME, batch_size=8).apply(student, replace(run, data=Unseen()))
    assert [turn for turn, _ in turns] == [False, False, True] * 2
    weights = [weight for _, weight in turns]
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] == weights[4] == weights[5] != weights[2]


def test_views_of_generated_images_are_refused():
    with pytest.raises(ValidationError, match="`hard_examples` generates its images: no `views`"):
        stage(SCHEME, views=2)
