"""ncnn files: a float network for Tencent's runtime, translated from our ONNX by pnnx, ncnn's own converter.

A file is a zip archive, stored and not packed: `network.param` and `network.bin` are what ncnn's C++ reads, blobs `in0`
and `out0`; `compress.json` has their shapes and our metadata, for a `.param` says nothing of either.

int8 is refused: ncnn's activations lie on symmetric grids of 255 steps around zero. A trained grid has 256 steps from
zero up behind a rectifier, and a zero point anywhere elsewhere (docs/runtimes.md measures what moving them would cost).
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from compress.errors import ModelError, TargetError
from compress.targets import open_model

PACKAGES = ("ncnn", "pnnx")
INSTALL = "python -m pip install 'compress[ncnn]'"
PARTS = {"network.param": "network.ncnn.param", "network.bin": "network.ncnn.bin"}
"""In the archive, and as pnnx calls them."""
TRANSLATING_S = 600
CLOSE = 1e-2
"""Of the largest output. Right translations were within 2e-4, even untrained; wrong ones 0.8 off and more."""


def require_ncnn() -> None:
    """Raises ModelError with the install line where the packages are absent."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]  # a mere folder has none
    if missing:
        raise ModelError("format ncnn", f"{' and '.join(missing)} not installed", INSTALL)


def to_ncnn(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The float32 network as an ncnn file; equal ONNX gives equal bytes.

    Raises ModelError for integers or float16 inside, for an operator that pnnx leaves behind, and for a translation
    that computes something else than the ONNX on an image of noise: pnnx and ncnn make such without a word.
    """
    require_ncnn()
    _refuse_unlike_float32(model)
    shape = _shape(model.graph.input[0])
    with tempfile.TemporaryDirectory() as folder:
        source, translated = Path(folder) / "network.onnx", Path(folder) / "translated.ncnn"
        onnx.save(model, source)
        said = _translate(source, shape)
        parts = {name: source.with_name(made) for name, made in PARTS.items()}
        if not all(path.is_file() for path in parts.values()):
            raise ModelError(
                "format ncnn", f"pnnx cannot translate the network ({said})", "leave ncnn out of `formats`"
            )
        contents = {name: path.read_bytes() for name, path in parts.items()}
        _refuse_unknown_layers(contents["network.param"].decode())
        about = {
            "input": {"name": "in0", "shape": shape},
            "output": {"name": "out0", "shape": _shape(model.graph.output[0])},
            "metadata": dict(metadata),
        }
        content = _archive({**contents, "compress.json": json.dumps(about, indent=1).encode()})
        translated.write_bytes(content)
        _refuse_other_answers(source, translated, shape)
    return content


def read_metadata(data: bytes) -> dict[str, str]:
    """The texts that were given to `to_ncnn`, by key."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found: dict[str, str] = json.loads(archive.read("compress.json"))["metadata"]
    return found


def _refuse_unlike_float32(model: onnx.ModelProto) -> None:
    stored = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    if quantized or stored & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16}:
        raise ModelError(
            "format ncnn", "ncnn cannot hold these numbers as they were trained", "write `parent` and `float` only"
        )


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    dims = value.type.tensor_type.shape.dim
    if any(not dim.HasField("dim_value") for dim in dims):
        raise ModelError(value.name, "its shape is not fixed", "export the network for one image size, batch 1")
    return [int(dim.dim_value) for dim in dims]


def _translate(source: Path, shape: list[int]) -> str:
    """Runs pnnx beside `source`; returns its last words where it fails, for its exit status says little."""
    spec = importlib.util.find_spec("pnnx")
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).with_name("pnnx")
    size = ",".join(map(str, shape))
    try:
        done = subprocess.run(
            [str(program), source.name, f"inputshape=[{size}]f32", "fp16=0"],
            cwd=source.parent,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRANSLATING_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError("format ncnn", f"pnnx cannot run ({error})", INSTALL) from error
    if done.returncode < 0:  # it may have written files before it died
        raise ModelError(
            "format ncnn", f"pnnx was ended by signal {-done.returncode}", "leave ncnn out of `formats` and report it"
        )
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def _layers(param: str) -> Iterator[tuple[str, str]]:
    """Type and name of each layer of a `.param`; two lines stand before them."""
    for line in param.splitlines()[2:]:
        kind, name, *_ = line.split()
        yield kind, name


def _refuse_unknown_layers(param: str) -> None:
    """What ncnn has no layer for keeps the name that pnnx has for it: `Tensor.reshape`, `torch.einsum`."""
    import ncnn

    unknown = [(kind, name) for kind, name in _layers(param) if ncnn.layer_to_index(kind) < 0]
    if unknown:
        kind, name = unknown[0]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ModelError(
            f"format ncnn, {name}", f"ncnn has no operator for {kind}{more}", "leave ncnn out of `formats`"
        )


def _archive(contents: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of 1980, not of now
    return stream.getvalue()


def _refuse_other_answers(source: Path, translated: Path, shape: list[int]) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    expected = open_model(source).predict(noise)
    try:
        answer = open_model(translated).predict(noise)
    except TargetError as error:
        raise ModelError(
            "format ncnn", f"ncnn cannot run it ({error.problem})", "leave ncnn out of `formats`"
        ) from error
    largest = max(float(np.abs(expected).max()), 1e-30)
    apart = float(np.abs(answer - expected).max()) / largest if answer.shape == expected.shape else np.inf
    if not apart <= CLOSE:
        raise ModelError(
            "format ncnn",
            f"the translation computes something else: outputs of shape {answer.shape} for {expected.shape}, up to"
            f" {apart:.2g} of the largest off",
            "an operator is translated wrongly; leave ncnn out of `formats`",
        )
