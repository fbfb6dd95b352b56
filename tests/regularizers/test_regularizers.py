"""Penalties that make a training sparse: their gradients against other formulas, and what they do to a network."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch_pruning
from networks import NETWORKS
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from compress.errors import ModelError
from compress.measures import macs
from compress.models.coupled import find_coupled
from compress.product import Batch, Product
from compress.pruning import MacGoal, Pruning, prune_network
from compress.regularizers import SparsitySettings
from compress.regularizers.bn_scale import BNScaleL1
from compress.regularizers.coupled_weights import squared_norms
from compress.regularizers.group_norm import GroupNorm, lasso, shrinkage, strengths
from compress.regularizers.growing import Growing, growing, grown
from compress.stages.distill import Distill
from compress.stages.prune import Prune
from compress.stages.train import Train
from compress.training import fit, labels_loss

SIZE = 16
FIT = {"epochs": 6, "batch_size": 16, "lr": 0.02, "augment": False}
SPARSE: dict[str, dict[str, Any]] = {
    "bn_scale": {"use": "bn_scale", "weight": 0.01},
    "group_norm": {"use": "group_norm", "weight": 0.01},
    "lasso": {"use": "group_norm", "form": "lasso", "weight": 0.01},
    "growing": {"use": "growing", "goal": {"macs": 0.5}, "round_to": 2, "weight": 1.0},
}


def batch(progress: float = 0.5) -> Batch:
    return Batch(torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.int64), progress=progress)


def gradients(penalty: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(penalty, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


class Chain(nn.Sequential):
    """Convolution 0, BatchNorm 1, convolution 3 and a linear layer 5: what belongs to a channel can be said by hand."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(576, 5))
        )


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    module = Chain().eval()
    nn.init.normal_(module[1].weight)
    return module


def of_channels(chain: nn.Module) -> list[list[list[Tensor]]]:
    """For the two sets of the chain, for each channel, the weights that go with it."""
    first = [[chain[0].weight[c], chain[1].weight[c], chain[3].weight[:, c]] for c in range(6)]
    second = [[chain[3].weight[c], chain[5].weight[:, 144 * c : 144 * (c + 1)]] for c in range(4)]
    return [first, second]


def norm(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).norm()


def test_norms_are_of_all_weights_that_go_with_a_channel(chain) -> None:
    sets = sorted(find_coupled(chain, SIZE)[0], key=lambda coupled: coupled.name)
    assert [coupled.name for coupled in sets] == ["0", "3"]
    for found, channels in zip(squared_norms(chain, sets), of_channels(chain), strict=True):
        torch.testing.assert_close(found.sqrt(), torch.stack([norm(parts) for parts in channels]))


def test_the_slope_of_bn_scale_is_its_sign_times_the_weight(chain, run) -> None:
    with torch.no_grad():
        chain[1].weight[2] = 0
    penalty = BNScaleL1(use="bn_scale", weight=0.3).open(chain, run).penalty(chain, batch())
    assert penalty.item() == pytest.approx(0.3 * chain[1].weight.detach().abs().sum().item())
    found = gradients(penalty, chain)
    torch.testing.assert_close(found.pop("1.weight"), 0.3 * chain[1].weight.detach().sign())
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("form", ["squared", "lasso"])
def test_the_slope_of_group_norm_is_that_of_the_formula_by_hand(chain, run, form) -> None:
    regularizer = GroupNorm(use="group_norm", weight=0.3, form=form, alpha=3.0).open(chain, run)
    chain.double()
    found = gradients(regularizer.penalty(chain, batch()), chain)
    total = torch.zeros((), dtype=torch.float64)
    for channels in of_channels(chain):
        norms = [norm(parts) for parts in channels]
        for value in norms:
            low, high = (pick(n.item() for n in norms) for pick in (min, max))
            strength = 2 ** (3.0 * (high - value.item()) / (high - low))
            total = total + (value if form == "lasso" else strength / 2 * value**2)
    expected = gradients(0.3 * total, chain)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("name", ["chain", "resnet18"])
