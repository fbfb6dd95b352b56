import numpy as np
import pytest
import torch
from networks_taught import digest, pruned, stage
from pydantic import ValidationError
from torch import Tensor, nn

from compress.errors import ModelError
from compress.schemes import born_again
from compress.schemes.born_again import Together, reinitialized


@pytest.fixture
def taught(monkeypatch):
    """Who was trained from what by whom, in turn."""
    calls, teach = [], born_again.teach

    def watched(module, settings, product, run, *, label, teacher=None):
        trained, metrics = teach(module, settings, product, run, label=label, teacher=teacher)
        calls.append({"from": digest(module), "teacher": teacher, "made": trained, "label": label, "seed": run.seed})
        return trained, metrics

    monkeypatch.setattr(born_again, "teach", watched)
    return calls


def test_each_generation_is_taught_by_the_one_before_and_starts_where_all_started(product, run, taught):
    student = pruned(product, run)
    before, original = digest(student.network.module), digest(product.network.module)
    made = stage({"use": "born_again", "generations": 3}).apply(student, run)

    first, second, third = taught
    assert first["teacher"] is None  # the recipe's
    for this, earlier in ((second, first), (third, second)):
        assert digest(this["teacher"].network.module) == digest(earlier["made"])
        assert this["teacher"].network.structure == student.network.structure
    assert {call["from"] for call in taught} == {before}
    assert len({digest(call["made"]) for call in taught}) == 3
    assert len({call["seed"] for call in taught}) == 3
    assert [call["label"] for call in taught] == [f"distill generation {n}/3" for n in (1, 2, 3)]

    assert digest(made.network.module) == digest(third["made"])
    assert (digest(student.network.module), digest(product.network.module)) == (before, original)
    assert [entry["generation"] for entry in made.metrics["history"]] == [1, 2, 3]
    assert [entry["generation"] for entry in made.metrics["generations"]] == [1, 2, 3]


def test_one_generation_is_plain_distillation_bit_for_bit(product, run):
    student = pruned(product, run)
    plain = stage(None).apply(student, run)
    scheme = stage({"use": "born_again", "generations": 1}).apply(student, run)
    assert digest(scheme.network.module) == digest(plain.network.module)


def test_accuracies_are_those_of_the_networks_and_of_their_mean(product, run, taught):
    scheme = {"use": "born_again", "generations": 2, "ensemble": True}
    metrics = stage(scheme, epochs=3).apply(pruned(product, run), run).metrics
    images_NCHW, labels_N = run.data.splits["evaluation"]
    said = [call["made"](images_NCHW).detach().numpy() for call in taught]
    right = [float((each.argmax(1) == labels_N.numpy()).mean()) for each in said]
    assert [entry["accuracy"] for entry in metrics["generations"]] == pytest.approx(right)
    together = float((((said[0] + said[1]) / 2).argmax(1) == labels_N.numpy()).mean())
    assert metrics["ensemble_accuracy"] == pytest.approx(together)


def test_the_ensemble_may_teach_one_more(product, run, taught):
    student = pruned(product, run)
    made = stage({"use": "born_again", "generations": 2, "from_ensemble": True}).apply(student, run)
    last = taught[-1]
    members = [digest(member.network.module) for member in last["teacher"].members]
    assert members == [digest(call["made"]) for call in taught[:-1]]
    assert (last["teacher"].of, last["teacher"].network) == ("logits", last["teacher"].members[-1].network)
    assert last["label"] == "distill from the ensemble"
    assert digest(made.network.module) == digest(last["made"])
    assert made.metrics["history"][-1]["generation"] == "ensemble"


def test_losses_on_maps_go_along(product, run):
    scheme = {"use": "born_again", "generations": 2, "from_ensemble": True}
    losses = [{"use": "kd"}, {"use": "fitnets", "layers": ["down"]}]
    metrics = stage(scheme, losses=losses).apply(pruned(product, run), run).metrics
    assert set(metrics["layer_losses"]["fitnets"]) == {"down"}


def test_together_is_the_mean_of_logits_against_numpy(product, run):
    members = [pruned(product, run).network.module, product.network.module]
    images_NCHW, _ = run.data.splits["evaluation"]
    with torch.no_grad():
        expected = np.mean([member(images_NCHW).numpy() for member in members], axis=0)
        np.testing.assert_allclose(Together(members)(images_NCHW).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not any(member.training for member in members)


def test_fresh_weights_keep_the_shape_and_repeat_with_the_seed(product, run):
    student = pruned(product, run).network.module
    before = digest(student)
    fresh = [reinitialized(student, seed) for seed in (1, 1, 2)]
    assert digest(fresh[0]) == digest(fresh[1]) != digest(fresh[2])
    assert digest(student) == before
    state = fresh[0].state_dict()
    for name, tensor in student.state_dict().items():
        assert state[name].shape == tensor.shape
        assert not torch.equal(state[name], tensor) or name.endswith("num_batches_tracked")
    assert torch.equal(fresh[0].stem_bn.running_mean, torch.zeros_like(fresh[0].stem_bn.running_mean))


def test_fresh_generations_start_apart(product, run, taught):
    stage({"use": "born_again", "generations": 2, "reinitialize": True}).apply(pruned(product, run), run)
    assert len({call["from"] for call in taught}) == 2


def test_weights_that_cannot_be_drawn_anew_are_named_before_training(run):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, images_NCHW: Tensor) -> Tensor:
            return images_NCHW * self.scale

    module = nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    with pytest.raises(ModelError, match="1: `reinitialize` cannot draw the weights of a Scaled anew"):
        stage({"use": "born_again", "reinitialize": True}).check(module, run.data.preprocess)


def test_an_ensemble_of_one_is_refused():
    with pytest.raises(ValidationError, match="2 or more"):
        stage({"use": "born_again", "generations": 1, "ensemble": True})
