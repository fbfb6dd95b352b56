import copy

import numpy as np
import pytest
import torch
from networks_taught import digest, log_probabilities, logits, pruned, stage
from pydantic import ValidationError

from compress.losses.kd import soft_targets
from compress.losses.lesson import NO_LABEL
from compress.schemes.okddip import Okddip, attention, divergence, diverse_peers
from compress.stages.export import Export
from compress.teaching import objective


def mixing(images: int = 6, peers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(images, peers, peers, generator=generator, dtype=torch.float64).softmax(2)


def test_the_loss_is_both_levels_and_the_peers_labels():
    leader, *peers = logits(4)
    weights, labels, temperature = mixing(), torch.tensor([0, 1, 2, 3, 4, 0]), 3.0
    soft = np.stack([np.exp(log_probabilities(peer, temperature)) for peer in peers])

    def kl(target, student):
        return (target * (np.log(target) - log_probabilities(student, temperature))).sum(1).mean()

    expected = 0.7 * temperature**2 * kl(soft.mean(0), leader)
    for a, peer in enumerate(peers):
        target = sum(weights.numpy()[:, a, b, None] * soft[b] for b in range(3))
        expected += 0.7 * temperature**2 * kl(target, peer)
        expected -= log_probabilities(peer)[np.arange(6), labels.numpy()].mean()
    value = diverse_peers(leader, peers, weights, labels, temperature, 0.7)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    swapped = diverse_peers(peers[0], [leader, *peers[1:]], weights, labels, temperature, 0.7)
    assert swapped.item() != pytest.approx(expected)


def test_attention_is_a_softmax_of_products_over_the_peers_learnt_from():
    queries, keys = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    found = attention(queries, keys).numpy()
    q, k = queries.numpy(), keys.numpy()
    for n in range(4):
        energy = np.exp(q[n] @ k[n].T)
        np.testing.assert_allclose(found[n], energy / energy.sum(1, keepdims=True))


def test_peers_that_agree_have_nothing_to_teach():
    same = logits(1)[0]
    labels = torch.full((6,), NO_LABEL)
    assert diverse_peers(same, [same] * 3, mixing(), labels, 3.0, 1.0).item() == pytest.approx(0, abs=1e-12)


def test_the_divergence_is_that_of_soft_targets():
    student, teacher = logits(2)
    found = divergence((teacher / 3).softmax(1), student, 3.0)
    assert found.item() == pytest.approx(soft_targets(student, teacher, 3.0).item(), rel=1e-12)
    target = (teacher[:2] / 3).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: divergence(t, s, 3.0), [target, student[:2].requires_grad_()])


def test_underflown_probabilities_have_finite_gradients():
    peers = [(torch.randn(4, 5) * 1e4).requires_grad_() for _ in range(3)]
    leader = (torch.randn(4, 5) * 1e4).requires_grad_()
    diverse_peers(leader, peers, mixing(4).float(), torch.tensor([0, 1, 2, 3]), 3.0, 1.0).backward()
    assert all(value.grad.isfinite().all() for value in (leader, *peers))


def test_the_attention_learns_and_the_peers_learn_nothing_from_the_leader():
    leader, *peers = (value.requires_grad_() for value in logits(4))
    weights = mixing().requires_grad_()
    labels = torch.full((6,), NO_LABEL)
    diverse_peers(leader, peers, weights, labels, 3.0, 1.0).backward()
    assert weights.grad.abs().max() > 1e-6
    grads = [peer.grad.clone() for peer in peers]
    for peer in peers:
        peer.grad = None
    diverse_peers(10 * leader.detach(), peers, weights, labels, 3.0, 1.0).backward()
    assert all(torch.equal(peer.grad, grad) for peer, grad in zip(peers, grads, strict=True))


def test_every_part_of_the_companion_learns(product, run):
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module).train()
    scheme = Okddip(use="okddip", ramp=0)
    goal = objective(stage(None), student, run, student=module)
    cut, peers = scheme.build(student.network.module, run)
    assert cut == "down"
    scheme.step(goal, peers, cut, module, next(iter(run.data.batches("train", batch_size=16)))).backward()
    assert all(p.grad.any() for p in peers.parameters())


def test_from_a_recipe_the_leader_comes_back_in_its_own_shape(product, run):
    student = pruned(product, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    result = stage({"use": "okddip", "peers": 2}, epochs=2).apply(student, run)
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert list(result.network.module.state_dict()) == list(student.network.module.state_dict())
    assert result.metrics["after"] == "down"
    assert "float.onnx" in Export(use="export").apply(result, run).files
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        stage({"use": "okddip", "peers": 1})
