"""Run folders as the pipeline writes them, whole and in parts, against what the report says of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress.errors import CompressError
from compress.report import read_report, summary_rows, wording, write_report

CPU = "AMD EPYC 9B14"
FILES = ("parent.onnx", "parent.tflite", "float.onnx", "float.tflite", "int8.onnx", "int8.tflite")
SIZES = dict(zip(FILES, (8_871_234, 8_902_116, 3_104_552, 3_098_771, 902_113, 861_504), strict=True))
ACCURACY = dict(zip(FILES, (0.9722, 0.9722, 0.9694, 0.9694, 0.9667, 0.9667), strict=True))
P50_MS = dict(zip(FILES, (6.64, 6.32, 3.41, 3.12, 2.05, 1.86), strict=True))
SPEEDUPS = {"float.onnx": 1.947, "float.tflite": 2.026, "int8.onnx": 3.239, "int8.tflite": 3.398}


def layers(share: float) -> list[dict[str, Any]]:
    """MobileNetV2's convolutions with that share of its channels, in multiples of 8."""

    def kept(channels: int) -> int:
        return max(8, int(channels * share / 8 + 0.5) * 8)

    found: list[dict[str, Any]] = []

    def add(name: str, inputs: int, outputs: int, groups: int, kernel: int, side: int) -> None:
        weights = outputs * inputs // groups * kernel * kernel
        entry = {"name": name, "kind": "Conv2d" if side > 1 else "Linear", "inputs": inputs, "outputs": outputs}
        found.append(entry | {"groups": groups, "kernel": [kernel] * 2, "macs": weights * side**2, "params": weights})

    inputs, side, number, original = kept(32), 48, 1, 32
    add("features.0.0", 3, inputs, 1, 3, side)
    for expand, channels, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            hidden, outputs = kept(original * expand), kept(channels)
            place = 0
            if expand > 1:
                add(f"features.{number}.conv.0.0", inputs, hidden, 1, 1, side)
                place = 1
            side = side // stride if block == 0 else side
            add(f"features.{number}.conv.{place}.0", hidden, hidden, hidden, 3, side)
            add(f"features.{number}.conv.{place + 1}", hidden, outputs, 1, 1, side)
            inputs, number, original = outputs, number + 1, channels
    add(f"features.{number}.0", inputs, kept(1280), 1, 1, side)
    add("classifier.1", kept(1280), 10, 1, 1, 1)
    return found


def network(accuracy: float, share: float = 1.0, precision: str = "float32") -> dict[str, Any]:
    own = layers(share)
    return {
        "accuracy": accuracy,
        "images": 360,
        "params": sum(layer["params"] for layer in own),
        "macs": sum(layer["macs"] for layer in own),
        "precision": precision,
        "layers": own,
    }


def history(epochs: int, loss: float) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch + 1, "loss": loss * 0.8**epoch + 0.07, "lr": 0.05 / (epoch + 1), "seconds": 3.1}
        for epoch in range(epochs)
    ]


def export(names: tuple[str, ...] = FILES) -> dict[str, Any]:
    files = {}
    for number, name in enumerate(names):
        kind, suffix = name.split(".")
        files[name] = {"format": suffix, "kind": kind, "size_bytes": SIZES[name], "sha256": f"{number:064x}"}
    return {"files": files}


def verify(names: tuple[str, ...] = FILES, verdict: str = "PASS") -> dict[str, Any]:
    runtimes = {"onnx": "onnxruntime", "tflite": "litert"}
    return {
        "tolerance_lsb": 1,
        "images": 360,
        "verdict": verdict,
        "files": {
            name: {"runtime": runtimes[name.split(".")[1]], "accuracy": ACCURACY[name], "images": 360} for name in names
        },
        "agreement": [
            {"a": "frozen torch int8", "b": "int8.onnx", "kind": "int8", "logits": 3600, "differing": 1, "max_lsb": 1,
             "top1_agreement": 1.0, "histogram": {"0": 3599, "1": 1}},
            {"a": "int8.onnx", "b": "int8.tflite", "kind": "int8", "logits": 3600, "differing": 7, "max_lsb": 1,
             "top1_agreement": 0.9972, "histogram": {"0": 3593, "1": 7}},
            {"a": "parent.onnx", "b": "parent.tflite", "kind": "float", "max_abs": 1.05e-05, "top1_agreement": 1.0},
        ],
        "notes": ["this x86 CPU has no VNNI: onnxruntime ran its exact kernels"],
    }  # fmt: skip


