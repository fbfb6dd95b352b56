"""What the exported files compute, asked of the files: accuracy, and agreement of torch, ONNX Runtime and LiteRT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from pydantic import Field
from torch import fx

from compress.formats.tflite import tensor_names, with_outputs
from compress.product import Product, Run
from compress.quantization import Frozen, Grid, freeze, run_integers
from compress.settings import Settings
from compress.stages.export import by_kind
from compress.targets import open_model

FROZEN, TRAINED = "frozen torch int8", "trained torch int8"
"""The network on whole numbers, which the int8 files copy; and the fake-quantized network that was trained."""

HUGE = 1e30
"""In place of differences that are no numbers, which JSON does not have."""

Predict = Callable[[np.ndarray], np.ndarray]
"""Logits (N, K) of images (N, 3, H, W)."""


class Verify(Settings):
    """Fails the run where a file or a runtime computes something else than the network that was trained."""

    use: Literal["verify"]
    tolerance_lsb: int = Field(default=1, ge=0)
    """Largest difference of an int8 logit, in units of its last place."""
    tolerance_float: float = Field(default=1e-3, gt=0)
    """Largest difference of a float logit, as a part of the largest logit of the split."""
    tolerance_top1: float = Field(default=0.02, ge=0, lt=1)
    """Largest share of images whose class changes when fake quant becomes whole numbers (biases are rounded)."""
    threads: int = Field(default=2, ge=1)

    def apply(self, product: Product, run: Run) -> Product:
        models = {name: open_model(path, threads=self.threads) for name, path in product.files.items()}
        frozen = _frozen(product)
        references = _references(product, frozen)
        predictors = references | {name: model.predict for name, model in models.items()}
        logits, labels_N = _all_logits(predictors, run)
        notes = sorted({note for model in models.values() for note in model.notes})
        for note in notes:
            run.progress.note(note)
        agreement = self._agreement(product, run, logits, frozen)
        files = {
            name: {
                "runtime": model.runtime,
                "version": model.version,
                "accuracy": float((logits[name].argmax(1) == labels_N).mean()),
                "images": len(labels_N),
            }
            for name, model in models.items()
        }
        return replace(
            product,
            metrics={
                "tolerance_lsb": self.tolerance_lsb,
                "tolerance_float": self.tolerance_float,
                "tolerance_top1": self.tolerance_top1,
                "images": len(labels_N),
                "verdict": "PASS" if all(pair["verdict"] == "PASS" for pair in agreement) else "FAIL",
                "reason": "; ".join(pair["reason"] for pair in agreement if pair["reason"]),
                "files": files,
                "agreement": agreement,
                "notes": notes,
            },
        )

    def _agreement(
        self, product: Product, run: Run, logits: dict[str, np.ndarray], frozen: Frozen | None
    ) -> list[dict[str, Any]]:
        """One entry per pair of a float kind, per pair of int8 results, and for what freezing changed."""
        found = []
        for kind in by_kind(product):
            names = [name for name in logits if name in _names(kind)]
            if kind != "int8":
                for a, b in combinations(names, 2):
                    found.append(compare_floats(a, b, logits[a], logits[b], self.tolerance_float) | {"kind": kind})
                continue
            assert frozen is not None
            steps = {name: _steps(frozen, logits[name]) for name in names}
            trained = compare_classes(TRAINED, FROZEN, steps[TRAINED], steps[FROZEN], self.tolerance_top1)
            found.append(trained | {"kind": kind})
            for a, b in combinations([name for name in names if name != TRAINED], 2):
                pair = compare_steps(a, b, steps[a], steps[b], self.tolerance_lsb) | {"kind": kind}
                if pair["verdict"] == "FAIL":
                    image = _image(run, pair["worst_image"])
                    layers = compare_layers(_layers(a, product, frozen, image), _layers(b, product, frozen, image))
                    pair["layers"] = [layer for layer in layers if layer["differing"]]
                    for first in pair["layers"][:1]:
                        pair["reason"] += f", first at layer {first['layer']} (up to {first['max_lsb']} LSB)"
                found.append(pair)
        return found


def _names(kind: str) -> tuple[str, ...]:
    """What computes the logits of one kind: torch first, then the files."""
    torch_names = (TRAINED, FROZEN) if kind == "int8" else (f"torch {kind}",)
    return (*torch_names, f"{kind}.onnx", f"{kind}.tflite")


def _references(product: Product, frozen: Frozen | None) -> dict[str, Predict]:
    """The networks themselves, by the names of `_names`."""
    found = {_names(kind)[0]: _in_torch(network.module) for kind, network in by_kind(product).items()}
    return found | ({FROZEN: _in_integers(frozen)} if frozen is not None else {})


def _in_integers(frozen: Frozen) -> Predict:
    def predict(images_NCHW: np.ndarray) -> np.ndarray:
        result: np.ndarray = run_integers(frozen, torch.from_numpy(images_NCHW)).logits_NK.numpy()
        return result

    return predict


def _in_torch(module: torch.nn.Module) -> Predict:
    def predict(images_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = module.eval()(torch.from_numpy(images_NCHW)).numpy()
        return result

    return predict


def compare_classes(a: str, b: str, steps_a: np.ndarray, steps_b: np.ndarray, tolerance: float) -> dict[str, Any]:
    """How many images two int8 results (N, K) put into different classes; one entry for the report."""
    same = float((steps_a.argmax(1) == steps_b.argmax(1)).mean())
    passed = 1 - same <= tolerance
    return {
        "a": a,
        "b": b,
        "top1_agreement": same,
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else f"{a} and {b} differ in the class of {1 - same:.1%} of images",
    }


def compare_steps(a: str, b: str, steps_a: np.ndarray, steps_b: np.ndarray, tolerance_lsb: int) -> dict[str, Any]:
    """How far two int8 results are apart: (N, K) whole numbers of the output's grid, one entry for the report."""
    difference = np.abs(steps_a.astype(np.int64) - steps_b.astype(np.int64))
    largest = int(difference.max())
    sizes, counts = np.unique(difference, return_counts=True)
    passed = largest <= tolerance_lsb
    return {
        "a": a,
        "b": b,
        "logits": int(difference.size),
        "differing": int((difference > 0).sum()),
        "max_lsb": largest,
        "histogram": {str(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        "top1_agreement": float((steps_a.argmax(1) == steps_b.argmax(1)).mean()),
        "worst_image": int(difference.max(1).argmax()),
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else f"{a} and {b} differ by {largest} LSB, allowed {tolerance_lsb}",
    }


def compare_floats(a: str, b: str, logits_a: np.ndarray, logits_b: np.ndarray, tolerance: float) -> dict[str, Any]:
    """How far two float results (N, K) are apart, relative to the largest logit; one entry for the report."""
    largest = float(np.nan_to_num(np.abs(logits_a - logits_b), nan=HUGE, posinf=HUGE).max())
    relative = largest / max(float(np.nan_to_num(np.abs(logits_a), posinf=HUGE).max()), 1e-12)
    passed = relative <= tolerance
    return {
        "a": a,
        "b": b,
        "logits": int(logits_a.size),
        "max_abs": largest,
        "max_relative": relative,
        "top1_agreement": float((logits_a.argmax(1) == logits_b.argmax(1)).mean()),
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else f"{a} and {b} differ by {relative:.2g} of the largest logit, allowed {tolerance:g}",
    }


Steps = dict[str, np.ndarray]
"""Whole-number results of every quantized tensor for one image, by layer, NCHW, in the order of execution."""


def compare_layers(a: Steps, b: Steps) -> list[dict[str, Any]]:
    """Per layer that both have: how many values differ, and by how many steps at most."""
    found = []
    for layer in a:
        if layer in b:
            difference = np.abs(a[layer].astype(np.int64) - b[layer].astype(np.int64))
            found.append(
                {
                    "layer": layer,
                    "values": int(difference.size),
                    "differing": int((difference > 0).sum()),
                    "max_lsb": int(difference.max()),
                }
            )
    return found


def torch_layers(frozen: Frozen, image_CHW: np.ndarray) -> Steps:
    """Every grid's result in torch's integer arithmetic."""
    result = run_integers(frozen, torch.from_numpy(image_CHW)[None], keep_steps=True)
    return {layer: steps[0].numpy() for layer, steps in result.steps.items()}


def onnx_layers(path: Path, grids: list[Grid], image_CHW: np.ndarray, workspace: Path) -> Steps:
    """Every QuantizeLinear's result in ONNX Runtime, from a copy of the file with more outputs."""
    model = onnx.load(path)
    for grid in grids:
        model.graph.output.append(onnx.helper.make_tensor_value_info(grid.layer, onnx.TensorProto.UINT8, None))
    return _file_layers(model.SerializeToString(), workspace / "layers.onnx", grids, image_CHW)


def tflite_layers(path: Path, grids: list[Grid], image_CHW: np.ndarray, workspace: Path) -> Steps:
    """The same tensors in LiteRT, as far as the file has them; NHWC turned to NCHW."""
    content = path.read_bytes()
    present = tensor_names(content)
    content = with_outputs(content, [grid.layer for grid in grids if grid.layer in present])
    return _file_layers(content, workspace / "layers.tflite", grids, image_CHW)


def _file_layers(content: bytes, path: Path, grids: list[Grid], image_CHW: np.ndarray) -> Steps:
    path.write_bytes(content)
    try:
        model = open_model(path, threads=1)
        results = model.infer(model.feed(image_CHW))
    finally:
        path.unlink()
    by_name = {spec.name: result[0].astype(np.int32) for spec, result in zip(model.outputs, results, strict=True)}
    offset = {grid.layer: grid.zero_point - (0 if path.suffix == ".onnx" else 128) for grid in grids}
    steps = {}
    for layer in offset:
        if layer in by_name:
            values = by_name[layer] - offset[layer]
            channels_last = path.suffix == ".tflite" and values.ndim == 3
            steps[layer] = values.transpose(2, 0, 1) if channels_last else values
    return steps


def _layers(name: str, product: Product, frozen: Frozen, image_CHW: np.ndarray) -> Steps:
    if name == FROZEN:
        return torch_layers(frozen, image_CHW)
    path = product.files[name]
    read = onnx_layers if path.suffix == ".onnx" else tflite_layers
    return read(path, frozen.grids(), image_CHW, path.parent)


def _frozen(product: Product) -> Frozen | None:
    if not any(Path(name).stem == "int8" for name in product.files):
        return None
    assert isinstance(product.network.module, fx.GraphModule)
    return freeze(product.network.module)


def _steps(frozen: Frozen, logits_NK: np.ndarray) -> np.ndarray:
    return frozen.steps(torch.from_numpy(logits_NK)).numpy()


def _all_logits(predictors: dict[str, Predict], run: Run) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits (N, K) of the whole evaluation split, per file, and the labels (N,)."""
    size, count = 32, run.data.count("evaluation")
    logits: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    labels: list[np.ndarray] = []
    with run.progress.steps("verify", -(-count // size)) as advance:
        for batch in run.data.batches("evaluation", batch_size=size):
            images_NCHW = np.ascontiguousarray(batch.images_NCHW.numpy())
            for name, predict in predictors.items():
                logits[name].append(predict(images_NCHW))
            labels.append(batch.labels_N.numpy())
            advance(f"{sum(map(len, labels))}/{count} images")
    return {name: np.concatenate(parts) for name, parts in logits.items()}, np.concatenate(labels)


def _image(run: Run, index: int) -> np.ndarray:
    size = 32
    for number, batch in enumerate(run.data.batches("evaluation", batch_size=size)):
        if number == index // size:
            return np.ascontiguousarray(batch.images_NCHW[index % size].numpy())
    raise IndexError(index)
