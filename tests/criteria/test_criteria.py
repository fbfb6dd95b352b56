import numpy as np
import pytest
import torch
import torch_pruning
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from compress.criteria import CriterionSettings
from compress.criteria.magnitude import norms
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


@pytest.mark.parametrize(
    "settings", [{"use": "magnitude"}, {"use": "magnitude", "p": 1}, {"use": "taylor"}, {"use": "random"}]
)
def test_every_criterion_gives_one_finite_score_per_channel(settings: dict) -> None:
    criterion = TypeAdapter(CriterionSettings).validate_python(settings)
    weights = [torch.randn(5, 7), torch.randn(5, 2)]
    gradients = [torch.randn(5, 7), torch.randn(5, 2)] if criterion.needs_gradients else []
    scores = criterion(weights, gradients, torch.Generator())
    assert scores.shape == (5,)
    assert scores.isfinite().all()


def test_a_norm_other_than_1_and_2_is_refused() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(CriterionSettings).validate_python({"use": "magnitude", "p": 3})
