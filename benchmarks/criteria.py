"""What each pruning criterion, penalty and schedule keeps of a small network, with random choice as the control.

    python benchmarks/criteria.py                        # all of it: minutes on one core
    python benchmarks/criteria.py --only fisher random   # a look

A MobileNetV2 of width 0.35 is trained on the handwritten digits, one for each seed, and pruned to half of its
multiply-adds in one step. Accuracy is on the evaluation digits: after BatchNorm re-estimation alone, which is what the
criterion is good for, and after a short training. Schedules have the same training in all; penalties train the parent
further before it is pruned, beside the same training without one. Results go to criteria.json as they come, and what is
there is not measured again; the table is criteria.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress.data.digits import Digits, open_digits
from compress.measures import macs, score
from compress.models.mobilenet_v2 import MobileNetV2Settings, build_mobilenet_v2
from compress.product import Network, Preprocess, Product, Run, Structure
from compress.progress import Silent
from compress.stages.prune import Prune
from compress.stages.train import Train
from compress.written import write_json, write_text

HERE = Path(__file__).parent
SIZE, ROUND_TO = 32, 4
GOAL = {"macs": 0.5}
PARENT = {"epochs": 12, "lr": 0.1, "batch_size": 64}
SHORT = {"epochs": 2, "lr": 0.02, "batch_size": 64}
FURTHER = {"epochs": 4, "lr": 0.02, "batch_size": 64}

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    table: str
    name: str
    prune: Json
    before: Json | None = None
    """A stage `train` before it."""


def rows() -> Iterator[Row]:
    """All of the tables."""
    criteria: dict[str, Json] = {
        "magnitude L1": {"use": "magnitude", "p": 1},
        "magnitude L2": {"use": "magnitude", "p": 2},
        "bn_scale": {"use": "bn_scale"},
        "lamp": {"use": "lamp"},
        "fpgm": {"use": "fpgm"},
        "taylor": {"use": "taylor"},
        "fisher": {"use": "fisher"},
        "obd": {"use": "obd"},
        "activation": {"use": "activation"},
        "random": {"use": "random"},
    }
    for name, criterion in criteria.items():
        yield Row("criteria", name, {"criterion": criterion, "finetune": SHORT})
    for name in ("magnitude L1", "fisher", "random"):
        yield Row("criteria", f"{name}, local", {"criterion": criteria[name], "finetune": SHORT, "scope": "local"})
    fisher = {"criterion": {"use": "fisher"}, "goal": {"macs": 0.3}}
    yield Row("schedules", "one_shot", fisher | {"finetune": FURTHER})
    once = FURTHER | {"epochs": 1}
    yield Row("schedules", "iterative", fisher | {"schedule": {"use": "iterative", "steps": 4}, "finetune": once})
    cubic = {"schedule": {"use": "iterative", "steps": 4, "ramp": "cubic"}, "finetune": once}
    yield Row("schedules", "iterative, cubic", fisher | cubic)
    yield Row(
        "schedules", "progressive", fisher | {"schedule": {"use": "progressive", "every": 0.25}, "finetune": FURTHER}
    )
    for name, penalty, criterion in (
        ("none", None, {"use": "magnitude", "p": 2}),
        ("none", None, {"use": "bn_scale"}),
        ("bn_scale", {"use": "bn_scale", "weight": 0.03}, {"use": "bn_scale"}),
        ("group_norm", {"use": "group_norm", "weight": 0.01}, {"use": "magnitude", "p": 2}),
        ("group_norm, lasso", {"use": "group_norm", "form": "lasso", "weight": 0.05}, {"use": "magnitude", "p": 2}),
        ("growing", {"use": "growing", "goal": GOAL, "round_to": ROUND_TO}, {"use": "magnitude", "p": 2}),
    ):
        label = f"{name}, pruned by {criterion['use']}"
        yield Row("penalties", label, {"criterion": criterion, "finetune": SHORT}, FURTHER | {"sparsity": penalty})


def accuracy(module: torch.nn.Module, run: Run) -> float:
    """In [0, 1], on the evaluation digits."""
    return score(module, run.data.batches("evaluation", batch_size=256), run.device)


def train(words: Json, product: Product, run: Run) -> Product:
    return Train.model_validate_json(json.dumps({"use": "train", **words})).apply(product, run)


def parent(seed: int, run: Run, folder: Path) -> Product:
    """The network that is pruned; trained once and kept in `folder`."""
    torch.manual_seed(seed)
    module = build_mobilenet_v2(MobileNetV2Settings(use="mobilenet_v2", width=0.35), 10)
    structure = Structure(model={"use": "mobilenet_v2", "width": 0.35}, num_classes=10, preprocess=run.data.preprocess)
    product, file = Product(Network(module.eval(), structure)), folder / f"digits-{seed}.safetensors"
    if file.exists():
        module.load_state_dict(load_file(file))
        return product
    product = train(PARENT, product, run)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(product.network.module.state_dict(), file)
    return product


def measured(row: Row, seed: int, run: Run, whole: Product) -> Json:
    """Accuracies of the row with one seed, and what of the multiply-adds is left."""
    torch.manual_seed(seed)
    began = time.process_time()
    if row.before is not None:
        whole = train(row.before, whole, run)
    words = {"use": "prune", "goal": GOAL, "round_to": ROUND_TO, "images": 256, **row.prune}
    found: Json = {"whole": accuracy(whole.network.module, run)}
    if "schedule" not in words:
        bare = Prune.model_validate_json(json.dumps({**words, "finetune": None})).apply(whole, run)
        found["reestimated"] = accuracy(bare.network.module, run)
    done = Prune.model_validate_json(json.dumps(words)).apply(whole, run)
    found["trained"] = accuracy(done.network.module, run)
    found["macs"] = macs(done.network.module, SIZE) / macs(whole.network.module, SIZE)
    return found | {"cpu_seconds": round(time.process_time() - began, 1)}


def table(results: Json, seeds: list[int]) -> str:
    """Markdown: means over the seeds and the largest distance of one of them from the mean, in points."""

    def cell(each: list[Json], key: str) -> str:
        values = [100 * one[key] for one in each if key in one]
        if not values:
            return ""
        mean = statistics.mean(values)
        return f"{mean:.1f} ± {max(abs(value - mean) for value in values):.1f}"

    lines: list[str] = []
    for name, first in (("criteria", "criterion"), ("schedules", "schedule"), ("penalties", "penalty")):
        lines += ["", f"| {first} | whole | after BatchNorm re-estimation | after the training | multiply-adds |"]
        lines += ["|---|---|---|---|---|"]
        for row in rows():
            each = [results[key] for seed in seeds if (key := f"{row.table}: {row.name}: {seed}") in results]
            if row.table == name and each:
                cells = [cell(each, key) for key in ("whole", "reestimated", "trained")]
                share = statistics.mean(one["macs"] for one in each)
                lines.append(f"| {row.name} | {' | '.join(cells)} | {share:.2f} |")
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="*", default=None, help="names of rows, as in the table")
    words.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    words.add_argument("--parents", type=Path, default=Path(tempfile.gettempdir()) / "compress-criteria")
    given = words.parse_args()
    torch.set_num_threads(1)
    file = HERE / "criteria.json"
    results: Json = json.loads(file.read_text()) if file.exists() else {}
    data = open_digits(Digits(use="digits"), Preprocess(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0))
    base = Run(Path(), data, torch.device("cpu"), 0, Silent(), "")
    for seed in given.seeds:
        run = replace(base, seed=seed)
        whole = parent(seed, run, given.parents)
        for row in rows():
            key = f"{row.table}: {row.name}: {seed}"
            if key in results or (given.only is not None and row.name not in given.only):
                continue
            results[key] = measured(row, seed, run, whole)
            write_json(file, results)
            print(key, results[key], flush=True)
    said = f"python benchmarks/criteria.py; torch {torch.__version__}, one thread, {platform.machine()}."
    write_text(
        HERE / "criteria.md", f"{said} Percent of {data.count('evaluation')} digits.\n\n{table(results, given.seeds)}"
    )
    print(table(results, given.seeds))


if __name__ == "__main__":
    sys.exit(main())
