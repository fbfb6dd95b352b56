import numpy as np
import pytest
import torch
import torch_pruning
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from compress.criteria import CriterionSettings, Evidence
from compress.criteria.activation import mean_absolute, part_not_zero
from compress.criteria.bn_scale import scale_sums
from compress.criteria.fisher import fisher
from compress.criteria.fpgm import distances
from compress.criteria.lamp import lamp
from compress.criteria.magnitude import norms
from compress.criteria.obd import saliency
from compress.criteria.random import uniform
from compress.criteria.taylor import first_order
from compress.models.coupled import channel_rows, find_coupled


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    ).eval()


def rows(module: nn.Module, coupled, of) -> list[torch.Tensor]:
    return [
        channel_rows(layer := module.get_submodule(name), side, of(layer.weight))[channels.flatten()].reshape(
            coupled.units, -1
        )
        for (name, side), channels in coupled.places.items()
    ]


@pytest.mark.parametrize("p", [1, 2])
def test_norms_agree_with_torch_pruning(p: int) -> None:
    module = chain()
    theirs = torch_pruning.importance.GroupMagnitudeImportance(p=p, group_reduction="sum", normalizer=None)
    graph = torch_pruning.DependencyGraph().build_dependency(module, (torch.zeros(1, 3, 8, 8),))
    for coupled in find_coupled(module, 8)[0]:
        root = next(
            module.get_submodule(n) for n in coupled.producers if isinstance(module.get_submodule(n), nn.Conv2d)
        )
        group = graph.get_pruning_group(root, torch_pruning.prune_conv_out_channels, list(range(root.out_channels)))
        expected = theirs(group) ** (1 / p)
        ours = norms(rows(module, coupled, lambda weight: weight.detach()), p)
        torch.testing.assert_close(ours, expected)


def test_first_order_is_the_squared_weight_times_gradient_per_filter() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 3, 3, bias=False)
    F.mse_loss(conv(torch.randn(4, 2, 5, 5)), torch.randn(4, 3, 3, 3)).backward()
    weight, gradient = conv.weight.detach().double().numpy(), conv.weight.grad.double().numpy()
    by_hand = np.zeros(3)
    for c, i, y, x in np.ndindex(3, 2, 3, 3):
        by_hand[c] += weight[c, i, y, x] ** 2 * gradient[c, i, y, x] ** 2
    score = first_order([conv.weight.detach().flatten(1)], [conv.weight.grad.flatten(1)])
    torch.testing.assert_close(score.double(), torch.tensor(by_hand), rtol=1e-5, atol=0)


def test_first_order_adds_up_over_coupled_layers() -> None:
    weights = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]])]
    gradients = [torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[2.0], [1.0]])]
    assert first_order(weights, gradients).tolist() == [1 + 4 + 100, 64 + 36]


def test_random_repeats_with_its_seed_only() -> None:
    def draw(seed: int) -> torch.Tensor:
        return uniform(8, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_bn_scales_agree_with_torch_pruning() -> None:
    module = chain()
    nn.init.normal_(module[1].weight)
    graph = torch_pruning.DependencyGraph().build_dependency(module, (torch.zeros(1, 3, 8, 8),))
    group = graph.get_pruning_group(module[0], torch_pruning.prune_conv_out_channels, list(range(6)))
    theirs = torch_pruning.importance.BNScaleImportance(group_reduction="sum", normalizer=None)(group)
    torch.testing.assert_close(scale_sums([module[1].weight.detach()[:, None]]), theirs)


def test_lamp_is_the_papers_formula_with_channels_for_weights() -> None:
    weights = [torch.randn(7, 3), torch.randn(7, 5)]
    squared = np.array([sum(float(w[c].square().sum()) for w in weights) for c in range(7)])
    by_hand = [squared[c] / squared[squared >= squared[c]].sum() for c in range(7)]
    torch.testing.assert_close(lamp(weights), torch.tensor(by_hand, dtype=torch.float32))


def test_lamp_agrees_with_torch_pruning() -> None:
    module = chain()
    graph = torch_pruning.DependencyGraph().build_dependency(module, (torch.zeros(1, 3, 8, 8),))
    group = graph.get_pruning_group(module[0], torch_pruning.prune_conv_out_channels, list(range(6)))
    (coupled,) = [each for each in find_coupled(module, 8)[0] if each.name == "0"]
    theirs = torch_pruning.importance.LAMPImportance(p=2, group_reduction="sum")(group)
    torch.testing.assert_close(lamp(rows(module, coupled, lambda weight: weight.detach())), theirs)


def test_lamp_leaves_the_largest_channel_of_every_layer_a_score_of_one() -> None:
    for scale in (1e-6, 1.0, 1e6):
        assert lamp([scale * torch.randn(9, 4)]).max() == 1


def test_lamp_of_dead_channels_is_zero() -> None:
    assert lamp([torch.zeros(3, 4)]).tolist() == [0, 0, 0]


def test_fpgm_prefers_to_lose_what_lies_among_the_others() -> None:
    filters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    by_hand = [sum(float((a - b).norm()) for b in filters) for a in filters]
    scores = distances([filters])
    torch.testing.assert_close(scores, torch.tensor(by_hand))
    assert scores.argmin() == 0
    torch.testing.assert_close(distances([filters, 2 * filters]), 3 * scores)


def test_fisher_is_what_a_quadratic_loss_rises_by() -> None:
    # The answers y = (a + b) x, unit variance: -log p = (y - t)^2 / 2. Without channel a, the expected loss rises by
    # (a x)^2 / 2, exactly, because the loss is quadratic and t is drawn from the model.
    a, x = 0.7, torch.randn(200000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = (error * a * x)[:, None]
    torch.testing.assert_close(fisher(slopes)[0], (a * x).square().mean() / 2, rtol=2e-2, atol=0)


def test_obd_is_half_the_diagonal_quadratic_form() -> None:
    weights, gradients = [torch.randn(4, 6)], [torch.rand(4, 6)]
    for channel in range(4):
        w, h = weights[0][channel].double(), torch.diag(gradients[0][channel].double() ** 2)
        torch.testing.assert_close(saliency(weights, gradients)[channel].double(), w @ h @ w / 2, rtol=1e-5, atol=0)


def test_statistics_of_activations() -> None:
    read_NCE = torch.tensor([[[0.0, 2.0, -2.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    assert mean_absolute(read_NCE).tolist() == [[1.0, 0.25]]
    assert part_not_zero(read_NCE).tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    "use", ["magnitude", "taylor", "bn_scale", "lamp", "fpgm", "fisher", "obd", "activation", "random"]
)
def test_every_criterion_gives_one_finite_score_per_channel(use: str) -> None:
    criterion = TypeAdapter(CriterionSettings).validate_python({"use": use})
    evidence = Evidence(
        weights=[torch.randn(5, 7), torch.randn(5, 1), torch.randn(5, 2)],
        roles=["makes", "normalizes", "reads"],
        gradients=[torch.randn(5, 7), torch.randn(5, 1), torch.randn(5, 2)],
        mask_gradients_NC=torch.randn(8, 5),
        activations_NC=torch.rand(8, 5),
    )
    scores = criterion(evidence)
    assert scores.shape == (5,)
    assert scores.isfinite().all()
    assert (scores >= 0).all()


def test_a_norm_other_than_1_and_2_is_refused() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(CriterionSettings).validate_python({"use": "magnitude", "p": 3})
