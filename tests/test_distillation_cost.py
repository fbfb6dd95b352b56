"""The benchmark of the losses can measure each of them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


benchmark = loaded(Path(__file__).parents[1] / "benchmarks" / "distillation_cost.py")
CHOICES = [choice for kind in benchmark.members() for choice in benchmark.choices(kind)]
QUICK = [choice for choice in CHOICES if choice[0] != "factor_transfer, kernel_size: 3"]  # 66 million weights


@pytest.fixture(scope="module")
def noise() -> Any:
    return benchmark.Noise(4)


@pytest.fixture(scope="module")
def networks(noise: Any) -> Any:
    return benchmark.Networks.build(noise)


def test_every_loss_is_there_with_each_choice_of_its_settings():
    uses = {term.use for _, term in CHOICES}
    assert {"kd", "attention", "nst", "fsp", "rkd"} <= uses
    assert len(uses) == len(benchmark.members())
    assert {term.kernel for _, term in CHOICES if term.use == "nst"} == {"linear", "polynomial", "gaussian"}


@pytest.mark.parametrize("term", [pytest.param(term, id=name) for name, term in QUICK])
def test_each_loss_has_a_step(term, noise, networks):
    step, learns, _ = benchmark.step_of(term, networks, noise.batch)
    learns.zero_grad(set_to_none=True)
    value = step()
    assert value.isfinite()
    value.backward()
    gradients = [parameter.grad for parameter in learns.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_memory_is_what_tensors_hold():
    given = torch.zeros(1000, 1000)
    learns = torch.nn.Linear(1, 1)
    _, megabytes = benchmark.measured(lambda: (given + learns.weight).sum(), learns, 1)
    assert 4 <= megabytes < 9  # the sum is 4 MB; its gradient is one number, expanded and then summed
