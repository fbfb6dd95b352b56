"""What each network by name goes through: built, pruned to half its multiply-adds, quantized, exported, executed.

    python benchmarks/networks.py [--only WORD] [--json FILE]

Weights are random with BatchNorm statistics of the images (nothing is downloaded), images synthetic: the table says
what works, not how well. Needs `compress[torchvision,timm,huggingface]`; prints a table of docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import measures
from compress.doctor import synthetic
from compress.errors import CompressError
from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.models import build
from compress.models.huggingface_models import HuggingFace
from compress.models.timm_models import Timm
from compress.models.torchvision_models import Torchvision
from compress.product import Batch, Network, Preprocess, Run, Structure
from compress.progress import Silent
from compress.pruning import MacGoal, Pruning, prune_network
from compress.quantization import Quantization, freeze, prepare
from compress.quantization.calibration import calibrate
from compress.training import reestimated_batchnorm
from compress.verification import Tolerances, Verification, verify_files

CPU = torch.device("cpu")
CLASSES = 10
EXACT = "stored numbers are equal and no layer is wrong"
"""How a verification notes that outputs differ by rounding alone: untrained networks amplify it."""


@dataclass(frozen=True)
class Subject:
    use: str
    name: str
    size: int
    config: Callable[[], dict[str, Any]] | None = None
    """Of a transformers model, small."""


def _config(kind: str, **fields: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model_type": kind, **fields}


SUBJECTS = (
    *(
        Subject("torchvision", name, size)
        for name, size in (
            ("resnet18", 64),
            ("resnext50_32x4d", 64),
            ("mobilenet_v2", 64),
            ("mobilenet_v3_small", 64),
            ("efficientnet_b0", 64),
            ("shufflenet_v2_x0_5", 64),
            ("squeezenet1_1", 64),
            ("mnasnet0_5", 64),
            ("densenet121", 64),
            ("googlenet", 64),
            ("regnet_y_400mf", 64),
            ("vgg11_bn", 224),
            ("convnext_tiny", 64),
            ("vit_b_16", 64),
            ("swin_t", 64),
        )
    ),
    *(
        Subject("timm", name, size)
        for name, size in (
            ("resnet18", 64),
            ("mobilenetv3_small_100", 64),
            ("mobilenetv4_conv_small", 64),
            ("efficientnet_lite0", 64),
            ("ghostnet_100", 64),
            ("mobileone_s0", 64),
            ("repvgg_a0", 64),
            ("fbnetc_100", 64),
            ("mobilevit_xxs", 64),
            ("edgenext_xx_small", 64),
            ("convnext_atto", 64),
            ("vit_tiny_patch16_224", 64),
            ("deit_tiny_distilled_patch16_224", 64),
        )
    ),
    Subject("huggingface", "ResNet", 64, _config("resnet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])),
    Subject("huggingface", "MobileNetV2", 64, _config("mobilenet_v2", depth_multiplier=0.5, image_size=64)),
    Subject("huggingface", "MobileNetV1", 64, _config("mobilenet_v1", depth_multiplier=0.5, image_size=64)),
    Subject(
        "huggingface", "EfficientNet", 64, _config("efficientnet", image_size=64, width_coefficient=0.5, hidden_dim=640)
    ),
    Subject("huggingface", "RegNet", 64, _config("regnet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])),
    Subject("huggingface", "ConvNext", 64, _config("convnext", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1])),
    Subject(
        "huggingface",
        "ViT",
        32,
        _config(
            "vit",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
        ),
    ),
)


class Images:
    """Synthetic images as the `Data` of a run."""

    labels = tuple(map(str, range(CLASSES)))
    task = "classification"
    channels_last = False
    fingerprint = "synthetic"

    def __init__(self, preprocess: Preprocess, images_NCHW: torch.Tensor) -> None:
        self.preprocess, self.images_NCHW = preprocess, images_NCHW

    def count(self, split: str) -> int:
        return len(self.images_NCHW)

    def batches(self, split: str, *, batch_size: int, **_: Any) -> list[Batch]:
        return [Batch(part, torch.arange(len(part)) % CLASSES) for part in self.images_NCHW.split(batch_size)]


def settings_of(subject: Subject) -> Torchvision | Timm | HuggingFace:
    match subject.use:
        case "torchvision":
            return Torchvision(use="torchvision", name=subject.name)
        case "timm":
            return Timm(use="timm", name=subject.name)
        case _:
            assert subject.config is not None
            return HuggingFace(use="huggingface", name=subject.name, weights=None, config=subject.config())


def settled(module: nn.Module, images_NCHW: torch.Tensor) -> nn.Module:
    """The network with BatchNorm statistics of the images: fresh ones let a signal fade or grow without bounds."""
    batches = [Batch(part, torch.zeros(len(part), dtype=torch.long)) for part in images_NCHW.split(16)]
    return reestimated_batchnorm(module, batches, CPU)


def walk(subject: Subject) -> dict[str, Any]:
    """How far the network came: by step, `yes`, a number, or the line that refuses it."""
    found: dict[str, Any] = {"use": subject.use, "name": subject.name, "size": subject.size}
    preprocess = Preprocess(size=subject.size, mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0)
    images_NCHW = synthetic(preprocess)[:32]
    settings = settings_of(subject)
    torch.manual_seed(0)
    began = time.perf_counter()

    def step(name: str, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except CompressError as error:
            found[name] = f"refused: {error}"
            return None
        except Exception as error:
            found[name] = f"TRACEBACK: {type(error).__name__}: {error}"
            found["traceback"] = traceback.format_exc()
            return None
        found[name] = "yes"
        return result

    module = step("built", lambda: settled(build(settings, CLASSES, subject.size), images_NCHW))
    if module is None:
        return found
    found["params"] = measures.params(module)
    structure = Structure(model=settings.model_dump(mode="json"), num_classes=CLASSES, preprocess=preprocess)
    with tempfile.TemporaryDirectory() as folder:
        data: Any = Images(preprocess, images_NCHW)
        run = Run(Path(folder), data, CPU, 0, Silent(), "0" * 64)
        goal = MacGoal(macs=0.5)
        pruning = Pruning(batchnorm_images=0)
        pruned = step("pruned", lambda: prune_network(Network(module, structure), goal, pruning, run=run))
        if pruned is not None:
            share = measures.macs(pruned.module, subject.size) / measures.macs(module, subject.size)
            found["pruned"] = round(share, 3)
            module = settled(pruned.module, images_NCHW)
        graph = step("quantized", lambda: prepare(module, Quantization(), preprocess))
        if graph is None:
            return found

        def exported() -> list[Path]:
            with torch.no_grad():
                calibrate(graph, data.batches("train", batch_size=16), CPU)
            model = int8_onnx(freeze(graph.eval()), subject.size, {})
            paths = [Path(folder) / "int8.onnx", Path(folder) / "int8.tflite"]
            paths[0].write_bytes(model.SerializeToString())
            paths[1].write_bytes(to_tflite(model, {}))
            return paths

        paths = step("exported", exported)
        if paths is None:
            return found
        verified = step("agree", lambda: verify_files(paths, limit=8, tolerances=Tolerances(), progress=Silent()))
        if verified is not None:
            found["agree"] = judged(verified)
        found["kilobytes"] = paths[1].stat().st_size // 1000
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def judged(verified: Verification) -> str:
    """`yes` where every layer agrees, with the largest difference of the logits; else why not."""
    worst = max(pair.get("max_lsb", 0) for pair in verified.agreement)
    if verified.passed or any(EXACT in note for note in verified.notes):
        return f"yes, {worst} LSB"
    return verified.reason


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| network | px | pruned to | int8 | ONNX and TFLite | both runtimes agree |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_cell(row.get(key)) for key in ("pruned", "quantized", "exported", "agree")]
        lines.append(f"| {row['use']} {row['name']} | {row['size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word that the package or the network's name holds")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for subject in SUBJECTS:
        if given.only in f"{subject.use} {subject.name}":
            rows.append(walk(subject))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "traceback"}), flush=True)
            if "traceback" in rows[-1]:
                print(rows[-1]["traceback"], flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
