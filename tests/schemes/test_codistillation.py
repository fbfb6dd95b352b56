import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from networks_taught import digest, log_probabilities, logits, pruned, stage
from test_pipeline import NETWORK, RECIPE
from torch.autograd import gradcheck

from compress.errors import TrainingError
from compress.losses.kd import soft_targets
from compress.product import Network, Product, Run, Structure
from compress.progress import Silent
from compress.schemes.codistillation import Copies, due, flattened, kl_to_mean, restore

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_from_the_mean_of_probabilities_against_numpy(temperature):
    own, *others = logits(4)
    student = log_probabilities(own, temperature)
    mean = np.mean([np.exp(log_probabilities(other, temperature)) for other in others], axis=0)
    expected = temperature**2 * (mean * (np.log(mean) - student)).sum(axis=1).mean()
    np.testing.assert_allclose(kl_to_mean(own, others, temperature).item(), expected, rtol=1e-12)


def test_one_other_is_a_teacher_of_soft_targets():
    own, other = logits(2)
    torch.testing.assert_close(kl_to_mean(own, [other], 3.0), soft_targets(own, other, 3.0))
    torch.testing.assert_close(kl_to_mean(own, [other, other]), soft_targets(own, other, 1.0))
    assert kl_to_mean(own, [own, own]).item() == pytest.approx(0, abs=1e-12)


def test_gradient_of_the_divergence():
    own, *others = logits(3, images=3)
    assert gradcheck(lambda own: kl_to_mean(own, others, 2.0), [own.requires_grad_(True)])


def test_a_network_as_vectors_and_back(product, run):
    one, other = pruned(product, run).network.module, pruned(product, run).network.module
    other.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    assert digest(one) != digest(other)
    vectors = flattened(one)
    assert set(vectors) == {torch.float32, torch.int64}  # the latter counts BatchNorm's batches
    restore(other, vectors)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_when_copies_are_renewed():
    assert [step for step in range(12) if due(step, first=3, every=4)] == [3, 7, 11]
    assert [step for step in range(3) if due(step, first=0, every=1)] == [0, 1, 2]


def test_copies_are_the_networks_of_the_others_as_they_were(product, monkeypatch):
    """Rank 1 of three, with the exchange itself played."""
    networks = [copy.deepcopy(product.network.module) for _ in range(3)]
    for rank, network in enumerate(networks):
        with torch.no_grad():
            network.head.weight.fill_(rank)
    everybody = [flattened(network) for network in networks]

    def all_gather(gathered, mine):
        assert torch.equal(mine, everybody[1][mine.dtype])
        for place, vectors in zip(gathered, everybody, strict=True):
            place.copy_(vectors[mine.dtype])

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    copies = Copies(networks[1].train())
    copies.exchange(networks[1])
    assert [digest(other) for other in copies.others] == [digest(networks[0]), digest(networks[2])]
    with torch.no_grad():
        networks[0].head.weight.fill_(9)
    images_NCHW = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    stale, _ = copies.logits(images_NCHW)
    torch.testing.assert_close(stale, product_head_zero(product, images_NCHW))
    assert not stale.requires_grad


def product_head_zero(product, images_NCHW):
    network = copy.deepcopy(product.network.module)
    with torch.no_grad():
        network.head.weight.zero_()
        return network(images_NCHW)


def test_one_process_is_refused_before_training(product, run):
    codistilling = stage({"use": "codistillation"})
    with pytest.raises(TrainingError, match=r"needs several processes.*torchrun --nproc-per-node 2.*or use `mutual`"):
        codistilling.check(product.network.module, run.data.preprocess)
    with pytest.raises(TrainingError, match="needs several processes"):
        codistilling.apply(pruned(product, run), run)


def on_two_processes(*words: str, cwd: Path) -> None:
    ended("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words, cwd=cwd)


def ended(*words: str, cwd: Path) -> str:
    """What a Python process with one thread printed."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/schemes")))
    settings = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout


TRAINS_TWICE = """
import json, sys
from pathlib import Path
from typing import Any
from test_codistillation import made_by
from compress import processes

with processes.joined() as (rank, count):
    Path(f"{rank}.json").write_text(json.dumps([made_by(w, rank, count) for w in (0.0, 1.0)]))
"""


TRAINS_ALONE = """
import json
from test_codistillation import made_by

print(json.dumps(made_by(None)))
"""


def made_by(weight: float | None, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """What one process makes of the same start; without a weight, by plain distillation."""
    torch.manual_seed(0)  # for the biases, which `randomized` leaves
    product = Product(Network(randomized(SmallNet()), Structure(model={}, num_classes=5, preprocess=PREPROCESS)))
    cpu = torch.device("cpu")
    run = Run(Path(), Stripes(), cpu, seed=3, progress=Silent(), recipe_hash="", rank=rank, world_size=world_size)
    scheme = {"use": "codistillation", "every": 2, "burn_in": 0.4, "weight": weight}
    student = pruned(product, run)
    made = stage(None if weight is None else scheme, epochs=5).apply(student, run)
    return {"digest": digest(made.network.module), "accuracies": made.metrics.get("accuracies")}


@pytest.mark.slow
def test_two_processes_learn_from_each_other_and_end_with_the_first_ones_network(tmp_path):
    (tmp_path / "twice.py").write_text(TRAINS_TWICE)
    on_two_processes("twice.py", cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone, together = first
    # Apart: without the others' predictions, the first process trains as if it were the only one.
    only = ended("-c", TRAINS_ALONE, cwd=tmp_path)
    assert alone["digest"] == json.loads(only.splitlines()[-1])["digest"]
    assert together["digest"] != alone["digest"]
    assert len(together["accuracies"]) == 2


@pytest.mark.slow
def test_a_recipe_under_torchrun(tmp_path):
    (tmp_path / "mynet.py").write_text(NETWORK)
    scheme = "scheme: {use: codistillation, every: 3, with_teacher: false}"
    recipe = RECIPE[: RECIPE.index("  - {use: quantize")].replace("use: distill, ", f"use: distill, {scheme}, ")
    (tmp_path / "recipe.yaml").write_text(recipe)
    on_two_processes("-m", "compress.cli", "run", "recipe.yaml", "--out", "two", "stages.train.epochs=1", cwd=tmp_path)
    manifest = json.loads((tmp_path / "two/stages/03-distill/manifest.json").read_text())
    first, second = manifest["metrics"]["accuracies"]
    assert first == pytest.approx(manifest["network"]["accuracy"])
    assert first != second
    assert min(first, second) > 0.6
