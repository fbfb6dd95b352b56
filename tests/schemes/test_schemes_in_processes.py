"""Every scheme with a companion of its own under torchrun: both processes end with the same student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from networks_taught import pruned, stage
from compress.progress import Silent
from compress.product import Network, Product, Run, Structure

def digest(module):
    # Not the statistics of BatchNorm: each process has measured its own since the last step began.
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


dist.init_process_group("gloo")
rank = dist.get_rank()
run = Run(folder=Path(sys.argv[1]), data=Stripes(), device=torch.device("cpu"), seed=3, progress=Silent(),
          recipe_hash="", rank=rank, world_size=2)
structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=PREPROCESS)
torch.manual_seed(0)
student = pruned(Product(Network(randomized(SmallNet()), structure)), run)
noise = {"steps": 4, "latent": 10, "channels": 4}
found = {"before": digest(student.network.module)}
for scheme in (
    {"use": "one"},
    {"use": "okddip", "peers": 2},
    {"use": "deeper_to_shallower"},
    {"use": "data_free", **noise},
    {"use": "hard_examples", "student_steps": 2, **noise},
    {"use": "netaug"},
):
    result = stage(scheme, epochs=2, batch_size=16).apply(student, run)
    found[scheme["use"]] = digest(result.network.module)
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/schemes")))
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), str(tmp_path)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(set(first.values())) == len(first) == 7
