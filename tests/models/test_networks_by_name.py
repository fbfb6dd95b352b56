"""The networks of docs/models.md, each the whole way; minutes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "networks.py"


def script():
    spec = importlib.util.spec_from_file_location("networks_by_name", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NETWORKS = script()


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("subject", NETWORKS.SUBJECTS, ids=lambda subject: f"{subject.use}-{subject.name}")
def test_a_network_goes_the_whole_way_or_is_refused_in_one_line(subject):
    found = NETWORKS.walk(subject)
    assert "traceback" not in found, found["traceback"]
    for step in ("built", "pruned", "quantized", "exported", "agree"):
        assert "\n" not in str(found.get(step, ""))
    assert found["built"] == "yes"
    assert found.get("agree", "yes").startswith("yes")
