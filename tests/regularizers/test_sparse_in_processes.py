"""Penalties and narrowing under torchrun: two processes compute what one computes, where there is no BatchNorm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.product import Network, Product, Run, Structure
from compress.stages.distill import Distill
from compress.stages.prune import Prune
from compress.stages.train import Train

ROOT = Path(__file__).parents[2]
FIT = {"epochs": 3, "batch_size": 16, "lr": 0.02, "augment": False, "ema": 0.9}
CUT = {"use": "prune", "goal": {"macs": 0.5}, "round_to": 2, "images": 32, "finetune": FIT}
STAGES = {
    "group norm": Train.model_validate_json(
        json.dumps({"use": "train", **FIT, "sparsity": {"use": "group_norm", "weight": 0.02}})
    ),
    "growing with a teacher": Distill.model_validate_json(
        json.dumps(
            {"use": "distill", **FIT, "losses": [{"use": "kd"}]}
            | {"sparsity": {"use": "growing", "goal": {"macs": 0.5}, "round_to": 2, "criterion": {"use": "taylor"}}}
        )
    ),
    "progressive": Prune.model_validate_json(
        json.dumps(CUT | {"criterion": {"use": "fisher"}, "schedule": {"use": "progressive", "every": 0.5}})
    ),
    "progressive with adamw": Prune.model_validate_json(
        json.dumps(
            CUT
            | {"criterion": {"use": "random"}, "schedule": {"use": "progressive"}}
            | {"finetune": FIT | {"optimizer": "adamw", "lr": 1e-3}}
        )
    ),
}


def a_product() -> Product:
    from conftest import PREPROCESS

    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    ).eval()
    structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=PREPROCESS)
    return Product(Network(module, structure))


def results(run: Run) -> dict[str, torch.Tensor]:
    found = {}
    for name, stage in STAGES.items():
        module = stage.apply(a_product(), run).network.module
        found |= {f"{name}: {key}": value for key, value in module.state_dict().items()}
    return found


def of_one_process(folder: str) -> None:
    """What torchrun starts."""
    import torch.distributed as dist
    from conftest import Stripes

    from compress.progress import Silent

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run = Run(
        folder=Path(folder),
        data=Stripes(),
        device=torch.device("cpu"),
        seed=3,
        progress=Silent(),
        recipe_hash="",
        rank=rank,
        world_size=2,
    )
    save_file(results(run), Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(run, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"from test_sparse_in_processes import of_one_process\nof_one_process({str(tmp_path)!r})\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/regularizers")))
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script)], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    alone = results(replace(run))
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
    widths = {name: len(alone[f"{name}: 0.bias"]) + len(alone[f"{name}: 2.bias"]) for name in STAGES}
    assert widths["progressive"] < widths["group norm"] == 40
