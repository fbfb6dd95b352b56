"""When channels go: ramps, rounds, and a training in which the network becomes narrower."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress.data.sample import sample
from compress.measures import macs
from compress.models.structure import resize, select
from compress.product import Product
from compress.pruning import MacGoal, Pruning, prune_network
from compress.pruning.ramp import share_left
from compress.pruning.schedule import Narrowed, Progressive, narrow
from compress.stages.prune import Prune
from compress.training import Fit, optimizer_of

SIZE = 16
FIT = {"epochs": 4, "batch_size": 16, "lr": 0.02, "augment": False}
CUT = {"use": "prune", "goal": {"macs": 0.4}, "round_to": 2, "batchnorm_images": 0}


def pruned(product: Product, run, **more: Any) -> Product:
    return Prune.model_validate_json(json.dumps(CUT | {"finetune": FIT} | more)).apply(product, run)


def weights_of(module: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())


# Ramps


@pytest.mark.parametrize("ramp", ["geometric", "cubic"])
def test_a_ramp_leads_from_the_whole_network_to_the_goal(ramp) -> None:
    left = [share_left(part / 100, 0.3, ramp) for part in range(101)]
    assert left[0] == 1
    assert left[-1] == pytest.approx(0.3)
    assert left == sorted(left, reverse=True)


def test_the_cubic_ramp_is_that_of_agp() -> None:
    # s_t = s_f + (s_i - s_f) (1 - t / n)^3 of the paper, from no sparsity to that of the goal.
    for part in (0.0, 0.2, 0.5, 0.9, 1.0):
        sparsity = 0.7 + (0.0 - 0.7) * (1 - part) ** 3
        assert 1 - share_left(part, 0.3, "cubic") == pytest.approx(sparsity)


def test_the_geometric_ramp_takes_the_same_share_each_time() -> None:
    left = [share_left(step / 4, 0.3, "geometric") for step in range(5)]
    assert [b / a for a, b in pairwise(left)] == pytest.approx([0.3**0.25] * 4)


# Rounds


def test_one_shot_and_iterative_are_what_steps_say(product, run) -> None:
    one, plain = pruned(product, run, schedule={"use": "one_shot"}), pruned(product, run)
    assert weights_of(one.network.module) == weights_of(plain.network.module)
    rounds = pruned(product, run, schedule={"use": "iterative", "steps": 3})
    steps = pruned(product, run, steps=3)
    assert weights_of(rounds.network.module) == weights_of(steps.network.module)
    assert rounds.metrics["steps"] == 3
    assert {entry["step"] for entry in rounds.metrics["history"]} == {1, 2, 3}


def test_cubic_rounds_take_more_at_first(product, run) -> None:
    def after_first(ramp: str) -> int:
        sizes: list[int] = []

        def after(network, step):
            sizes.append(macs(network.module, SIZE))
            return network.module

        pruning = Pruning(round_to=1, steps=3, batchnorm_images=0)
        prune_network(product.network, MacGoal(macs=0.4), pruning, run=run, after=after, ramp=ramp)
        assert sizes[2] <= 0.4 * macs(product.network.module, SIZE)
        return sizes[0]

    assert after_first("cubic") < after_first("geometric")


# Narrower in mid-training


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel, steps: int) -> None:
    for step in range(steps):
        images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(module(images), torch.arange(8) % 5).backward()
        optimizer.step()
        average.update_parameters(module)


@pytest.mark.parametrize("how", ["sgd", "adamw"])
def test_the_optimizer_and_the_average_follow_the_network(product, run, how) -> None:
    student = copy.deepcopy(product.network.module).train()
    optimizer = optimizer_of(student, Fit(optimizer=how, lr=0.01), torch.device("cpu"))
    average = AveragedModel(student, use_buffers=True)
    trained(student, optimizer, average, 3)
    removed = prune_network(
        product.network, MacGoal(macs=0.4), Pruning(round_to=2, batchnorm_images=0), run=run
    ).structure.kept
    whole, whole_average = copy.deepcopy(student), copy.deepcopy(average.module)
    names = [name for name, _ in student.named_parameters()]
    groups = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    of_whole = {name: dict(optimizer.state[p]) for name, p in student.named_parameters()}
    narrow(student, average, optimizer, removed, torch.contiguous_format)

    for found, before in ((student, whole), (average.module, whole_average)):
        expected = select(before, removed)
        assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    assert [name for name, _ in student.named_parameters()] == names
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(group) for group in groups]
    mine = {id(p) for p in student.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
    assert {id(p) for p in optimizer.state} == mine

    # What is remembered of a weight that stays is what was remembered of it, by indexing each side by hand.
    for name, parameter in student.named_parameters():
        layer, kept = whole.get_submodule(name.rpartition(".")[0]), removed.get(name.rpartition(".")[0])
        for key, value in of_whole[name].items():
            found = optimizer.state[parameter][key]
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                assert found == value
                continue
            if kept is not None and kept.outputs is not None:
                value = value[list(kept.outputs)]
            if kept is not None and kept.inputs is not None and value.ndim > 1 and getattr(layer, "groups", 1) == 1:
                value = value[:, list(kept.inputs)]
            assert torch.equal(found, value), (name, key)
    assert any(kept.inputs for kept in removed.values())
    trained(student, optimizer, average, 2)  # and it goes on
    assert not any(torch.equal(p, average.module.get_parameter(n)) for n, p in student.named_parameters())


def test_nothing_happens_to_what_loses_nothing(product) -> None:
    student = copy.deepcopy(product.network.module).train()
    optimizer = optimizer_of(student, Fit(), torch.device("cpu"))
    average = AveragedModel(student, use_buffers=True)
    trained(student, optimizer, average, 2)
    one, other = copy.deepcopy((student, optimizer.state_dict())), None
    narrow(student, average, optimizer, {}, torch.contiguous_format)
    other = (student, optimizer.state_dict())
    assert weights_of(one[0]) == weights_of(other[0])
    for number, state in one[1]["state"].items():
        assert torch.equal(state["momentum_buffer"], other[1]["state"][number]["momentum_buffer"])


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher"])
def test_channels_that_go_before_the_first_step_go_as_in_one_shot(product, run, criterion) -> None:
    words = {"criterion": {"use": criterion}, "images": 32}
    at_once = pruned(product, run, **words)
    progressive = pruned(product, run, **words, schedule={"use": "progressive", "begin": 0, "end": 0})
    assert progressive.network.structure.kept == at_once.network.structure.kept
    assert weights_of(progressive.network.module) == weights_of(at_once.network.module)


def test_a_network_becomes_narrower_along_the_ramp(product, run) -> None:
    narrowed = pruned(product, run, round_to=1, schedule={"use": "progressive", "end": 0.75, "every": 0.5})
    whole = macs(product.network.module, SIZE)
    course = narrowed.metrics["narrowed"]
    assert [each["step"] for each in course] == [0, 2, 4, 6, 8, 10, 12]  # four steps an epoch
    for number, each in enumerate(course, start=1):
        allowed = share_left(number / 7, 0.4, "cubic")
        assert allowed - 0.05 < each["macs"] / whole <= allowed + 1e-9
    assert course[-1]["macs"] == macs(narrowed.network.module, SIZE) <= 0.4 * whole
    assert narrowed.metrics["reached"] == course[-1]["macs"] / whole
    assert len(narrowed.metrics["history"]) == 4
    # The structure tells the network from the factory's.
    rebuilt = copy.deepcopy(product.network.module)
    resize(rebuilt, narrowed.network.structure.kept)
    rebuilt.load_state_dict(narrowed.network.module.state_dict(), strict=True)
    images = run.data.splits["evaluation"][0]
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images), narrowed.network.module(images))
    assert narrowed.parent is product.network
    assert narrowed.metrics["history"][-1]["loss"] < narrowed.metrics["history"][0]["loss"]


def test_what_is_scored_in_mid_training_has_the_statistics_of_the_network_as_it_is(product, run, monkeypatch) -> None:
    from compress.pruning import schedule

    seen = []

    def chosen(module, pruning, **how):
        seen.append(copy.deepcopy(module))
        return plain(module, pruning, **how)

    plain = schedule.chosen
    monkeypatch.setattr(schedule, "chosen", chosen)
    pruned(
        product, run, batchnorm_images=64, finetune=FIT | {"epochs": 1}, schedule={"use": "progressive", "every": 0.25}
    )
    assert len(seen) == 3
    images = torch.cat([batch.images_NCHW for batch in sample(run, 64, batch_size=64)])
    for number, module in enumerate(seen):
        with torch.no_grad():
            now = module.stem(nn.functional.pad(images, (0, 1, 0, 1))).mean((0, 2, 3))
        assert torch.allclose(module.stem_bn.running_mean, now, atol=1e-5) == (number > 0)


@pytest.mark.parametrize("distill", [{}, {"losses": [{"use": "kd"}]}])
def test_it_goes_with_a_teacher_an_average_and_a_pruned_network(product, run, distill) -> None:
    once = pruned(product, run)
    again = pruned(
        once,
        run,
        goal={"macs": 0.7},
        finetune=FIT | {"ema": 0.9, "optimizer": "adamw", "lr": 1e-3},
        distill=distill,
        schedule={"use": "progressive", "every": 0.75},
    )
    assert macs(again.network.module, SIZE) <= 0.7 * macs(once.network.module, SIZE)
    expected = select(product.network.module, again.network.structure.kept)
    assert all(expected[key].shape == value.shape for key, value in again.network.module.state_dict().items())
    assert again.parent is product.network


@pytest.mark.parametrize(
    ("words", "moments"),
    [
        ({}, [0, 10, 20, 30, 40, 50]),
        ({"begin": 0.2, "end": 0.4, "every": 0.5}, [20, 25, 30, 35, 40]),
        ({"begin": 0.5, "end": 0.5}, [50]),
        ({"end": 0.35, "every": 2}, [0, 20, 35]),
        ({"every": 0.001, "begin": 0.48}, [48, 49, 50]),
        ({"end": 0.999}, [*range(0, 99, 10), 99]),
    ],
)
def test_moments(words, moments) -> None:
    schedule = Progressive(use="progressive", **words)
    narrowed = Narrowed(nn.Identity(), Pruning(), 0.5, schedule, None, "test")
    assert [step for step in range(100) if narrowed.due(step, 100, 10)] == moments


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"steps": 2, "schedule": {"use": "one_shot"}}, "leave the other one out"),
        ({"schedule": {"use": "iterative", "steps": 1}}, "greater than or equal to 2"),
        ({"finetune": None, "schedule": {"use": "progressive"}}, "give it epochs"),
        ({"finetune": FIT | {"epochs": 0}, "schedule": {"use": "progressive"}}, "give it epochs"),
        ({"schedule": {"use": "progressive", "begin": 0.6}}, "comes before"),
        (
            {"finetune": FIT | {"sparsity": {"use": "bn_scale"}}, "schedule": {"use": "progressive"}},
            "two ways to the same",
        ),
        (
            {"distill": {"losses": [{"use": "fitnets", "layers": {"a": "a"}}]}, "schedule": {"use": "progressive"}},
            "use losses of logits",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words, said) -> None:
    with pytest.raises(ValidationError, match=said):
        Prune.model_validate_json(json.dumps(CUT | {"finetune": FIT} | words))
