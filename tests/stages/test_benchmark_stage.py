"""The benchmark stage with real runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from compress.errors import TargetError
from compress.product import Network, Product, Run, Structure
from compress.stages.benchmark import Benchmark

MLPERF = Path(__file__).parents[3] / "shared" / "data" / "mlperf_tiny"


class Progress:
    def __init__(self) -> None:
        self.total = 0
        self.heard: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        self.total = total
        yield self.heard.append

    def note(self, text: str) -> None:
        self.notes.append(text)


def dense(path: Path, *, width: int) -> Path:
    weights = np.random.default_rng(0).normal(0, 0.1, (width, 3)).astype(np.float32)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 3), ("y", width))
    ]
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    graph = helper.make_graph(nodes, "dense", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def product(tmp_path: Path) -> Product:
    """Named in an order that is not the order of measuring."""
    files = {name: dense(tmp_path / name, width=width) for name, width in (("int8.onnx", 4), ("parent.onnx", 400))}
    return Product(Network(torch.nn.Identity(), Structure(model={}, num_classes=4)), files=files)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    data: Any = None  # timing needs no images
    folder = tmp_path / "stage"
    folder.mkdir()
    return Run(folder, data, torch.device("cpu"), seed=0, progress=Progress(), recipe_hash="")


def short(**fields: Any) -> Benchmark:
    return Benchmark(use="benchmark", **{"rounds": 2, "runs": 5, "warmup_s": 0.01, **fields})


def test_measures_every_file_against_the_parent(product: Product, run: Run) -> None:
    after = short(runtimes=("onnxruntime",), rounds=1).apply(product, run)
    assert after.files == product.files
    assert after.network is product.network
    assert product.metrics == {}
    assert set(after.metrics) == {"conditions", "rows", "pairs"}
    assert [row["file"] for row in after.metrics["rows"]] == ["parent.onnx", "int8.onnx"]
    assert [row["kind"] for row in after.metrics["rows"]] == ["parent", "int8"]
    for row in after.metrics["rows"]:
        assert row["fps"] == pytest.approx(1000 / row["p50_ms"])
        assert row["size_bytes"] == product.files[row["file"]].stat().st_size
    (pair,) = after.metrics["pairs"]
    assert (pair["baseline"], pair["candidate"]) == ("parent.onnx", "int8.onnx")
    assert after.metrics["conditions"]["batch"] == 1
    json.dumps(after.metrics, allow_nan=False)


def test_keeps_the_raw_samples_and_shows_progress(product: Product, run: Run) -> None:
    short(runtimes=("onnxruntime",)).apply(product, run)
    samples = json.loads((run.folder / "samples.json").read_text())
    assert [(s["round"], s["file"], s["control"]) for s in samples] == [
        (number, file, control)
        for number in (0, 1)
        for file, control in (("parent.onnx", False), ("int8.onnx", False), ("parent.onnx", True))
    ]
    assert all(len(sample["samples_ms"]) == 5 for sample in samples)
    progress: Any = run.progress
    assert len(progress.heard) == progress.total == 6


def test_says_which_runtime_had_nothing_to_measure(product: Product, run: Run) -> None:
    short(rounds=1, runs=1).apply(product, run)
    progress: Any = run.progress
    assert "litert: no file of its kind, not measured" in progress.notes


def test_needs_exported_files(product: Product, run: Run) -> None:
    with pytest.raises(TargetError, match="export the network first"):
        short().apply(Product(product.network), run)


@pytest.mark.skipif(not MLPERF.is_dir(), reason=f"no reference models at {MLPERF}")
def test_measures_tflite_too(product: Product, run: Run) -> None:
    files = {
        **product.files,
        "parent.tflite": MLPERF / "pretrainedResnet.tflite",
        "int8.tflite": MLPERF / "pretrainedResnet_quant.tflite",
    }
    metrics = short(rounds=1).apply(Product(product.network, files=files), run).metrics
    assert {row["runtime"] for row in metrics["rows"]} == {"onnxruntime", "litert"}
    assert [pair["runtime"] for pair in metrics["pairs"]] == ["onnxruntime", "litert"]
    assert set(metrics["conditions"]["runtimes"]) == {"onnxruntime", "litert"}


@pytest.mark.parametrize("fields", [{"rounds": 0}, {"runtimes": ()}, {"runtimes": ("tvm",)}, {"threads": 0}])
def test_refuses_settings_out_of_range(fields: dict) -> None:
    with pytest.raises(ValidationError):
        short(**fields)
