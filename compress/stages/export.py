"""The files a board runs: the compressed network in float and int8, and the parent to compare with."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import Field
from torch import fx, nn

from compress.errors import ModelError
from compress.formats.metadata import metadata
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.product import Network, Preprocess, Product, Run
from compress.quantization import fold_batchnorm, freeze
from compress.settings import Settings

Format = Literal["onnx", "tflite"]


class Export(Settings):
    """Writes parent, float and int8 files, as far as the stages before made them."""

    use: Literal["export"]
    formats: tuple[Format, ...] = Field(default=("onnx", "tflite"), min_length=1)

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError naming the operator that a format does not have; costs seconds, not training."""
        model = _float(module, preprocess.size, {})
        if "tflite" in self.formats:
            to_tflite(model, {})

    def apply(self, product: Product, run: Run) -> Product:
        networks = by_kind(product)
        files: dict[str, Path] = {}
        with run.progress.steps("export", len(networks) * len(self.formats)) as advance:
            for kind, network in networks.items():
                about = partial(
                    metadata,
                    kind=kind,
                    preprocess=run.data.preprocess,
                    labels=run.data.labels,
                    recipe_hash=run.recipe_hash,
                )
                model = to_onnx(network, about(layout="NCHW"))
                for file_format in self.formats:
                    path = run.folder / f"{kind}.{file_format}"
                    if file_format == "onnx":
                        content = model.SerializeToString()
                    else:
                        content = to_tflite(model, about(layout="NHWC"))
                    path.write_bytes(content)
                    files[path.name] = path
                    advance(path.name)
        return replace(product, files=files, metrics={"files": {name: _about(path) for name, path in files.items()}})


def by_kind(product: Product) -> dict[str, Network]:
    """The networks worth a file: the parent, the compressed float network, the int8 one."""
    networks = {"parent": product.original}
    compressed = product.float_network or product.network
    if compressed is not product.original:
        networks["float"] = compressed
    if product.network.structure.quantize is not None:
        networks["int8"] = product.network
    return networks


def to_onnx(network: Network, about: dict[str, str]) -> onnx.ModelProto:
    """The network as ONNX: QDQ int8 where it is fake-quantized, float32 with BatchNorm folded where it is not."""
    size = network.structure.preprocess.size
    if network.structure.quantize is not None:
        assert isinstance(network.module, fx.GraphModule)
        return int8_onnx(freeze(network.module), size, about)
    return _float(network.module, size, about)


def _float(module: nn.Module, size: int, about: dict[str, str]) -> onnx.ModelProto:
    with suppress(ModelError):  # control flow that fx cannot follow; torch.onnx often can, and folds what it finds
        module = fold_batchnorm(module)
    return float_onnx(module, size, about)


def _about(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "format": path.suffix[1:],
        "kind": path.stem,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
