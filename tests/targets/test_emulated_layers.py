"""Layers on an emulated core: the cycles of each are estimated in few processes, and are those of the whole network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from compress.errors import TargetError
from compress.latency.measure import key_of, measure
from compress.latency.networks import int8_file
from compress.latency.shapes import place_layers
from compress.product import Preprocess
from compress.progress import Silent
from compress.targets import open_target

pytestmark = pytest.mark.slow  # two minutes on a busy machine: each process under qemu starts in some seconds


@pytest.fixture(autouse=True)
def _own_journal(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.latency.table.cache_folder", lambda: tmp_path)


@pytest.mark.parametrize("runtime", ["litert", "onnxruntime"])
def test_layers_add_up_to_the_network(runtime):
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(), nn.Conv2d(64, 32, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()
    shapes = [layer.shape for layer in place_layers(module, 48)]
    half = replace(shapes[1], size=(shapes[1].size[0] // 2, shapes[1].size[1]))
    whole = int8_file(module, Preprocess(size=48), runtime)
    with open_target("emulated:cortex-a72", Silent()) as machine:
        key = key_of(machine, runtime, 1)
        assert key.estimated
        assert (key.device["mhz"], key.device["cpu"][-10:]) == (1500, "Cortex-A72")
        first = measure(machine, [*shapes, half], runtime, key=key, progress=Silent(), wholes={"net": whole})
        again = measure(machine, [*shapes, half], runtime, key=key, progress=Silent())
        with pytest.raises(TargetError, match="one thread"):
            measure(machine, [], runtime, key=replace(key, threads=2), progress=Silent(), wholes={"net": whole})
    # Kept by the journal of the first, which nobody has forgotten: nothing is counted twice.
    assert again.cells == first.cells
    together = sum(first.cells[shape] for shape in shapes)
    # Adding up leaves out the call, the pooling and the conversions: some percent of so small a network, never half.
    assert 0.5 * first.wholes["net"] < together < 1.1 * first.wholes["net"]
    assert first.cells[shapes[1]] == pytest.approx(2 * first.cells[half], rel=0.1)
