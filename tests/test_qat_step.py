"""The arithmetic of benchmarks/qat_step.py, and that its steps train what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "qat_step.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qat_step", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qat_step"] = module
    spec.loader.exec_module(module)
    return module


def test_ratios_are_those_of_one_round(benchmark):
    """A machine that slows down by the hour moves the times, not the ratios."""
    times = {"float": [(k, 2 * k) for k in (1.0, 2.0, 4.0)], "qat": [(1.5 * k, 2 * k) for k in (1.0, 2.0, 4.0)]}
    plain, qat = benchmark.summary(times)
    assert (plain["to_float"], qat["to_float"]) == (1.0, 1.5)
    assert qat["to_float_quartiles"] == (1.5, 1.5)
    assert (qat["cpu_ms"], qat["wall_ms"]) == (3000, 4000)
    assert "| qat | 3000 (2250-4500) | 4000 | 1.50 (1.50-1.50) |" in benchmark.table([plain, qat])


def test_a_step_trains_and_each_is_measured_as_often(benchmark):
    data = benchmark.Synthetic(32, 4)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    before = module[0].weight.detach().clone()
    step = benchmark.step_of(module, benchmark.labels_loss(), data.batch)
    times = benchmark.measured({"float": step, "again": step}, rounds=3, warmup=1)
    assert {name: len(rounds) for name, rounds in times.items()} == {"float": 3, "again": 3}
    assert not torch.equal(module[0].weight, before)
