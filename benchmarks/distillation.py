"""What each way to distil gives a pruned int8 network, against the same training without a teacher.

    python benchmarks/distillation.py                     # trains and prunes three parents first
    python benchmarks/distillation.py --rows 'kd*' --runs runs/distillation/0

Each row trains the pruned network in float with its losses, then takes it to int8: by calibration (grids of least
squared error, bias correction), or with `--qat-epochs` of training with the same losses. int8.onnx and int8.tflite then
classify all evaluation images. Results go to distillation.json as they come, and a row that is there is not measured
again; the table is distillation.md. The decoded, augmented images stay in memory (1.4 GB a seed). On one core a row
takes about two minutes a seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8_quality import SUFFIXES, Photographs, measure, run_in, runs_of
from rich.console import Console

from compress import checkpoint, manifest, measures, recipe
from compress.data import open_data
from compress.errors import CompressError
from compress.product import Batch, Data, Product, Split
from compress.progress import Progress, RichProgress
from compress.stages.distill import Distill
from compress.stages.quantize import Quantize
from compress.targets import target
from compress.written import read_json, write_json, write_text

HERE = Path(__file__).parent
NOTHING = "no distillation"
KD = {"use": "kd", "temperature": 4.0, "weight": 0.9}

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    name: str
    losses: tuple[Json, ...] = (KD,)
    labels: float = 0.1
    scheme: Json | None = None

    def stages(self, epochs: int, lr: float, qat_epochs: int) -> tuple[Distill, Quantize]:
        """The float training, and the way to int8."""
        lessons = {"losses": self.losses, "labels": self.labels}
        length = {"epochs": epochs, "lr": lr, "warmup_epochs": 0.5}
        how = {"optimizer": "adamw", "weight_decay": 0.02, "ema": 0.99}
        distill = {"use": "distill", **length, **how, **lessons, "scheme": self.scheme}
        quantize: Json = {"use": "quantize", "epochs": qat_epochs, "calibration": "mse", "bias_correction": True}
        if qat_epochs:
            quantize |= {"lr": lr / 5, "distill": lessons}
        return Distill.model_validate_json(json.dumps(distill)), Quantize.model_validate_json(json.dumps(quantize))


def beside_kd(name: str, loss: Json) -> Row:
    """A loss on features, with the one on logits: features alone do not train the classifier."""
    return Row(f"kd + {name}", (KD, loss))


ROWS = (
    Row(NOTHING, ({**KD, "weight": 0.0},), labels=1.0),
    Row("kd T=4"),
    beside_kd("fitnets, kept channels", {"use": "fitnets", "adaptor": "kept"}),
    beside_kd("fitnets, linear adaptor", {"use": "fitnets", "adaptor": "linear"}),
    Row("kd T=1", ({**KD, "temperature": 1.0},)),
    Row("logits l2", ({"use": "l2"},)),
    Row("dkd", ({"use": "dkd"},), labels=1.0),
    Row("dist", ({"use": "dist"},), labels=1.0),
    Row("kd standardized", ({"use": "kd", "temperature": 2.0, "weight": 9.0, "standardize": True},)),
    beside_kd("attention", {"use": "attention"}),
    beside_kd("attention, kept channels", {"use": "attention", "adaptor": "kept"}),
    beside_kd("similarity", {"use": "similarity"}),
    beside_kd("similarity, kept channels", {"use": "similarity", "adaptor": "kept"}),
    beside_kd("rkd", {"use": "rkd"}),
    beside_kd("vid, kept channels", {"use": "vid", "adaptor": "kept"}),
    beside_kd("cwd, kept channels", {"use": "cwd"}),
    beside_kd("nst", {"use": "nst"}),
    beside_kd("pkt", {"use": "pkt"}),
    beside_kd("crd", {"use": "crd"}),
    Row("teacher-free", ({"use": "teacher_free"},), labels=0.9),
    Row("fitnets alone, kept channels", ({"use": "fitnets", "adaptor": "kept"},), labels=1.0),
    Row("mutual learning", scheme={"use": "mutual", "macs": [0.66]}),
    Row("heads at all stages", scheme={"use": "deeper_to_shallower"}),
    Row("NetAug", scheme={"use": "netaug"}),
)


class InMemory:
    """Data whose batches are made once: the same seed and epoch are the same images, whatever is trained on them."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.made: dict[str, list[Batch]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def batches(self, split: Split, **how: Any) -> Iterable[Batch]:
        chosen = repr((split, sorted(how.items())))
        if chosen not in self.made:
            self.made[chosen] = list(self.data.batches(split, **how))
        return self.made[chosen]


def product_of(folder: Path) -> Product:
    """The pruned network of a run, with its parent."""
    places = [folder / "stages" / name / "network" for name in ("02-train", "03-prune")]
    parent, pruned = (checkpoint.load(place) for place in places)
    return Product(pruned, parent)


def key(row: Row, folder: Path, options: argparse.Namespace, images: int) -> str:
    """What a result depends on, but for the code: measure again with another `--out` after changing that."""
    stages = [stage.model_dump(mode="json") for stage in row.stages(options.epochs, options.lr, options.qat_epochs)]
    return manifest.key(row.name, stages, manifest.files_below(folder / "stages/03-prune/network"), images)


