"""Every criterion ranks every kind of network, within a layer and across layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from networks import NETWORKS, images_of, settle
from pydantic import TypeAdapter
from torch import nn

from compress.criteria import CriterionSettings
from compress.errors import ModelError
from compress.measures import macs
from compress.models.coupled import Coupled, find_coupled
from compress.models.mobilenet_v2 import MobileNetV2Settings, build_mobilenet_v2
from compress.models.structure import resize
from compress.product import Batch, Preprocess
from compress.pruning.choose import choose, kept_channels
from compress.pruning.goal import cost_of
from compress.pruning.limits import least_widths, widths
from compress.pruning.ranking import rank

SIZE, CLASSES, IMAGES = 32, 4, 8
CRITERIA = [
    {"use": "magnitude", "p": 1},
    {"use": "magnitude", "p": 2},
    {"use": "taylor"},
    {"use": "bn_scale"},
    {"use": "lamp"},
    {"use": "fpgm"},
    {"use": "fisher"},
    {"use": "obd"},
    {"use": "activation", "statistic": "mean"},
    {"use": "activation", "statistic": "nonzero"},
    {"use": "random"},
]
WITHOUT_BATCHNORM = ["plain", "vit_timm"]


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(24 * 9, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    )


KINDS = {
    "plain": plain,
    "resnet18": lambda: NETWORKS["resnet18"](CLASSES),
    "mobilenet_v2": lambda: build_mobilenet_v2(MobileNetV2Settings(use="mobilenet_v2", width=0.35), CLASSES),
    "vit_timm": lambda: NETWORKS["vit_timm"](CLASSES),
}


@dataclass(frozen=True)
class Subject:
    module: nn.Module
    sets: list[Coupled]
    possible: list[list[int]]


@cache
def subject(kind: str) -> Subject:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = settle(KINDS[kind](), images_of(IMAGES, SIZE))
    sets, _ = find_coupled(module, SIZE)
    least = least_widths(module, max_ratio=0.8, layer_ratios={}, keep=(), place="test")
    return Subject(module, sets, [widths(coupled, module, least, 2) for coupled in sets])


class Waves:
    task = "classification"
    label_weights = None
    channels_last = False
    preprocess = Preprocess(size=SIZE)

    def count(self, split: str) -> int:
        return IMAGES

    def batches(self, split: str, *, batch_size: int, limit: int, seed: int, shuffle: bool):
        images, labels = images_of(IMAGES, SIZE), torch.arange(IMAGES) % CLASSES
        for start in range(0, limit, batch_size):
            yield Batch(images[start : start + batch_size], labels[start : start + batch_size])


def ranked(kind: str, criterion: dict, run, seed: int = 0):
    known = subject(kind)
    return rank(
        known.module,
        known.sets,
        known.possible,
        criterion=TypeAdapter(CriterionSettings).validate_python(criterion),
        images=IMAGES,
        run=replace(run, data=Waves()),
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda each: "-".join(str(value) for value in each.values()))
@pytest.mark.parametrize("kind", KINDS)
def test_every_criterion_ranks_every_kind_of_network_in_both_scopes(kind: str, criterion: dict, run) -> None:
    known = subject(kind)
    if criterion["use"] == "bn_scale" and kind in WITHOUT_BATCHNORM:
        with pytest.raises(ModelError, match="no BatchNorm scales its channels"):
            ranked(kind, criterion, run)
        return
    rankings = ranked(kind, criterion, run)
    for coupled, ranking in zip(known.sets, rankings, strict=True):
        assert sorted(ranking.order) == list(range(coupled.units))
        assert list(ranking.scores) == sorted(ranking.scores)
        assert ranking.scores[0] >= 0
        if criterion["use"] == "lamp":
            assert ranking.scores[-1] == 1
        elif ranking.scores[-1] > 0:
            assert sum(ranking.scores) / coupled.units == pytest.approx(1, rel=1e-4)
    if criterion["use"] not in ("activation", "random"):  # a set of dead units has no order
        assert sum(len(set(ranking.scores)) > 1 for ranking in rankings) > 0.9 * len(rankings)
    cost, whole = cost_of(known.module, known.sets, SIZE), macs(known.module, SIZE)
    for scope in ("global", "local"):
        stay = choose(rankings, cost, most=whole * 6 // 10, scope=scope)
        pruned = copy.deepcopy(known.module)
        resize(pruned, kept_channels(known.module, known.sets, rankings, stay))
        assert macs(pruned, SIZE) <= whole * 6 // 10
        assert pruned(images_of(2, SIZE)).isfinite().all()
        shares = [count / coupled.units for count, coupled in zip(stay, known.sets, strict=True)]
        if scope == "local":
            assert max(shares) - min(shares) <= max(2 / coupled.units for coupled in known.sets)
        elif kind != "vit_timm":  # its two sets are alike
            assert max(shares) - min(shares) > 0.1


def test_only_lamp_compares_layers_itself() -> None:
    for criterion in CRITERIA:
        read = TypeAdapter(CriterionSettings).validate_python(criterion)
        assert read.across_layers == (criterion["use"] == "lamp")


def test_random_is_drawn_from_its_generator_alone(run) -> None:
    drawn = [[list(ranking.order) for ranking in ranked("plain", {"use": "random"}, run, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("use", ["magnitude", "lamp", "fpgm", "bn_scale"])
def test_what_needs_no_data_asks_for_none(use: str, run) -> None:
    class Unasked:
        def __getattr__(self, name: str):
            raise AssertionError(name)

    known = subject("resnet18")
    criterion = TypeAdapter(CriterionSettings).validate_python({"use": use})
    rank(
        known.module,
        known.sets,
        known.possible,
        criterion=criterion,
        images=IMAGES,
        run=replace(run, data=Unasked()),
        generator=torch.Generator(),
    )
