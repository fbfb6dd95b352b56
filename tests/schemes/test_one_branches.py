import copy

import numpy as np
import pytest
import torch
from networks_taught import digest, log_probabilities, logits, pruned, stage
from torch import nn

from compress.errors import ModelError
from compress.losses.lesson import NO_LABEL
from compress.product import Batch, Network
from compress.schemes.one_branches import Gate, One, gated, native_ensemble
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.teaching import objective

PAPER = {"labels": 1.0, "losses": [{"use": "kd", "weight": 0.0}]}


def weights(images: int = 6, branches: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(images, branches, generator=generator, dtype=torch.float64).softmax(1)


def test_the_loss_is_the_papers_sum_less_the_first_branchs_labels():
    values, gate_NM, labels = logits(3), weights(), torch.tensor([0, 1, 2, 3, 4, 0])
    z = [value.numpy() for value in values]
    ensemble = sum(gate_NM.numpy()[:, i : i + 1] * z[i] for i in range(3))
    temperature = 3.0

    def entropy(logits_NK):
        return -log_probabilities(torch.as_tensor(logits_NK))[np.arange(6), labels.numpy()].mean()

    log_q = log_probabilities(torch.as_tensor(ensemble), temperature)
    divergences = [(np.exp(log_q) * (log_q - log_probabilities(value, temperature))).sum(1).mean() for value in values]
    expected = entropy(z[1]) + entropy(z[2]) + entropy(ensemble) + 0.5 * temperature**2 * sum(divergences)
    value = native_ensemble(values, gate_NM, labels, temperature, 0.5)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert native_ensemble(values[::-1], gate_NM, labels, temperature, 0.5).item() != pytest.approx(expected)


def test_a_gate_of_one_branch_is_that_branch_and_equal_weights_are_the_mean():
    values = logits(3)
    one_hot = torch.eye(3, dtype=torch.float64)[torch.zeros(6, dtype=torch.int64) + 1]
    torch.testing.assert_close(gated(values, one_hot), values[1])
    torch.testing.assert_close(gated(values, torch.full_like(one_hot, 1 / 3)), torch.stack(values).mean(0))


def test_the_ensemble_learns_from_the_labels_alone():
    """Distillation sends no gradient to the gate; to a branch, T (softmax(z / T) - softmax(e / T)) / N of it."""
    values, gate_NM = [value.requires_grad_() for value in logits(3)], weights().requires_grad_()
    labels = torch.full((6,), NO_LABEL)
    native_ensemble(values, gate_NM, labels, 3.0, 1.0).backward()
    assert not gate_NM.grad.any()
    ensemble = gated(values, gate_NM).detach()
    for value in values:
        expected = 3 * ((value.detach() / 3).softmax(1) - (ensemble / 3).softmax(1)) / 6
        torch.testing.assert_close(value.grad, expected)
    labels[0] = 2
    native_ensemble(values, gate_NM, labels, 3.0, 0.0).backward()
    assert gate_NM.grad[0].any()
    assert not gate_NM.grad[1:].any()


def test_gradients_agree_with_finite_differences():
    values = [value[:2].requires_grad_() for value in logits(2)]
    gate_NM = weights()[:2, :2].requires_grad_()
    labels = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(
        lambda a, b, gate: native_ensemble([a, b], gate, labels, 3.0, 0.0), [*values, gate_NM]
    )


def test_a_gates_rows_sum_to_one_also_over_dead_maps():
    gate = Gate(4, 3).train()
    torch.testing.assert_close(gate(torch.randn(8, 4, 5, 5)).sum(1), torch.ones(8))
    dead = torch.zeros(8, 4, 5, 5, requires_grad=True)
    gate(dead).square().sum().backward()
    assert dead.grad.isfinite().all()
    assert gate.layers[0].weight.grad.isfinite().all()


def test_the_trunk_learns_from_all_branches_and_each_tail_from_its_own(product, run):
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module).train()
    scheme = One(use="one", after="down", ramp=0)
    taught = stage({"use": "one"}, **PAPER)
    goal = objective(taught, student, run, student=module)
    cut, branches = scheme.build(student.network.module, run)
    batch = next(iter(run.data.batches("train", batch_size=16)))
    scheme.step(goal, branches, cut, module, batch).backward()
    together = module.stem.weight.grad.clone()
    module.zero_grad()
    goal.loss(module, batch).backward()
    assert not torch.allclose(together, module.stem.weight.grad)
    assert all(p.grad is not None and p.grad.any() for p in branches.tails.parameters())
    assert branches.gate.layers[0].weight.grad.any()


def test_from_a_recipe_the_student_comes_back_in_its_own_shape(product, run):
    student = pruned(product, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    result = stage({"use": "one", "branches": 2}, epochs=2).apply(student, run)
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert {k: v.shape for k, v in result.network.module.state_dict().items()} == {
        k: v.shape for k, v in student.network.module.state_dict().items()
    }
    assert result.metrics["scheme"] == "one"
    assert result.metrics["after"] == "down"
    assert len(result.metrics["history"]) == 2
    quantized = Quantize(use="quantize", epochs=0, calibration_images=16).apply(result, run)
    assert "int8.onnx" in Export(use="export").apply(quantized, run).files


def test_what_cannot_be_cut_is_refused_before_training(product, run):
    with pytest.raises(ModelError, match="layer point: the network cannot be cut here"):
        stage({"use": "one", "after": "point"}).check(product.network.module, run.data.preprocess)
    quantized = Quantize(use="quantize", epochs=0, calibration_images=16).apply(product, run)
    with pytest.raises(ModelError, match=r"already quantized.*put `distill` with `scheme: \{use: one\}` before"):
        stage({"use": "one"}).apply(quantized, run)


def test_branches_do_not_disturb_each_other_when_the_images_have_no_labels(product, run):
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module).train()
    scheme = One(use="one", after="down", ramp=0)
    goal = objective(stage(None), student, run, student=module)
    cut, branches = scheme.build(student.network.module, run)
    images = next(iter(run.data.batches("train", batch_size=8))).images_NCHW
    value = scheme.step(goal, branches, cut, module, Batch(images, torch.full((8,), NO_LABEL)))
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in nn.ModuleList([module, branches.tails]).parameters())


def test_without_a_parent_the_network_is_its_own_teacher(product, run):
    result = stage({"use": "one"}, **PAPER).apply(product, run)
    assert isinstance(result.network, Network)
    assert result.parent is None