def table(results: Sequence[Json], command: str) -> str:
    """Markdown: mean and range over the seeds, in points from the same seed without distillation."""
    by_row: dict[str, dict[str, Json]] = {}
    for result in results:
        by_row.setdefault(result["row"], {})[result["parent"]] = result
    control = by_row.get(NOTHING, {})
    lines = [
        "| | int8 | against no distillation, points | seeds won | float | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(by_row, key=lambda name: -np.mean([int8(r) for r in by_row[name].values()])):
        found = list(by_row[name].values())
        gains = [100 * (int8(r) - int8(control[r["parent"]])) for r in found if r["parent"] in control]
        against = f"{np.mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})" if gains and name != NOTHING else ""
        won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if against else ""
        cells = [
            name,
            f"{100 * np.mean([int8(r) for r in found]):.2f} %",
            against,
            won,
            f"{100 * np.mean([r['float'] for r in found]):.2f} %",
            f"{np.mean([r['cpu_seconds'] for r in found]):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = results[-1]
    parents = list({r["parent"]: r for r in results}.values())
    way = f"{about['qat_epochs']} with fake quantization" if about["qat_epochs"] else "post-training quantization"
    accuracies = ", ".join(f"{100 * r['parent_accuracy']:.2f} %" for r in parents)
    lines += [
        "",
        f"MobileNetV2 at {about['size']} px, {len(parents)} seeds of parent and pruned network ({about['macs']:.2f} of "
        f"the MACs), {about['epochs']} epochs in float, then {way}. int8: the mean accuracy of "
        f"int8.onnx and int8.tflite on {about['images']} evaluation images. Parents: "
        f"{accuracies}. In brackets, smallest and largest of the "
        "seeds. CPU seconds: both trainings, all threads.",
        "",
        f"{about['machine']}; " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def int8(result: Json) -> float:
    return float(np.mean([result["accuracy"][suffix] for suffix in SUFFIXES]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, help="run folders of the recipe; default: make them")
    parser.add_argument("--recipe", type=Path, default=HERE / "distillation.yaml", help="data, parents and pruning")
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"), help="where they are made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--epochs", type=int, default=3, help="of the float training")
    parser.add_argument("--qat-epochs", type=int, default=0, help="with fake quantization; 0 calibrates only")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the float training; a fifth of it with fake quant")
    parser.add_argument("--images", type=int, help="evaluation images; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=HERE / "distillation.json")
    options = parser.parse_args()
    try:
        benchmark(options, RichProgress(Console(stderr=True)))
    except CompressError as error:
        sys.exit(str(error))


def benchmark(options: argparse.Namespace, progress: Progress) -> None:
    """Measures what is missing in the JSON, row by row over all seeds, and writes the table after each."""
    folders = options.runs or runs_of(options, progress)
    settings = recipe.load(options.recipe)
    data = InMemory(open_data(settings.data, settings.preprocess, progress, Path.cwd()))
    photographs = Photographs.of(data, options.images)
    images = len(photographs.labels_N)
    products = {folder: product_of(folder) for folder in folders}
    results: list[Json] = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {result["key"] for result in results}
    wanted = [row for row in ROWS if any(fnmatchcase(row.name, pattern) for pattern in options.rows)]
    # Seed by seed, so that one seed's images are in memory at a time.
    todo = [(row, f) for f in folders for row in wanted if key(row, f, options, images) not in done]
    for number, (row, folder) in enumerate(todo, 1):
        seed, product = int(read_json(folder / "run.json")["seed"]), products[folder]
        if number == 1 or todo[number - 2][1] != folder:
            data.made.clear()
        distill, quantize = row.stages(options.epochs, options.lr, options.qat_epochs)
        with tempfile.TemporaryDirectory() as place:
            run = run_in(place, data, progress, seed=seed, name=row.name, device=options.device)
            torch.manual_seed(seed)
            began, cpu = time.perf_counter(), _cpu_seconds()
            distilled = distill.apply(product, run)
            quantized = quantize.apply(distilled, run)
            seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
        found = measure(quantized.network, photographs, threads=torch.get_num_threads())
        batches = data.batches("evaluation", batch_size=64, limit=options.images)
        parent = products[folder].original
        size = settings.preprocess.size
        results.append(
            {
                "key": key(row, folder, options, images),
                "row": row.name,
                "parent": str(folder),
                "seed": seed,
                "settings": [distill.model_dump(mode="json"), quantize.model_dump(mode="json")],
                "epochs": options.epochs,
                "qat_epochs": options.qat_epochs,
                "size": size,
                "macs": measures.macs(product.network.module, size) / measures.macs(parent.module, size),
                "images": images,
                "accuracy": {s: float((found[s] == photographs.labels_N).mean()) for s in SUFFIXES},
                "float": measures.score(distilled.network.module, batches, run.device),
                "parent_accuracy": _accuracy_of(folder, "02-train"),
                "pruned_accuracy": _accuracy_of(folder, "03-prune"),
                "seconds": seconds,
                "cpu_seconds": cpu,
                "machine": f"{target('local').probe()['cpu']}, {torch.get_num_threads()} threads",
                "versions": manifest.versions(("torch", "onnxruntime", "ai-edge-litert")),
                "code": manifest.own_code(),
            }
        )
        write_json(options.out, results)
        command = shlex.join(["python", *sys.argv])
        write_text(options.out.with_suffix(".md"), table(results, command))
        progress.note(
            f"{row.name}, seed {seed}: int8 {int8(results[-1]):.2%}, float {results[-1]['float']:.2%}, "
            f"{seconds:.0f} s; {len(todo) - number} left"
        )


def _accuracy_of(folder: Path, stage: str) -> float:
    return float(read_json(folder / "stages" / stage / manifest.NAME)["network"]["accuracy"])


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
