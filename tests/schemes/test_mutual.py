import copy

import numpy as np
import pytest
import torch
from networks_taught import digest, log_probabilities, logits, pruned, stage, without_dropout
from pydantic import ValidationError
from torch.autograd import gradcheck

from compress.errors import ModelError
from compress.measures import layers, macs
from compress.schemes.mutual import MutualLearning, mean_kl_to_others
from compress.stages.train import Train

SIZE = 16
COHORT = {"use": "mutual", "macs": [0.8, 0.6], "pruning": {"round_to": 4, "batchnorm_images": 64}}


@pytest.fixture
def student(product, run):
    return pruned(without_dropout(product), run)


@pytest.fixture
def cohort(monkeypatch):
    """Copies of the peers before training, and the peers themselves."""
    made = []
    peers = MutualLearning.peers

    def watched(self, original, run):
        found = peers(self, original, run)
        made.append((copy.deepcopy(found), found))
        return found

    monkeypatch.setattr(MutualLearning, "peers", watched)
    return made


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mean_divergence_against_numpy(temperature):
    values = logits(3)
    logs = [log_probabilities(value, temperature) for value in values]
    for index, found in enumerate(mean_kl_to_others(values, temperature)):
        apart = [
            (np.exp(other) * (other - logs[index])).sum(axis=1).mean()
            for place, other in enumerate(logs)
            if place != index
        ]
        np.testing.assert_allclose(found.item(), temperature**2 * np.mean(apart), rtol=1e-12)


def test_divergence_is_zero_among_equals_and_alone_and_has_a_direction():
    one, other = logits(2)
    assert [kl.item() for kl in mean_kl_to_others([one])] == [0.0]
    assert [kl.item() for kl in mean_kl_to_others([one, one, one])] == pytest.approx([0.0] * 3, abs=1e-12)
    forth, back = mean_kl_to_others([one, other])
    assert abs(forth - back) > 1e-3


def test_gradients_reach_the_own_logits_only():
    values = [value.requires_grad_(True) for value in logits(3, images=3)]
    assert gradcheck(lambda own: mean_kl_to_others([own, *values[1:]], 2.0)[0], values[:1])
    mean_kl_to_others(values)[1].backward()
    assert values[0].grad is None
    assert values[2].grad is None
    assert values[1].grad.abs().sum() > 0


def test_with_weight_zero_it_is_plain_training_bit_for_bit(student, run):
    plain = Train(use="train", epochs=2, batch_size=32, lr=0.02, warmup_epochs=0).apply(student, run)
    scheme = stage({**COHORT, "weight": 0, "with_teacher": False}, epochs=2).apply(student, run)
    assert digest(scheme.network.module) == digest(plain.network.module)


def test_with_weight_zero_and_a_teacher_it_is_plain_distillation_bit_for_bit(student, run):
    plain = stage(None, epochs=2).apply(student, run)
    scheme = stage({**COHORT, "weight": 0}, epochs=2).apply(student, run)
    assert digest(scheme.network.module) == digest(plain.network.module)
    learning = stage(COHORT, epochs=2).apply(student, run)
    assert digest(learning.network.module) != digest(plain.network.module)


def test_peers_are_as_wide_as_asked_and_trained_along(product, student, run, cohort):
    original = digest(product.network.module)
    made = stage({**COHORT, "macs": [1, 0.8, 0.6]}).apply(student, run)
    ((before, after),) = cohort
    whole = macs(product.network.module, SIZE)
    assert digest(before[0]) == original
    for share, narrow, entry in zip((0.8, 0.6), before[1:], made.metrics["peers"][1:], strict=True):
        assert share - 0.12 < macs(narrow, SIZE) / whole <= share
        assert entry["macs"] == macs(narrow, SIZE) / whole
        wide = {layer["name"]: layer["outputs"] for layer in layers(product.network.module, SIZE)}
        for layer in layers(narrow, SIZE):
            assert layer["outputs"] % 4 == 0 or layer["outputs"] == wide[layer["name"]]
    for one, other in zip(before, after, strict=True):
        assert digest(one) != digest(other)
        assert all(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert not other.training
    assert digest(product.network.module) == original
    state = student.network.module.state_dict()
    assert {name: t.shape for name, t in made.network.module.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


def test_losses_on_maps_with_trained_adaptors_go_along(student, run):
    losses = [{"use": "kd"}, {"use": "fitnets", "adaptor": "linear", "layers": ["down"]}]
    made = stage(COHORT, losses=losses).apply(student, run)
    assert set(made.metrics["layer_losses"]["fitnets"]) == {"down"}


def test_mistakes_are_found_before_training(product, run):
    check = stage({**COHORT, "macs": [0.8, 0.01]}).check
    with pytest.raises(ModelError, match=r"scheme mutual: `goal: \{macs: 0.01\}` is out of reach"):
        check(product.network.module, run.data.preprocess)
    keep = {**COHORT["pruning"], "keep": ["nothing"]}
    with pytest.raises(ModelError, match="scheme mutual: `keep: nothing` matches no"):
        stage({**COHORT, "pruning": keep}).check(product.network.module, run.data.preprocess)
    with pytest.raises(ValidationError, match="one network twice"):
        stage({**COHORT, "macs": [0.5, 0.5]})
