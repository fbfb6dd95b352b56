"""What each way to int8 costs in accuracy, measured on the exported files of several float parents.

    python benchmarks/int8_quality.py                                  # trains three parents first
    python benchmarks/int8_quality.py --parents runs/*/stages/02-train/network
    python benchmarks/int8_quality.py --rows 'PTQ*' --images 500       # a look, in minutes

Each row is a `quantize` stage. Its int8.onnx runs in ONNX Runtime and its int8.tflite in LiteRT, over all evaluation
images. Results go to int8_quality.json as they come, and a row that is there is not measured again; the table is
int8_quality.md. Run it on a quiet machine: a row of PTQ takes about half a minute, one of QAT minutes an epoch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from compress import checkpoint, manifest, recipe
from compress.data import open_data
from compress.errors import CompressError
from compress.formats.tflite import to_tflite
from compress.pipeline import run_recipe
from compress.product import Data, Network, Product, Run
from compress.progress import Progress, RichProgress
from compress.stages.distill import Distill
from compress.stages.export import to_onnx
from compress.stages.quantize import Quantize
from compress.targets import open_model, target
from compress.written import write_json, write_text

HERE = Path(__file__).parent
KD = {"losses": [{"use": "kd", "temperature": 4.0, "weight": 0.9}]}
SUFFIXES = ("onnx", "tflite")

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    name: str
    stage: Quantize | Distill | None
    """None is the float parent itself; Distill, the parent trained further in float."""


def rows(epochs: int, lr: float) -> list[Row]:
    """All of the table, the cheap ones first."""

    def ptq(name: str, **settings: Any) -> Row:
        return Row(f"PTQ {name}", stage(epochs=0, **settings))

    def qat(name: str, **settings: Any) -> Row:
        return Row(f"QAT {name}", stage(epochs=epochs, lr=lr, **settings))

    def stage(**settings: Any) -> Quantize:
        return Quantize.model_validate_json(json.dumps({"use": "quantize", **settings}))

    further = {"use": "distill", "epochs": epochs, "lr": lr, "optimizer": "adamw", "warmup_epochs": 0.5, **KD}
    best: Json = {"calibration": "mse", "bias_correction": True}
    return [
        Row("float parent", None),
        ptq("minmax"),
        ptq("percentile", calibration="percentile"),
        ptq("mse", calibration="mse"),
        ptq("minmax, bias correction", bias_correction=True),
        ptq("percentile, bias correction", calibration="percentile", bias_correction=True),
        ptq("mse, bias correction", **best),
        ptq("minmax, mse weights", weight_calibration="mse"),
        ptq("mse, mse weights", calibration="mse", weight_calibration="mse"),
        ptq("minmax, equalized", equalize=True),
        ptq("mse, equalized", calibration="mse", equalize=True),
        ptq("mse, BatchNorm re-estimated", calibration="mse", reestimate_batchnorm=True),
        ptq("mse, mse weights, bias correction", **best, weight_calibration="mse"),
        ptq("all of it", **best, weight_calibration="mse", equalize=True, reestimate_batchnorm=True),
        qat("learned steps"),
        qat("minmax steps", step_size="minmax"),
        qat("learned steps, KD", distill=KD),
        qat("minmax steps, KD", step_size="minmax", distill=KD),
        qat("learned steps, KD, grids held after half", distill=KD, hold_grids_after=0.5),
        qat("learned steps, KD, from mse and bias correction", distill=KD, **best),
        Row("float parent, KD as long as QAT (control)", Distill.model_validate_json(json.dumps(further))),
    ]


@dataclass(frozen=True)
class Photographs:
    """The evaluation split, decoded once."""

    images_NCHW: np.ndarray
    labels_N: np.ndarray

    @classmethod
    def of(cls, data: Data, limit: int | None) -> Photographs:
        batches = list(data.batches("evaluation", batch_size=64, limit=limit))
        images = np.concatenate([np.ascontiguousarray(batch.images_NCHW.numpy()) for batch in batches])
        return cls(images, np.concatenate([batch.labels_N.numpy() for batch in batches]))


def measure(network: Network, photographs: Photographs, threads: int) -> dict[str, np.ndarray]:
    """The classes (N,) that the network's ONNX and TFLite files give, by suffix."""
    model = to_onnx(network, {})
    contents = {"onnx": model.SerializeToString(), "tflite": to_tflite(model, {})}
    classes = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, content in contents.items():
            path = Path(folder) / f"network.{suffix}"
            path.write_bytes(content)
            classes[suffix] = open_model(path, threads=threads).predict(photographs.images_NCHW).argmax(1)
    return classes