def benchmark(names: tuple[str, ...] = FILES, **conditions: Any) -> dict[str, Any]:
    rows, pairs = [], []
    for name in names:
        kind, suffix = name.split(".")
        runtime = "onnxruntime" if suffix == "onnx" else "litert"
        p50 = P50_MS[name]
        rows.append(
            {"file": name, "kind": kind, "runtime": runtime, "threads": 1, "p50_ms": p50, "p90_ms": p50 * 1.06,
             "p99_ms": p50 * 1.31, "min_ms": p50 * 0.97, "max_ms": p50 * 1.9, "spread": 0.06, "fps": 1000 / p50,
             "startup_ms": 41.2, "first_ms": p50 * 1.8, "peak_rss_mb": 74.3, "samples": 1024, "size_bytes": SIZES[name]}
        )  # fmt: skip
        if name in SPEEDUPS and f"parent.{suffix}" in names:
            ratio = SPEEDUPS[name]
            pairs.append(
                {"runtime": runtime, "baseline": f"parent.{suffix}", "candidate": name, "speedup": ratio,
                 "interval": [ratio * 0.97, ratio * 1.03], "aa_ratio": 1.004, "verdict": "OK"}
            )  # fmt: skip
    return {
        "conditions": {
            "target": "local", "machine": CPU, "arch": "x86_64", "is_arm": False, "cores": 2, "ram_gb": 7.8,
            "os": "Debian GNU/Linux 12", "kernel": "Linux 6.1", "governor": "unavailable", "temperature_c": "unavailable",
            "runtimes": {"onnxruntime": "1.31.1", "litert": "2.3.0"}, "threads": 1, "rounds": 4, "warmup": 10, "runs": 64,
            "batch": 1, "settings": "allow_spinning 1",
        }
        | conditions,
        "rows": rows,
        "pairs": pairs,
    }  # fmt: skip


TRAIN = ("train", network(0.975), {"history": history(8, 2.2)})
PRUNE = (
    "prune",
    network(0.6139, 0.6),
    {"goal_macs": 0.4, "macs_before": network(0.975)["macs"], "macs_after": network(0, 0.6)["macs"], "reached": 0.3985,
     "criterion": "magnitude", "round_to": 8, "steps": 3},
)  # fmt: skip
DISTILL = ("distill", network(0.9694, 0.6), {"history": history(12, 5.4), "teacher": "parent"})
QUANTIZE = ("quantize", network(0.9667, 0.6, "int8 (fake quant)"), {"history": history(3, 0.9)})
EXPORT = ("export", None, export())
VERIFY = ("verify", None, verify())
BENCHMARK = ("benchmark", None, benchmark())
WHOLE = (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY, BENCHMARK)
PLAIN = ("parent.onnx", "parent.tflite")

VARIANTS: dict[str, tuple[Any, ...]] = {
    "whole": WHOLE,
    "train only": (TRAIN,),
    "no prune": (TRAIN, QUANTIZE, EXPORT, VERIFY, BENCHMARK),
    "no verify": (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, BENCHMARK),
    "no benchmark": (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY),
    "no export": (TRAIN, PRUNE, DISTILL, QUANTIZE),
    "nothing compressed": (TRAIN, ("export", None, export(PLAIN)), ("benchmark", None, benchmark(PLAIN))),
    "float only": (
        TRAIN,
        PRUNE,
        DISTILL,
        ("export", None, export(FILES[:4])),
        ("verify", None, verify(FILES[:4]) | {"agreement": [verify()["agreement"][2]]}),
        ("benchmark", None, benchmark(FILES[:4])),
    ),
    "prune first": (PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY, BENCHMARK),
    "int8 file alone": (TRAIN, QUANTIZE, ("export", None, export(FILES[5:])), ("benchmark", None, benchmark(FILES[5:]))),
    "only the parent exported": (TRAIN, ("export", None, export(PLAIN)), ("benchmark", None, benchmark(PLAIN)), PRUNE),
    "benchmark alone": (("benchmark", None, benchmark()),),
    "empty stages": (("train", None, {}), ("export", None, {}), ("verify", None, {"verdict": "PASS"})),
}


def write_run(folder: Path, stages: tuple[Any, ...], notes: tuple[str, ...] = (), **run: Any) -> Path:
    names = [f"{number:02d}-{stage}" for number, (stage, _, _) in enumerate(stages, 1)]
    for number, (name, (stage, figures, metrics)) in enumerate(zip(names, stages, strict=True), 1):
        manifest = {
            "stage": stage, "index": number, "folder": name, "key": "f" * 64, "settings": {"use": stage},
            "seconds": 12.34 * number, "finished": "2026-11-21T10:02:11+00:00", "resumed": False,
            "notes": list(notes) or ([f"{stage}: head replaced, 1000 -> 10 classes"] if stage == "train" else []),
            "files": {}, "network": figures, "metrics": metrics,
        }  # fmt: skip
        path = folder / "stages" / name / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(manifest))
    described = {
        "name": "digits-mobilenet", "command": "compress run recipes/digits.yaml", "started": "2026-11-21T10:00:00+00:00",
        "finished": "2026-11-21T10:09:31+00:00", "seconds": 571.4, "recipe_hash": "9b1c" * 16, "compress": "0.1.0",
        "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1", "ai-edge-litert": "2.3.0"}, "python": "3.11.7",
        "platform": "Linux-6.1-x86_64", "cpu": CPU, "threads": 2, "device": "cpu", "seed": 7,
        "data": {"use": "digits", "labels": [str(digit) for digit in range(10)], "train": 1437, "evaluation": 360,
                 "fingerprint": "77ae" * 16, "notes": ["scikit-learn digits, resized from 8 px"]},
        "preprocess": {"size": 96, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop": 1.0},
        "model": {"use": "mobilenet_v2", "width": 1.0}, "stages": names,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(described | run))
    (folder / "recipe.yaml").write_text("name: digits-mobilenet\nseed: 7\n")
    return folder
