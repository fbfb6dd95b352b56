"""The files a board runs: the compressed network in float, with smaller weights and in int8, and the parent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
from compress.formats.ncnn import require_ncnn, to_ncnn
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.formats.weight_only import float16_weights, int8_weights, multiplied, rounded
from compress.measures import deflated
from compress.product import Network, Preprocess, Product, Run
from compress.quantization import fold_batchnorm, freeze
from compress.quantization.precision import simulated
from compress.settings import Settings

Format = Literal["onnx", "tflite", "ncnn"]
Kind = Literal["parent", "float", "float16", "int8_weights", "int8"]
"""Stems of exported files: `int8.tflite`."""

KINDS: tuple[Kind, ...] = ("parent", "float", "float16", "int8_weights", "int8")
"""The baseline first, then the more compressed the later."""

NCNN_KINDS: tuple[Kind, ...] = ("parent", "float")
NCNN_ONLY = "ncnn files are written for parent and float only: ncnn cannot hold the other kinds as they were trained"

WEIGHT_ONLY: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "float16": float16_weights,
    "int8_weights": int8_weights,
}
"""Kinds that differ from `float` in how the weights are stored, and nowhere else."""

SIMULATED = "{bits} is simulated in training and no runtime here executes it"


class Export(Settings):
    """Writes parent, float and int8 files, as far as the stages before made them."""

    use: Literal["export"]
    formats: tuple[Format, ...] = Field(default=("onnx", "tflite"), min_length=1)
    """`ncnn` needs `compress[ncnn]` and is written for `parent` and `float`: it cannot hold the others as trained."""
    kinds: tuple[Kind, ...] | None = Field(default=None, min_length=1)
    """Default: `parent`, `float` and `int8` where there are such networks. `float16` and `int8_weights` store the
    compressed float network's weights in 16 or 8 bits and compute in float32."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError naming the operator that a format does not have; costs seconds, not training."""
        if "ncnn" in self.formats:
            require_ncnn()
        model = _float(module, preprocess, {})
        if "ncnn" in self.formats:
            to_ncnn(model, {})
        if "tflite" in self.formats:
            for make in (_unchanged, *(WEIGHT_ONLY[kind] for kind in self.kinds or () if kind in WEIGHT_ONLY)):
                to_tflite(make(model), {})

    def apply(self, product: Product, run: Run) -> Product:
        networks = self._networks(product, run)
        models: dict[int, onnx.ModelProto] = {}  # as float ONNX: three kinds may share one network
        files: dict[str, Path] = {}
        formats = {kind: [f for f in self.formats if f != "ncnn" or kind in NCNN_KINDS] for kind in networks}
        if not any(formats.values()):
            raise ModelError(f"stage {run.stage or self.use}", NCNN_ONLY, "add onnx or tflite to `formats`")
        if any(len(found) < len(self.formats) for found in formats.values()):
            run.progress.note(NCNN_ONLY)
        with run.progress.steps("export", sum(map(len, formats.values()))) as advance:
            for kind, network in networks.items():
                about = partial(
                    metadata,
                    kind=kind,
                    preprocess=run.data.preprocess,
                    labels=run.data.labels,
                    recipe_hash=run.recipe_hash,
                    task=run.data.task,
                    scale=run.data.scale,
                )
                if kind == "int8":
                    model = to_onnx(network, {})
                else:
                    if id(network) not in models:
                        models[id(network)] = to_onnx(network, {})
                    model = WEIGHT_ONLY.get(kind, _unchanged)(models[id(network)])
                for file_format in formats[kind]:
                    path = run.folder / f"{kind}.{file_format}"
                    if file_format == "onnx":
                        content = _onnx_file(model, about(layout="NCHW"), kind)
                    elif file_format == "ncnn":
                        content = to_ncnn(model, about(layout="NCHW"))
                    else:
                        content = to_tflite(model, about(layout="NHWC"))
                    path.write_bytes(content)
                    files[path.name] = path
                    advance(path.name)
        # What zeros and shared values are for; compressing takes a second for each 20 MB, so only then.
        compress = bool(compressed(product).structure.held)
        about_files = {name: _about(path, compress) for name, path in files.items()}
        return replace(product, files=files, metrics={"files": about_files})

    def _networks(self, product: Product, run: Run) -> dict[Kind, Network]:
        """What each file is made from, by kind. Raises ModelError for a kind that this product does not have."""
        found = by_kind(product)
        bits = simulated(product.network.structure.quantize)
        if self.kinds is None:
            if bits:
                run.progress.note(SIMULATED.format(bits=bits) + ", so no int8 file is written")
            return {kind: found[kind] for kind in KINDS if kind in found}
        for kind in self.kinds:
            if kind not in found and kind not in WEIGHT_ONLY:
                why = f"; {SIMULATED.format(bits=bits)}" if bits and kind == "int8" else ""
                raise ModelError(
                    f"stage {run.stage or self.use}", f"there is no {kind} network{why}", f"leave {kind} out"
                )
        return {kind: found.get(kind, compressed(product)) for kind in KINDS if kind in self.kinds}


def by_kind(product: Product) -> dict[Kind, Network]:
    """The networks worth a file: the parent, the compressed float network, the int8 one."""
    networks: dict[Kind, Network] = {"parent": product.original}
    if compressed(product) is not product.original:
        networks["float"] = compressed(product)
    quantize = product.network.structure.quantize
    if quantize is not None and not simulated(quantize):
        networks["int8"] = product.network
    return networks


def compressed(product: Product) -> Network:
    """The last float network: what `float`, `float16` and `int8_weights` store. The parent, if nothing was pruned."""
    return product.float_network or product.network


def reference(network: Network, kind: str) -> nn.Module | None:
    """What a file of that kind made from `network` computes, in torch; for int8, before freezing.

    None for weights in 16 or 8 bits where BatchNorm cannot be folded here: torch.onnx then folds it in its own way.
    """
    if kind not in WEIGHT_ONLY:
        return network.module
    try:
        return rounded(fold_batchnorm(network.module), kind)
    except ModelError:
        return None


def to_onnx(network: Network, about: dict[str, str]) -> onnx.ModelProto:
    """The network as ONNX: QDQ int8 where it is fake-quantized, float32 with BatchNorm folded where it is not."""
    preprocess = network.structure.preprocess
    if network.structure.quantize is not None:
        assert isinstance(network.module, fx.GraphModule)
        return int8_onnx(freeze(network.module), preprocess.size, about, preprocess.channels)
    return _float(network.module, preprocess, about)


def _float(module: nn.Module, preprocess: Preprocess, about: dict[str, str]) -> onnx.ModelProto:
    with suppress(ModelError):  # control flow that fx cannot follow; torch.onnx often can, and folds what it finds
        module = fold_batchnorm(module)
    return float_onnx(module, preprocess.size, about, preprocess.channels)


def _unchanged(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def _onnx_file(model: onnx.ModelProto, about: dict[str, str], kind: Kind) -> bytes:
    model = multiplied(model) if kind == "int8_weights" else model
    onnx.helper.set_model_props(model, about)
    content: bytes = model.SerializeToString()
    return content


def _about(path: Path, compress: bool) -> dict[str, Any]:
    content = path.read_bytes()
    more = {"deflated_bytes": deflated(content)} if compress else {}
    return {
        "format": path.suffix[1:],
        "kind": path.stem,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **more,
    }