def runs_of(options: argparse.Namespace, progress: Progress) -> list[Path]:
    """Run folders of the recipe, one per seed, made unless they are there."""
    folders = [options.work / str(seed) for seed in range(options.seeds)]
    for seed, folder in enumerate(folders):
        command = shlex.join(["python", *sys.argv])
        chosen = recipe.load(options.recipe, [f"seed={seed}"])
        run_recipe(chosen, folder, progress, command=command, base=Path.cwd(), device=torch.device("cpu"))
    return folders


def train_parents(options: argparse.Namespace, progress: Progress) -> list[Path]:
    """Folders of float networks, one per seed, trained by the recipe unless they are there."""
    stages = recipe.load(options.recipe).stages
    return [folder / f"stages/{len(stages):02d}-{stages[-1].use}/network" for folder in runs_of(options, progress)]


def run_in(folder: str, data: Data, progress: Progress, *, seed: int, name: str, device: str = "cpu") -> Run:
    """What a stage may use when a benchmark applies it."""
    return Run(
        folder=Path(folder),
        data=data,
        device=torch.device(device),
        seed=seed,
        progress=progress,
        recipe_hash="",
        stage=name,
    )


def apply(row: Row, product: Product, run: Run) -> Network:
    """The network that the row exports."""
    torch.manual_seed(run.seed)
    return product.network if row.stage is None else row.stage.apply(product, run).network


def key(row: Row, parent: Path, images: int) -> str:
    """What a result depends on, but for the code: measure again with another `--out` after changing that."""
    settings = row.stage.model_dump(mode="json") if row.stage else None
    return manifest.key(row.name, settings, manifest.files_below(parent), images)