def test_shrinkage_adds_the_gradient_that_torch_pruning_adds(chain, run, name) -> None:
    torch.manual_seed(1)
    module = chain if name == "chain" else NETWORKS["resnet18"](5).eval()
    size = SIZE if name == "chain" else 32
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    theirs = copy.deepcopy(module)
    pruner = torch_pruning.pruner.GroupNormPruner(
        theirs,
        torch.zeros(1, 3, size, size),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None),
        reg=0.3,
        ignored_layers=[layer for layer in theirs.modules() if isinstance(layer, nn.Linear)][-1:],
    )
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.regularize(theirs)
    sets, _ = find_coupled(module, size)
    found = gradients(0.3 * shrinkage(squared_norms(module, sets), 4.0), module)
    assert last.weight.shape[0] == 5
    for key, parameter in theirs.named_parameters():
        if not (name == "chain" and key == "5.weight"):  # it has another idea of a channel beyond a flatten
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-6)


def test_strengths_are_one_where_all_are_equal_and_span_their_range() -> None:
    assert strengths(torch.full((4,), 2.0), 4.0).tolist() == [1, 1, 1, 1]
    assert strengths(torch.tensor([1.0, 3.0, 2.0]), 4.0).tolist() == [16, 1, 4]


def test_the_lasso_of_a_dead_channel_has_a_slope_of_zero() -> None:
    weights = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    value = lasso([weights.square().sum(1)])
    assert value == 5
    assert torch.autograd.grad(value, weights)[0].tolist() == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]


def test_the_factor_grows_in_a_line_and_then_stays() -> None:
    assert [grown(p, weight=2.0, until=0.5) for p in (0.0, 0.125, 0.25, 0.5, 0.9)] == [0, 0.5, 1, 2, 2]
    assert grown(0.4, weight=0.0, until=0.5) == 0


def test_growing_pulls_the_weights_of_the_chosen_channels_only() -> None:
    weights = torch.randn(5, 3, requires_grad=True)
    going = torch.tensor([True, False, True, False, False])
    (slope,) = torch.autograd.grad(growing([weights.square().sum(1)], [going], 0.7), weights)
    torch.testing.assert_close(slope, 0.7 * weights.detach() * going[:, None])


def test_growing_chooses_what_pruning_takes_out(product, run) -> None:
    for criterion in ({"use": "magnitude"}, {"use": "taylor"}, {"use": "random"}):
        words = {"use": "growing", "goal": {"macs": 0.5}, "round_to": 2, "criterion": criterion, "keep": ["down"]}
        opened = Growing.model_validate_json(json.dumps(words)).open(product.network.module, run)
        pruning = Pruning.model_validate_json(
            json.dumps({"round_to": 2, "criterion": criterion, "keep": ["down"], "batchnorm_images": 0})
        )
        kept = prune_network(product.network, MacGoal(macs=0.5), pruning, run=run).structure.kept
        assert any(which.any() for which in opened.going)
        for coupled, which in zip(opened.sets, opened.going, strict=True):
            for name in coupled.producers:
                if isinstance(product.network.module.get_submodule(name), nn.Conv2d):
                    gone = coupled.places[name, "outputs"][which].flatten().tolist()
                    width = product.network.module.get_submodule(name).out_channels
                    left = kept[name].outputs if name in kept and kept[name].outputs else tuple(range(width))
                    assert sorted(gone) == sorted({*range(width)} - {*left})


# In a training


def train(**more: Any) -> Train:
    return Train.model_validate_json(json.dumps({"use": "train", **FIT, **more}))


def weights_of(module: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())


@pytest.mark.parametrize("name", SPARSE)
def test_a_weight_of_zero_trains_the_same_bytes(product, run, name) -> None:
    short = {"epochs": 1}
    plain = train(**short).apply(product, run)
    zero = train(**short, sparsity=SPARSE[name] | {"weight": 0.0}).apply(product, run)
    some = train(**short, sparsity=SPARSE[name]).apply(product, run)
    assert weights_of(zero.network.module) == weights_of(plain.network.module) != weights_of(some.network.module)
    assert zero.metrics.keys() == plain.metrics.keys()


