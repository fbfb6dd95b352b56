"""What low rank, 2:4 zeros and shared weights do to one network: accuracy, multiply-adds, bytes, bytes compressed.

    python benchmarks/sparsity.py [--epochs 8] [--seeds 3]

MobileNetV2 x 0.35 on scikit-learn's digits at 32 px (nothing is downloaded), one training for all; then each chain of
stages with the same distillation and QAT behind it, down to the int8 TFLite file. Prints a table of docs/sparsity.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress import api, measures
from compress.models import build
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.product import Network, Product, Run, Structure
from compress.progress import Silent
from compress.stages.cluster import Cluster
from compress.stages.distill import Distill
from compress.stages.export import Export
from compress.stages.factorize import Factorize
from compress.stages.quantize import Quantize
from compress.stages.sparsify import Sparsify
from compress.stages.train import Train
from compress.verification.tflite_file import TFLiteFile

SIZE = 32
MODEL: dict[str, Any] = {"use": "mobilenet_v2", "width": 0.35, "stem_stride": 2, "dropout": 0.0}
CHAINS: dict[str, list[Any]] = {
    "nothing": [],
    "factorize, energy 0.95": [Factorize(use="factorize", energy=0.95)],
    "factorize, energy 0.8": [Factorize(use="factorize", energy=0.8)],
    "sparsify 2:4": [Sparsify(use="sparsify")],
    "cluster, 256": [Cluster(use="cluster", clusters=256)],
    "cluster, 32": [Cluster(use="cluster", clusters=32)],
    "cluster, 16": [Cluster(use="cluster", clusters=16)],
    "sparsify 2:4, cluster 32": [Sparsify(use="sparsify"), Cluster(use="cluster", clusters=32)],
}


def row(chain: list[Any], product: Product, run: Run, epochs: int) -> dict[str, float]:
    """What the chain, a distillation of `epochs` and one epoch of QAT make of the trained network."""
    for stage in (
        *chain,
        Distill(use="distill", epochs=epochs, batch_size=32, teacher="parent", lr=0.02),
        Quantize(use="quantize", epochs=1, batch_size=32),
    ):
        torch.manual_seed(run.seed)
        product = stage.apply(product, run)
    with tempfile.TemporaryDirectory() as folder:
        product = Export(use="export", formats=("tflite",), kinds=("int8",)).apply(
            product, replace(run, folder=Path(folder))
        )
        path = product.files["int8.tflite"]
        content, labels = path.read_bytes(), []
        answers = []
        file = TFLiteFile(path)
        for batch in run.data.batches("evaluation", batch_size=64):
            answers.append(torch.from_numpy(file.predict(batch.images_NCHW.contiguous().numpy())).argmax(1))
            labels.append(batch.labels_N)
    assert product.float_network is not None
    return {
        "accuracy": float((torch.cat(answers) == torch.cat(labels)).float().mean()),
        "macs": measures.macs(product.float_network.module, SIZE),
        "bytes": len(content),
        "deflated": measures.deflated(content),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    data = api.data(use="digits", size=SIZE, progress=Silent())
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CHAINS}
    for seed in range(given.seeds):
        run = Run(Path(), data, torch.device("cpu"), seed, Silent(), recipe_hash="")
        torch.manual_seed(seed)
        structure = Structure(model=MODEL, num_classes=10, preprocess=data.preprocess)
        network = Network(build(MobileNetV2Settings(**MODEL), 10, SIZE), structure)
        parent = Train(use="train", epochs=given.epochs, batch_size=32).apply(Product(network), run).network
        for name, chain in CHAINS.items():
            rows[name].append(row(chain, Product(parent), run, max(1, given.epochs // 2)))
            print(seed, name, rows[name][-1], flush=True)
        table(rows)


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints the mean over the seeds so far, and the accuracy's spread."""
    print("\n| | accuracy of int8.tflite | multiply-adds, M | bytes | bytes, zipped |\n|---|---|---|---|---|")
    for name, found in rows.items():
        mean = {key: statistics.mean(one[key] for one in found) for key in found[0]}
        each = [100 * one["accuracy"] for one in found]
        spread = f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else ""
        print(
            f"| {name} | {100 * mean['accuracy']:.1f}{spread} | {mean['macs'] / 1e6:.2f} | "
            f"{mean['bytes']:,.0f} | {mean['deflated']:,.0f} |"
        )


if __name__ == "__main__":
    main()
