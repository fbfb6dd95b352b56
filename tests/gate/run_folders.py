"""Folders of runs as the pipeline leaves them, with whatever answers and times a test wants."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.gate import answers as answering

CONDITIONS = {
    "target": "local", "machine": "Board B, 4 x Cortex-A76", "board": "Board B", "cpu": "4 x Cortex-A76",
    "arch": "aarch64",
    "features": ["asimd", "asimddp"], "is_arm": True, "threads": 1, "cores_used": [0, 1, 2, 3], "batch": 1, "rounds": 3,
}  # fmt: skip
IMAGES = 200
CLASSES = 10
RUNTIMES = {".onnx": ("onnxruntime", "1.31.1"), ".tflite": ("litert", "2.3.0")}


def network(path: Path, layers: int, seed: int = 0) -> Path:
    """A float ONNX file of (1, 3, 16, 16) whose time grows with `layers`."""
    rng = np.random.default_rng(seed)

    def weights(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5).astype("f4"), name)

    kept = [weights("first", (32, 3, 3, 3)), *(weights(f"w{k}", (32, 32, 3, 3)) for k in range(layers))]
    nodes = [helper.make_node("Conv", ["x", "first"], ["y0"], pads=[1] * 4)]
    nodes += [helper.make_node("Conv", [f"y{k}", f"w{k}"], [f"y{k + 1}"], pads=[1] * 4) for k in range(layers)]
    kept.append(weights("head", (32, CLASSES)))
    nodes += [
        helper.make_node("GlobalAveragePool", [f"y{layers}"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, CLASSES])],
        kept,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def labels(images: int = IMAGES) -> np.ndarray:
    return np.arange(images) % CLASSES


def top1(wrong: Sequence[int] = (), images: int = IMAGES) -> np.ndarray:
    """The labels, but for the images in `wrong`."""
    found = labels(images).copy()
    found[list(wrong)] = (found[list(wrong)] + 1) % CLASSES
    return found


def rounds(ms: float, *, spread: float = 0.01, seed: int = 0, count: int = 3, samples: int = 40) -> list[list[float]]:
    """Samples around `ms`."""
    rng = np.random.default_rng(seed)
    return (ms * (1 + spread * rng.standard_normal((count, samples)))).tolist()


def write_run(
    folder: Path,
    files: Mapping[str, Path],
    *,
    wrong: Mapping[str, Sequence[int]] | None = None,
    times: Mapping[str, Sequence[Sequence[float]]] | None = None,
    control: Mapping[str, Sequence[Sequence[float]]] | None = None,
    conditions: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    fingerprint: str = "f" * 64,
    verdict: str = "PASS",
    images: int = IMAGES,
    recipe_hash: str = "a" * 64,
    on_target: list[dict[str, Any]] | None = None,
) -> Path:
    """A finished run: `wrong` images and `times` in ms by file; without times, no benchmark."""
    export, verify, benchmark = (folder / "stages" / name for name in ("01-export", "02-verify", "03-benchmark"))
    for place in (export, verify):
        place.mkdir(parents=True)
    facts, described = {}, {}
    for name, path in files.items():
        shutil.copyfile(path, export / name)
        content = path.read_bytes()
        facts[name] = {
            "format": Path(name).suffix[1:],
            "kind": Path(name).stem,
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        runtime, version = RUNTIMES[Path(name).suffix]
        described[name] = {
            "kind": Path(name).stem,
            "runtime": runtime,
            "version": (versions or {}).get(runtime, version),
        }
    write_json(export / "manifest.json", {
        "stage": "export",
        "metrics": {"files": facts},
        "product": {"files": {name: f"stages/01-export/{name}" for name in files}},
    })  # fmt: skip
    answers = {name: top1((wrong or {}).get(name, ()), images) for name in files}
    answering.write(verify / answering.NAME, answering.Answers(labels(images), answers, tuple(range(8))))
    np.save(verify / answering.SAMPLE, np.random.default_rng(0).uniform(-1, 1, (8, 3, 16, 16)).astype("f4"))
    agreement = [{"a": "int8.onnx", "b": "int8.tflite", "kind": "int8", "logits": images * CLASSES, "differing": 2}]
    write_json(verify / "manifest.json", {"stage": "verify", "metrics": {
        "verdict": verdict, "reason": "" if verdict == "PASS" else "int8.onnx and int8.tflite differ by 9 LSB",
        "agreement": agreement, "files": described,
    }})  # fmt: skip
    labels_of_stages = ["01-export", "02-verify"]
    if times is not None:
        benchmark.mkdir()
        labels_of_stages.append("03-benchmark")
        processes = []
        for is_control, series in ((False, times), (True, control or {})):
            for name, found in series.items():
                runtime = described[name]["runtime"]
                for number, samples in enumerate(found):
                    processes.append({
                        "round": number, "file": name, "runtime": runtime, "control": is_control,
                        "samples_ms": list(samples), "version": described[name]["version"],
                        "settings": {"threads": 1, **(settings or {})}, "throttled": [],
                    })  # fmt: skip
        write_json(benchmark / "samples.json", processes)
        metrics = {"conditions": CONDITIONS | dict(conditions or {}), "accuracy": on_target or []}
        write_json(benchmark / "manifest.json", {"stage": "benchmark", "metrics": metrics})
    write_json(folder / "run.json", {
        "name": "made", "recipe_hash": recipe_hash, "data": {"fingerprint": fingerprint}, "stages": labels_of_stages,
        "finished": "2026-11-21T12:00:00+00:00",
    })  # fmt: skip
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