@pytest.mark.parametrize("name", SPARSE)
def test_an_opened_penalty_of_weight_zero_pulls_nothing(product, run, name) -> None:
    settings = TypeAdapter(SparsitySettings).validate_python(SPARSE[name] | {"weight": 0.0})
    regularizer = settings.open(product.network.module, run)
    how = {"loss": labels_loss(), "run": run, "settings": train(epochs=1), "label": "x"}
    pulled, history = fit(product.network.module, **how, regularizer=regularizer)
    free, _ = fit(product.network.module, **how)
    assert history[0]["penalty"] == 0
    assert weights_of(pulled) == weights_of(free)


@pytest.mark.parametrize("how", [{}, {"optimizer": "adamw", "lr": 0.002}])
def test_a_step_is_the_losss_and_the_penaltys(product, run, how) -> None:
    """One step by hand: the clipped gradient of the loss, and all of that of the penalty."""
    settings = train(epochs=1, batch_size=64, warmup_epochs=0, weight_decay=0.0, clip_norm=0.1, **how)
    regularizer = BNScaleL1(use="bn_scale", weight=0.5).open(product.network.module, run)
    found, _ = fit(
        product.network.module, loss=labels_loss(), run=run, settings=settings, label="x", regularizer=regularizer
    )
    free, _ = fit(product.network.module, loss=labels_loss(), run=run, settings=settings, label="x")
    before, after, unpulled = (m.stem_bn.weight.detach() for m in (product.network.module, found, free))
    if how.get("optimizer") == "adamw":
        # Its first step is as long for any gradient: the sign is the penalty's, which is the larger part.
        torch.testing.assert_close(before - after, 0.002 * before.sign(), rtol=1e-3, atol=1e-6)
        return
    # Nesterov's first step is (1 + 0.9) times the gradient.
    torch.testing.assert_close(unpulled - after, 0.02 * 1.9 * 0.5 * before.sign(), rtol=1e-3, atol=1e-6)


def measured(product: Product, run, sparsity: dict[str, Any] | None, **more: Any) -> Product:
    return train(sparsity=sparsity, epochs=15, lr=0.05, **more).apply(product, run)


def test_bn_scale_makes_scales_sparser_than_a_control(product, run) -> None:
    def small(trained: Product) -> float:
        scales = torch.cat([trained.network.module.get_submodule(n).weight.detach() for n in NORMS]).abs()
        return float((scales < 0.1).float().mean())

    control = measured(product, run, None)
    sparse = measured(product, run, {"use": "bn_scale", "weight": 0.1})
    assert small(control) < 0.1
    assert small(sparse) > 0.4
    penalties = [entry["penalty"] for entry in sparse.metrics["history"]]
    assert penalties[-1] < 0.5 * penalties[0]
    # It learns all the same.
    assert sparse.metrics["history"][-1]["loss"] < 0.5 * sparse.metrics["history"][0]["loss"]


NORMS = ("stem_bn", "depthwise_bn")


@pytest.mark.parametrize("form", ["squared", "lasso"])
def test_group_norm_shrinks_the_small_channels_more_than_the_large(product, run, form) -> None:
    def spread(trained: Product) -> float:
        """The smallest over the largest norm, of the set where they differ most."""
        sets, _ = find_coupled(trained.network.module, SIZE)
        found = [each.detach().sqrt() for each in squared_norms(trained.network.module, sets)]
        return min(float(each.min() / each.max()) for each in found)

    control = measured(product, run, None)
    sparse = measured(
        product, run, {"use": "group_norm", "form": form, "weight": {"squared": 0.02, "lasso": 0.1}[form]}
    )
    assert spread(sparse) < 0.6 * spread(control)