def table(results: Sequence[Json], order: Sequence[str], command: str) -> str:
    """Markdown: mean over the parents, and the smallest and largest of them, in points from each's own parent."""
    by_row: dict[str, list[Json]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    parents = {r["parent"]: r for r in by_row.get("float parent", [])}
    lines = ["| | " + " | ".join(f"{s}, points (range)" for s in SUFFIXES) + " | same class as the parent | seconds |"]
    lines.append("|---|" + "---|" * (len(SUFFIXES) + 2))
    for name in order:
        found = [result for result in by_row.get(name, []) if result["parent"] in parents]
        if not found:
            continue
        cells = []
        for suffix in SUFFIXES:
            accuracy = [100 * result["accuracy"][suffix] for result in found]
            if name == "float parent":
                cells.append(f"{np.mean(accuracy):.2f} % ({min(accuracy):.2f} to {max(accuracy):.2f})")
                continue
            gained = [a - 100 * parents[r["parent"]]["accuracy"][suffix] for a, r in zip(accuracy, found, strict=True)]
            cells.append(f"{np.mean(gained):+.2f} ({min(gained):+.2f} to {max(gained):+.2f})")
        same = "" if name == "float parent" else f"{100 * np.mean([r['agreement']['onnx'] for r in found]):.2f} %"
        count = f" [{len(found)} of {len(parents)} seeds]" if len(found) < len(parents) else ""
        lines.append(f"| {name}{count} | {' | '.join(cells)} | {same} | {np.mean([r['seconds'] for r in found]):.0f} |")
    about = results[-1]
    lines += [
        "",
        f"MobileNetV2, {len(parents)} float parents (seeds), {about['images']} evaluation images, accuracy of the "
        "files in ONNX Runtime and LiteRT. Mean over the parents, smallest and largest in brackets: points of top-1 "
        "from each one's own float file. Seconds: quantizing or training, without export and evaluation.",
        "",
        f"{about['machine']}; " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", nargs="+", type=Path, help="folders of float networks; default: train them")
    parser.add_argument("--recipe", type=Path, default=HERE / "int8_quality.yaml", help="data, and how parents train")
    parser.add_argument("--work", type=Path, default=Path("runs/int8_quality"), help="where parents are trained")
    parser.add_argument("--seeds", type=int, default=3, help="how many parents to train")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--epochs", type=int, default=2, help="of QAT")
    parser.add_argument("--lr", type=float, default=1e-4, help="of QAT")
    parser.add_argument("--images", type=int, help="evaluation images; default: all")
    parser.add_argument("--threads", type=int, default=2, help="of the runtimes")
    parser.add_argument("--out", type=Path, default=HERE / "int8_quality.json")
    options = parser.parse_args()
    try:
        benchmark(options, RichProgress(Console(stderr=True)))
    except CompressError as error:
        sys.exit(str(error))


def benchmark(options: argparse.Namespace, progress: Progress) -> None:
    """Measures what is missing in the JSON, row by row over all parents, and writes the table after each."""
    parents = options.parents or train_parents(options, progress)
    everything = rows(options.epochs, options.lr)
    settings = recipe.load(options.recipe)
    networks = {folder: checkpoint.load(folder) for folder in parents}
    data = open_data(settings.data, settings.preprocess, progress, Path.cwd())
    photographs = Photographs.of(data, options.images)
    results: list[Json] = json.loads(options.out.read_text()) if options.out.exists() else []
    keys = {(row.name, parent): key(row, parent, len(photographs.labels_N)) for row in everything for parent in parents}
    done = {result["key"] for result in results}
    todo = [
        (row.name, parent)
        for row in everything
        for parent in parents
        if keys[row.name, parent] not in done
        and (row.stage is None or any(fnmatchcase(row.name, pattern) for pattern in options.rows))
    ]
    machine = f"{target('local').probe()['cpu']}, {torch.get_num_threads()} threads"
    classes: dict[Path, dict[str, np.ndarray]] = {}
    for row in everything:
        for seed, parent in enumerate(parents):
            if (row.name, parent) not in todo:
                continue
            if parent not in classes:
                classes[parent] = measure(networks[parent], photographs, options.threads)
            product = Product(networks[parent])
            with tempfile.TemporaryDirectory() as folder:
                run = run_in(folder, data, progress, seed=seed, name=row.name)
                began = time.perf_counter()
                network = apply(row, product, run)
                seconds = time.perf_counter() - began
            found = classes[parent] if row.stage is None else measure(network, photographs, options.threads)
            results.append(
                {
                    "key": keys[row.name, parent],
                    "row": row.name,
                    "parent": str(parent),
                    "seed": seed,
                    "settings": row.stage.model_dump(mode="json") if row.stage else None,
                    "images": len(photographs.labels_N),
                    "accuracy": {s: float((found[s] == photographs.labels_N).mean()) for s in SUFFIXES},
                    "agreement": {s: float((found[s] == classes[parent][s]).mean()) for s in SUFFIXES},
                    "seconds": seconds,
                    "machine": machine,
                    "versions": manifest.versions(("torch", "onnxruntime", "ai-edge-litert")),
                    "code": manifest.own_code(),
                }
            )
            todo.remove((row.name, parent))
            write_json(options.out, results)
            wanted = [result for result in results if result["key"] in keys.values()]
            command = shlex.join(["python", *sys.argv])
            write_text(options.out.with_suffix(".md"), table(wanted, [r.name for r in everything], command))
            accuracy = results[-1]["accuracy"]
            progress.note(
                f"{row.name}, parent {seed}: onnx {accuracy['onnx']:.2%}, tflite {accuracy['tflite']:.2%}, "
                f"{seconds:.0f} s; {len(todo)} left"
            )


if __name__ == "__main__":
    main()
