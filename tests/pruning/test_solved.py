"""Goals of speed: widths as choices with times, measured sensitivity, and pruning to a time on a device of our own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import networks
import numpy as np
import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn

from compress.errors import ModelError
from compress.latency.shapes import Shape, place_layers
from compress.latency.solver import least_time, solve
from compress.measures import macs
from compress.models.blocks import drop, find_blocks
from compress.models.coupled import find_coupled
from compress.models.structure import compose, resize, select
from compress.product import Network, Structure
from compress.pruning import FpsGoal, Pruning, SpeedupGoal, prune_to_time, refuse_untimed, solved
from compress.pruning.choose import kept_channels
from compress.pruning.importance import Curve, answers, curves
from compress.pruning.limits import widths
from compress.pruning.ranking import Ranking
from compress.pruning.timed import Choices, few

SIZE = 32


@dataclass(frozen=True)
class Device:
    """A machine whose times are known: 8 channels at once, and so much a layer."""

    fixed_us: float = 0.5
    scale: float = 1.5
    estimated: bool = False

    def layer_us(self, shape: Shape) -> float:
        inputs, outputs = (-(-channels // 8) * 8 for channels in (shape.inputs, shape.outputs))
        area = shape.size[0] * shape.size[1] * shape.kernel[0] * shape.kernel[1]
        return 0.05 + area * outputs * (inputs if shape.kind in ("conv", "linear") else inputs / shape.groups) / 1e4

    def network_us(self, shapes) -> float:
        return self.fixed_us + self.scale * sum(map(self.layer_us, shapes))


class Residual(nn.Module):
    """Three blocks that add to what they are given, at one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.Sequential(*(Adding() for _ in range(3)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = (nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        deep = (nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.inside = nn.Sequential(*wide, *deep, nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inside(x)


def ranked(sets, possible) -> list[Ranking]:
    return [Ranking(range(c.units), [float(n) for n in range(c.units)], w) for c, w in zip(sets, possible, strict=True)]


def choices_of(module: nn.Module, *, round_to: int = 4, most: int = 4, size: int = SIZE) -> Choices:
    sets, _ = find_coupled(module, size)
    least = {name: 1.0 for name, _ in module.named_modules()}
    possible = [few(widths(coupled, module, least, round_to), most) for coupled in sets]
    return Choices(place_layers(module, size), sets, possible, Device(), find_blocks(module, size))


@pytest.mark.parametrize(
    "make", [networks.mobilenet_v2, networks.resnet18, networks.resnet50, networks.efficientnet_lite, SmallNet]
)
def test_a_choices_time_is_that_of_the_network_that_it_makes(make) -> None:
    module = randomized(make())
    size = 16 if make is SmallNet else SIZE
    choices = choices_of(module, size=size)
    found = choices.problem(
        [np.zeros(len(possible)) for possible in choices.widths], dict.fromkeys([b.name for b in choices.blocks], 0.0)
    )
    assert found is not None
    problem, hidden = found
    assert (len(hidden) > 0) == (make is not SmallNet)
    rng = np.random.default_rng(0)
    for _ in range(6):
        chosen = [int(rng.integers(len(possible))) for possible in choices.widths]
        for inside in hidden.values():
            if rng.random() < 0.4:
                for index in inside:
                    chosen[index] = len(choices.widths[index])
        stay, dropped = choices.answer(chosen, hidden)
        narrow = randomized(make())
        resize(narrow, kept_channels(narrow, choices.sets, ranked(choices.sets, choices.widths), stay))
        drop(narrow, dropped)
        layers = place_layers(narrow, size)
        expected = Device().network_us(layer.shape for layer in layers)
        assert problem.cost(chosen) == pytest.approx(expected)
        assert choices.us(stay, dropped) == pytest.approx(expected)


def test_a_block_of_several_sets_goes_whole_or_not_at_all() -> None:
    module = randomized(networks.resnet50())
    choices = choices_of(module, most=2)
    losses = [1 - np.asarray(possible) / possible[0] for possible in choices.widths]
    problem, hidden = choices.problem(losses, dict.fromkeys([block.name for block in choices.blocks], 0.9))
    assert all(len(inside) == 2 for inside in hidden.values())
    whole, least = problem.cost([0] * len(losses)), least_time(problem)
    for most in np.linspace(0.9 * whole, least, 5):
        chosen = solve(problem, most)
        gone = [[chosen[index] == len(choices.widths[index]) for index in inside] for inside in hidden.values()]
        assert all(len(set(of_block)) == 1 for of_block in gone)
        assert problem.cost(chosen) <= most * (1 + 1e-9)
    assert any(all(of_block) for of_block in gone)


def test_the_solvers_answer_is_the_best_of_all() -> None:
    """Against every combination, with the times of the networks themselves."""
    module = randomized(SmallNet())
    choices = choices_of(module, most=4, size=16)
    rng = np.random.default_rng(1)
    losses = [np.sort(rng.random(len(possible))) - 1e-9 for possible in choices.widths]
    problem, _ = choices.problem(losses, {})
    everything = list(itertools.product(*(range(len(possible)) for possible in choices.widths)))
    for share in (0.95, 0.8, 0.6):
        most = share * choices.us([coupled.units for coupled in choices.sets])
        fits = [one for one in everything if choices.us(choices.answer(one, {})[0]) <= most]
        best = min(sum(loss[at] for loss, at in zip(losses, one, strict=True)) for one in fits)
        chosen = solve(problem, most)
        assert sum(loss[at] for loss, at in zip(losses, chosen, strict=True)) == pytest.approx(best)


def test_a_structure_of_three_sets_at_once_is_not_known() -> None:
    module = randomized(networks.densenet())
    choices = choices_of(module)
    assert choices.problem([np.zeros(len(possible)) for possible in choices.widths], {}) is None
    assert choices.us([possible[-1] for possible in choices.widths]) < choices.us([c.units for c in choices.sets])


def test_few_widths_keep_both_ends_and_whole_multiples() -> None:
    many = [100, *range(96, 15, -8)]
    found = few(many, 5)
    assert (found[0], found[-1]) == (100, 16)
    assert len(found) <= 5
    assert all(width % 32 == 0 for width in found[1:-1])
    assert few([7, 6, 5], 14) == [7, 6, 5]


def test_a_curve_is_convex_and_never_below_what_was_measured_up_to_its_steepest() -> None:
    curve = Curve(("x",), 16, (16, 12, 8, 4), (0.0, 0.2, 0.1, 2.0), (1, 1, 1, 0))
    losses = curve.losses([16, 14, 12, 8, 4])
    assert losses[:3] == pytest.approx([0, 0.1, 0.2])
    assert (np.diff(losses[[0, 2, 3, 4]]) >= np.array([0.2, 0.2, 1.8]) - 1e-12).all()
    flat = Curve(("x",), 16, (16, 12, 8, 4), (0.0, 1.0, 1.1, 1.1), (1, 1, 1, 0)).losses([16, 12, 8, 4])
    assert flat == pytest.approx([0, 1, 2, 3])


def test_curves_are_of_one_set_at_a_time(product, run) -> None:
    module = product.network.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sets, _ = find_coupled(module, 16)
    possible = [widths(coupled, module, {}, 4) for coupled in sets]
    batches = list(run.data.batches("train", batch_size=64))
    found = curves(module, sets, ranked(sets, possible), batches, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    last = found[-1]
    narrow = randomized(SmallNet())
    narrow.load_state_dict(before)
    stay = [coupled.units for coupled in sets[:-1]] + [last.widths[-1]]
    resize(narrow, kept_channels(narrow, sets, ranked(sets, possible), stay))
    whole = randomized(SmallNet())
    whole.load_state_dict(before)
    p, q = (answers(network, batches, run).double().softmax(1).numpy() for network in (whole, narrow))
    assert last.kl[-1] == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)
    labels = torch.cat([batch.labels_N for batch in batches]).numpy()
    assert last.score[-1] == pytest.approx(float((q.argmax(1) == labels).mean()))
    assert all(curve.kl[0] == 0 and curve.widths[0] == curve.units for curve in found)


@pytest.fixture
def clocked(monkeypatch):
    """`prune_to_time` on the device of our own; the file takes `slower` times what the table says."""
    state = {"slower": 1.0, "measured": []}

    class Ours(solved.Clock):
        def calibrate(self, parent, module):
            self.predictor = Device()
            self.parent_us = 4 * Device().network_us(layer.shape for layer in place_layers(parent, 16))
            return self.parent_us / 4

        def measured_us(self, module, parent):
            us = state["slower"] * Device().network_us(layer.shape for layer in place_layers(module, 16))
            state["measured"].append(us)
            return us

    monkeypatch.setattr(solved, "Clock", Ours)
    return state


FINE = Pruning(round_to=2, max_ratio=0.85, images=32, batchnorm_images=32)


@pytest.mark.parametrize("goal", [SpeedupGoal(speedup=7), FpsGoal(fps=1e6 / 45)])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_goal_is_met_and_the_network_is_the_old_ones_channels(product, run, clocked, goal, steps) -> None:
    pruning = FINE.model_copy(update={"steps": steps})
    seen = []

    def after(network: Network, step: int) -> nn.Module:
        seen.append(step)
        return network.module

    network, found = prune_to_time(product.network, goal, pruning, parent=product.network, run=run, after=after)
    assert seen == list(range(1, steps + 1))
    layers = place_layers(network.module, 16)
    us = Device().network_us(layer.shape for layer in layers)
    assert us <= goal.most_us(found["parent_us"])
    assert us == pytest.approx(found["predicted_us"])
    expected = select(product.network.module, network.structure.kept)
    state = network.module.state_dict()
    assert all(
        torch.equal(state[key], expected[key]) for key in expected if "running" not in key and "num_b" not in key
    )
    assert macs(network.module, 16) < macs(product.network.module, 16)
    judged = found["rounds"][-1]["candidates"]
    assert [one["kl"] for one in judged] == sorted(one["kl"] for one in judged)
    assert found["rounds"][-1]["chosen"] == judged[0]["name"]
    assert {curve["name"] for curve in found["sensitivity"]} >= {"down"}


def test_what_the_table_was_wrong_by_corrects_the_budget_once(product, run, clocked) -> None:
    goal = SpeedupGoal(speedup=9)
    _, right = prune_to_time(product.network, goal, FINE, parent=product.network, run=run)
    clocked["slower"] = 1.1 * right["most_us"] / right["predicted_us"]
    clocked["measured"].clear()
    _, found = prune_to_time(product.network, goal, FINE, parent=product.network, run=run)
    assert len(clocked["measured"]) == 2
    assert found["rounds"][-1]["corrected"]
    assert clocked["measured"][0] > found["most_us"] >= clocked["measured"][1] == found["measured_us"]


def test_a_network_that_is_fast_enough_stays_whole(product, run, clocked) -> None:
    network, found = prune_to_time(product.network, SpeedupGoal(speedup=1.5), FINE, parent=product.network, run=run)
    assert network is product.network
    assert found["measured_us"] < found["most_us"]
    assert found["rounds"] == []


def test_out_of_reach_is_a_verdict_with_what_is_within_reach(product, run, clocked) -> None:
    class Said:
        notes: list[str] = []

        def __getattr__(self, name):
            return getattr(run.progress, name)

        def note(self, text: str) -> None:
            self.notes.append(text)

    told = Said()
    goal = SpeedupGoal(speedup=500)
    with pytest.raises(
        ModelError, match=r"^here: INFEASIBLE: `goal: \{speedup: 500\}` asks for .* ms; .*; ask for less"
    ):
        prune_to_time(
            product.network, goal, FINE, parent=product.network, run=replace(run, progress=told), place="here"
        )
    reach = [note for note in told.notes if note.startswith("within reach: ")]
    assert len(reach) == solved.FRONTIER
    speeds = [float(note.partition("fps, ")[2].partition("x")[0]) for note in reach]
    assert speeds == sorted(speeds)
    assert speeds[0] == pytest.approx(4, rel=0.01)


def test_one_share_for_all_with_the_local_scope(product, run, clocked) -> None:
    local = FINE.model_copy(update={"scope": "local"})
    network, found = prune_to_time(product.network, SpeedupGoal(speedup=6), local, parent=product.network, run=run)
    assert [one["name"] for one in found["rounds"][0]["candidates"]] == ["one share for all"]
    shares = [len(kept.outputs) for name, kept in network.structure.kept.items() if kept.outputs and name == "down"]
    assert 0.2 < shares[0] / 24 < 1


def test_pruning_a_pruned_network_with_blocks_gone_composes(run, clocked) -> None:
    module = randomized(Residual())
    network = Network(module, Structure(model={}, num_classes=5, preprocess=run.data.preprocess))
    once, first = prune_to_time(network, SpeedupGoal(speedup=6), FINE, parent=network, run=run)
    twice, _ = prune_to_time(once, SpeedupGoal(speedup=9), FINE, parent=network, run=run)
    assert set(once.structure.dropped) <= set(twice.structure.dropped)
    rebuilt = randomized(Residual())
    resize(rebuilt, twice.structure.kept)
    drop(rebuilt, twice.structure.dropped)
    rebuilt.load_state_dict(twice.module.state_dict())
    images = next(iter(run.data.batches("train", batch_size=4))).images_NCHW
    assert torch.equal(rebuilt.eval()(images), twice.module(images))
    assert {block["name"] for block in first["blocks"]} >= set(once.structure.dropped)
    assert compose({}, twice.structure.kept) == dict(twice.structure.kept)


def test_without_blocks_none_goes(run, clocked) -> None:
    module = randomized(Residual())
    network = Network(module, Structure(model={}, num_classes=5, preprocess=run.data.preprocess))
    found, told = prune_to_time(network, SpeedupGoal(speedup=7), FINE, parent=network, run=run, blocks=False)
    assert found.structure.dropped == ()
    assert told["blocks"] == []


def test_what_can_be_known_before_is_refused_before(product) -> None:
    structure = product.network.structure
    with pytest.raises(ModelError, match="here: `keep: nothing` matches no"):
        refuse_untimed(
            product.network.module,
            SpeedupGoal(speedup=2),
            FINE.model_copy(update={"keep": ("nothing",)}),
            structure.preprocess,
            "here",
        )

    class Sine(nn.Module):
        def forward(self, x):
            return x.sin()

    odd = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Sine(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    with pytest.raises(ModelError, match="sin"):
        refuse_untimed(odd, SpeedupGoal(speedup=2), FINE, structure.preprocess, "here")