def test_growing_empties_the_chosen_channels_and_no_others(product, run) -> None:
    sparsity = {"use": "growing", "goal": {"macs": 0.5}, "round_to": 2, "weight": 2.0}
    opened = Growing.model_validate_json(json.dumps(sparsity)).open(product.network.module, run)
    before = squared_norms(product.network.module, opened.sets)
    grew = measured(product, run, sparsity)
    left = [
        (after / was).detach()
        for after, was in zip(squared_norms(grew.network.module, opened.sets), before, strict=True)
    ]
    chosen = torch.cat([each[which] for each, which in zip(left, opened.going, strict=True)])
    others = torch.cat([each[~which] for each, which in zip(left, opened.going, strict=True)])
    assert len(chosen) > 5
    assert chosen.median() < 0.05
    assert others.median() > 0.5
    # Pruning by magnitude then takes out those channels, and they are missed less than without the preparation.
    cut = {"use": "prune", "goal": {"macs": 0.5}, "round_to": 2, "batchnorm_images": 0}
    prune = Prune.model_validate_json(json.dumps(cut))
    control = measured(product, run, None)

    def damage(trained: Product) -> float:
        whole, cut = trained.network.module, prune.apply(trained, run).network.module
        images = run.data.splits["evaluation"][0]
        with torch.no_grad():
            return float((whole(images) - cut(images)).square().mean() / whole(images).var())

    assert damage(grew) < 0.3 * damage(control)


def test_it_goes_with_a_teacher_and_with_finetuning(product, run) -> None:
    sparsity = {"use": "group_norm", "weight": 0.05}
    pruned = Prune.model_validate_json(
        json.dumps(
            {"use": "prune", "goal": {"macs": 0.4}, "round_to": 2, "finetune": FIT | {"sparsity": sparsity}, "steps": 2}
        )
    ).apply(product, run)
    assert all(entry["penalty"] > 0 for entry in pruned.metrics["history"])
    words = {"use": "distill", **FIT, "losses": [{"use": "kd"}], "sparsity": sparsity}
    taught = Distill.model_validate_json(json.dumps(words)).apply(pruned, run)
    plain = Distill.model_validate_json(json.dumps(words | {"sparsity": None})).apply(pruned, run)
    sets, _ = find_coupled(taught.network.module, SIZE)
    size, control = (
        sum(norms.sum().item() for norms in squared_norms(each.network.module, sets)) for each in (taught, plain)
    )
    assert size < 0.95 * control
    assert macs(taught.network.module, SIZE) == macs(pruned.network.module, SIZE)


def test_parameters_that_are_not_trained_are_not_pulled(product, run) -> None:
    trained = train(only=["head.*"], sparsity={"use": "bn_scale", "weight": 1.0}).apply(product, run)
    for name in NORMS:
        weight = product.network.module.get_submodule(name).weight
        assert torch.equal(trained.network.module.get_submodule(name).weight, weight)


# What is refused


@pytest.mark.parametrize(
    "words",
    [
        {"use": "train", "sparsity": {"use": "growing"}},
        {"use": "train", "sparsity": {"use": "l1"}},
        {"use": "train", "sparsity": {"use": "bn_scale", "weight": -1}},
        {"use": "train", "sparsity": {"use": "growing", "goal": {"macs": 0.5}, "until": 0}},
    ],
)
def test_mistakes_are_refused(words) -> None:
    with pytest.raises(ValidationError):
        Train.model_validate_json(json.dumps(words))


def test_growing_is_refused_where_nothing_is_removed_afterwards() -> None:
    finetune = {"sparsity": SPARSE["growing"]}
    with pytest.raises(ValidationError, match="put it into a stage `train` before it"):
        Prune.model_validate_json(json.dumps({"use": "prune", "goal": {"macs": 0.5}, "finetune": finetune}))


def test_schemes_are_refused() -> None:
    words = {"use": "distill", "scheme": {"use": "mutual"}, "sparsity": SPARSE["bn_scale"]}
    with pytest.raises(ValidationError, match="leave one of them out"):
        Distill.model_validate_json(json.dumps(words))


def test_networks_that_do_not_fit_are_refused_before_anything_is_trained(run) -> None:
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 196, 5)).eval()
    with pytest.raises(ModelError, match=r"stage train: `sparsity: bn_scale` finds no BatchNorm"):
        train(sparsity={"use": "bn_scale"}).check(bare, run.data.preprocess)
    train(sparsity={"use": "group_norm"}).check(bare, run.data.preprocess)
    with pytest.raises(ModelError, match="out of reach"):
        train(sparsity={"use": "growing", "goal": {"macs": 0.01}}).check(bare, run.data.preprocess)
    fixed = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ModelError, match="finds no channels that may go"):
        train(sparsity={"use": "group_norm"}).check(fixed, run.data.preprocess)
