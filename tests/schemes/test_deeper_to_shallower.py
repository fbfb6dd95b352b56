import copy

import networks
import numpy as np
import pytest
import torch
from conftest import SmallNet, randomized
from networks_taught import digest, log_probabilities, logits, pruned, stage

from compress.errors import ModelError
from compress.losses.lesson import NO_LABEL
from compress.schemes.deeper_to_shallower import DeeperToShallower, Head, self_distillation
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.teaching import objective

SCHEME = {"use": "deeper_to_shallower"}
WEIGHTS = {"labels": 0.7, "soft": 0.3, "temperature": 3.0, "hints": 0.03}


def features(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_the_loss_is_labels_softened_predictions_and_hints():
    (shallow, deepest), (mine, theirs) = logits(2), features(2)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    log_p, log_q = log_probabilities(deepest, 3.0), log_probabilities(shallow, 3.0)
    expected = (
        -0.7 * log_probabilities(shallow)[np.arange(6), labels.numpy()].mean()
        + 0.3 * 9 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
        + 0.03 * ((mine.numpy() - theirs.numpy()) ** 2).sum(1).mean()
    )
    value = self_distillation(shallow, mine, labels, deepest_NK=deepest, deepest_NC=theirs, **WEIGHTS)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    swapped = self_distillation(deepest, mine, labels, deepest_NK=shallow, deepest_NC=theirs, **WEIGHTS)
    assert swapped.item() != pytest.approx(expected)


def test_the_deepest_is_a_target_and_nothing_is_left_to_learn_where_they_agree():
    (same,), (also,) = logits(1), features(1)
    none = torch.full((6,), NO_LABEL)
    value = self_distillation(same, also, none, deepest_NK=same, deepest_NC=also, **WEIGHTS)
    assert value.item() == pytest.approx(0, abs=1e-12)
    tensors = [value.requires_grad_() for value in (*logits(2), *features(2))]
    shallow, deepest, mine, theirs = tensors
    self_distillation(shallow, mine, none, deepest_NK=deepest, deepest_NC=theirs, **WEIGHTS).backward()
    assert deepest.grad is None
    assert theirs.grad is None
    labels = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda z, f: self_distillation(
            z, f, labels, deepest_NK=deepest.detach()[:2], deepest_NC=theirs.detach()[:2], **WEIGHTS
        ),
        [shallow.detach()[:2].requires_grad_(), mine.detach()[:2].requires_grad_()],
    )


@pytest.mark.parametrize("shallow", [(5, 32, 32), (5, 17, 17), (9, 4, 4), (7, 8, 8)])
def test_a_head_reaches_the_deepest_maps_channels_at_about_its_size(shallow):
    head = Head(shallow, (24, 4, 4), 10).train()
    maps = torch.zeros(3, *shallow, requires_grad=True)
    reached = head.bottleneck(maps)
    assert reached.shape[1] == 24
    assert reached.shape[2] in ((4, 5) if shallow[1] > 4 else (2,))
    out, said = head(maps)
    assert (out.shape, said.shape) == ((3, 24), (3, 10))
    (out.square().sum() + said.square().sum()).backward()  # dead maps
    assert maps.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_auto_takes_the_ends_of_all_stages():
    module = networks.resnet18().eval()
    chosen = DeeperToShallower(use="deeper_to_shallower").chosen(module, 64)
    assert list(chosen) == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert chosen["layer4"] == (128, 2, 2)


def test_layers_are_taken_in_the_order_in_which_they_run():
    chosen = DeeperToShallower(use="deeper_to_shallower", layers=("down", "st*", "point")).chosen(SmallNet(), 16)
    assert list(chosen) == ["stem", "stem_bn", "point", "down"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["haed"], "scheme deeper_to_shallower: `layers: haed` matches no layer; .* head"),
        (["down"], "down is the only layer"),
        (["down", "head"], r"layer head returns no map \(C, H, W\)"),
    ],
)
def test_other_layers_are_refused_before_training(product, run, layers, message):
    with pytest.raises(ModelError, match=message):
        stage({**SCHEME, "layers": layers}).check(product.network.module, run.data.preprocess)


def test_shallow_layers_learn_from_their_classifiers_and_deep_ones_do_not(run, product):
    """Behind the last classifier's layer, gradients are those of the student's own loss, digit by digit."""
    module = randomized(SmallNet()).train()
    module.dropout.p = 0.0
    scheme = DeeperToShallower(use="deeper_to_shallower")
    heads, deepest = scheme.build(product.network.module, run)
    assert deepest == "pool"
    goal = objective(stage(None), product, run, student=module)
    batch = next(iter(run.data.batches("train", batch_size=16)))
    scheme.step(goal, heads, deepest, module, batch).backward()
    with_heads = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    goal.loss(module, batch).backward()
    alone = {name: p.grad for name, p in module.named_parameters()}
    assert torch.equal(with_heads["head.weight"], alone["head.weight"])
    assert not torch.allclose(with_heads["stem.weight"], alone["stem.weight"])
    assert all(p.grad.any() for head in heads.values() for p in head.parameters())


@pytest.mark.parametrize("quantized", [False, True])
def test_from_a_recipe_the_student_comes_back_in_its_own_shape(product, run, quantized):
    student = pruned(product, run)
    if quantized:
        student = Quantize(use="quantize", epochs=0, calibration_images=16).apply(student, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    scheme = {**SCHEME, "layers": ["point", "down"]} if quantized else SCHEME
    result = stage(scheme, epochs=2, losses=[{"use": "fitnets", "layers": ["down"]}]).apply(student, run)
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert list(result.network.module.state_dict()) == list(student.network.module.state_dict())
    assert result.metrics["layers"][-1] == ("down" if quantized else "pool")
    assert result.metrics["layer_losses"]["fitnets"]["down"] > 0
    assert Export(use="export").apply(result, run).files


def test_the_same_seed_gives_the_same_heads(product, run):
    scheme = DeeperToShallower(use="deeper_to_shallower")
    torch.manual_seed(1)
    one = scheme.build(product.network.module, run)[0]
    torch.manual_seed(2)
    two = scheme.build(copy.deepcopy(product.network.module), run)[0]
    for name in one:
        assert all(torch.equal(a, b) for a, b in zip(one[name].parameters(), two[name].parameters(), strict=True))
