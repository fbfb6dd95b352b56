"""Measures and runs exported networks on the machine it lies on: one file, to be copied to a board.

    python agent.py probe
    python agent.py time MODEL [--runtime auto] [--threads 1|auto] [--cores auto|any|0,1] [--runs 50]
                               [--warmup-s 0.2] [--min-s 0] [--inputs X.npy]
    python agent.py compare FILE... [--runtime onnxruntime --runtime litert] [--rounds 4] [--done DONE.jsonl]
                               [--tolerance 0.05] [--seed 0] and what `time` takes
    python agent.py run MODEL --inputs X.npy --outputs Y.npy [--labels L.npy]
    python agent.py sustain MODEL [--minutes 5] [--every-s 5]
    python agent.py layers ARCHIVE.zip [--runtime onnxruntime] [--threads 1] [--sample-s 0.02]

Each command prints JSON objects, one per line of its standard output, the result last. Progress and errors go to
standard error, `agent: error: ...` last, with exit status 1. It needs Python 3.9, numpy, and onnxruntime,
ai-edge-litert (or tflite-runtime) or ncnn; nothing of `compress`. `probe` needs Python alone.

`compare` starts Python again for every process that it measures: as `--launcher` or COMPRESS_AGENT_PYTHON says (a JSON
list of words), else as `sys.executable`.

The rest of `compress` opens every model through `open_model` too: accuracy and speed come from equal
sessions.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

try:
    import numpy as np
except ImportError:  # a board before its set-up: `probe` can say so
    np = None  # type: ignore[assignment]

UNAVAILABLE = "unavailable"

ROOT = Path("/")
"""Where proc, sys and etc lie; tests put a board's files elsewhere."""

SUFFIXES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".tflite": "litert", ".ncnn": "ncnn"}
"""Which runtime reads which file."""

PACKAGES = {"onnxruntime": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime"), "ncnn": ("ncnn",)}
"""What provides a runtime, best first."""

INSTALL = {
    "onnxruntime": "python -m pip install onnxruntime",
    "litert": "python -m pip install ai-edge-litert",
    "ncnn": "python -m pip install ncnn",
}

RUNTIMES = tuple(INSTALL)

Rounds = list[list[float]]
"""Samples in ms, one list per round, which is one process."""


class AgentError(Exception):
    """A model, a file or a runtime that cannot be used; one line that names it and the way out."""


# ----------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the file declares it, at batch 1."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float | None = None
    """real = scale * (stored - zero_point); None: it holds real values, or the file does not say."""
    zero_point: int = 0

    def store(self, real: np.ndarray) -> np.ndarray:
        """Real values in the tensor's own type; halves round to even, as in ONNX.

        An array of the tensor's own integer type is taken for stored values.
        """
        if real.dtype == self.dtype and self.dtype.kind != "f":
            return real
        if self.scale is None:
            if self.dtype.kind != "f":
                raise AgentError(f"input {self.name}: wants {self.dtype} and the file has no scale for {real.dtype}")
            return real.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        steps = np.rint(real.astype(np.float32) / np.float32(self.scale)) + self.zero_point
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)

    def real(self, stored: np.ndarray) -> np.ndarray:
        """Real values as float32, whatever the tensor's own type."""
        if self.scale is None:
            return stored.astype(np.float32, copy=False)
        return (stored.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class Model:
    """A network opened by a runtime on this machine, batch 1."""

    path: Path
    runtime: str
    """onnxruntime, litert or ncnn."""
    version: str
    """Of the runtime's package."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    infer: Callable[[np.ndarray], list[np.ndarray]]
    """One inference: an array of `input`'s shape and dtype to one array per output, in the file's types."""
    settings: dict[str, Any]
    """What the runtime was asked for."""
    notes: tuple[str, ...] = ()
    """Sentences that belong beside every number made with this model."""
    import_ms: float = 0.0
    """Time to import the runtime, 0 when it already was."""
    load_ms: float = 0.0
    """Time from the file to a model ready for its first inference."""

    def feed(self, image: np.ndarray) -> np.ndarray:
        """One image, CHW or HWC, real-valued or stored values, as the file's input stores it, with a batch axis."""
        wanted = self.input.shape[1:]
        layouts = [image]
        if image.ndim == 3:
            layouts += [image.transpose(2, 0, 1), image.transpose(1, 2, 0)]  # HWC to CHW, CHW to HWC
        for layout in layouts:
            if layout.shape == wanted:
                return np.ascontiguousarray(self.input.store(layout)[None])
        raise AgentError(f"{self.path}: wants images of shape {wanted}, given {image.shape}")

    def answers(self, images: np.ndarray, *, on_image: Callable[[], None] | None = None) -> np.ndarray:
        """The first output (N, ...) as the file stores it, for NCHW or NHWC images (see `feed`), one by one."""
        if not len(images):
            raise AgentError(f"{self.path}: no images given")
        rows = []
        for image in images:
            rows.append(self.infer(self.feed(image))[0][0])
            if on_image:
                on_image()
        try:
            return np.stack(rows)
        except ValueError as error:
            raise AgentError(f"{self.path}: the size of its output changes from image to image") from error

    def predict(self, images: np.ndarray, *, on_image: Callable[[], None] | None = None) -> np.ndarray:
        """Real values (N, ...) of the first output for NCHW or NHWC images, one by one."""
        return self.outputs[0].real(self.answers(images, on_image=on_image))


def open_model(path: str | Path, runtime: str = "auto", threads: int = 1) -> Model:
    """The network in `path`, ready to infer; `auto` chooses the runtime by the file's suffix.

    Raises AgentError for a missing file or runtime, a file the runtime refuses, more than one input, a batch
    other than 1 (a symbolic batch is read as 1) or an open image size.
    """
    path = Path(path)
    if runtime == "auto":
        if path.suffix not in SUFFIXES:
            raise AgentError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        runtime = SUFFIXES[path.suffix]
    if runtime not in INSTALL:
        raise AgentError(f"no runtime {runtime!r}; known are {', '.join(RUNTIMES)}")
    if not path.is_file():
        raise AgentError(f"{path}: no such file")
    if threads < 1:
        raise AgentError(f"threads: {threads} is less than 1")
    openers = {"onnxruntime": _open_onnxruntime, "litert": _open_litert, "ncnn": _open_ncnn}
    try:
        model = openers[runtime](path, threads)
    except AgentError:
        raise
    except Exception as error:  # a file that the runtime opens and cannot describe: names, tensors that are not there
        raise AgentError(f"{path}: {runtime} cannot read it: {_first_line(error)}") from error
    if -1 in model.input.shape:
        raise AgentError(f"{path}: its input has an open size {model.input.shape}; export it with a fixed one")
    if model.input.dtype.kind not in "fiu":
        raise AgentError(f"{path}: its input holds {model.input.dtype}, not numbers")
    return model


def _open_onnxruntime(path: Path, threads: int) -> Model:
    begin = time.perf_counter()
    ort = _imported(_installed("onnxruntime"))
    imported = time.perf_counter()

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come as exceptions: the agent has its own line for each
    ort.set_default_logger_severity(4)  # of what has no session yet
    entries = {"session.intra_op.allow_spinning": "1"}
    notes = []
    if saturates():
        entries["session.x64quantprecision"] = "1"
        notes.append(
            "this x86 CPU has no VNNI: onnxruntime computes int8 layers with its exact, slower u8 x u8 kernels"
            " (session.x64quantprecision=1), because its fast u8 x s8 kernels saturate here"
        )
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen classes for this, none of them public
        raise AgentError(f"{path}: onnxruntime cannot open it: {_first_line(error)}") from error
    loaded = time.perf_counter()

    def spec(node: Any) -> TensorSpec:
        return TensorSpec(node.name, _shape(path, node.name, node.shape), _ort_dtype(path, node.type))

    source = _only_input(path, session.get_inputs())

    def infer(array: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(None, {source.name: array})
        except Exception as error:
            raise AgentError(f"{path}: onnxruntime cannot run it: {_first_line(error)}") from error

    return Model(
        path=path,
        runtime="onnxruntime",
        version=ort.__version__,
        input=spec(source),
        outputs=tuple(spec(sink) for sink in session.get_outputs()),
        infer=infer,
        settings={
            "threads": threads,
            "optimization": "all",
            "execution": "sequential",
            "inter_op": 1,
            **entries,
        },
        notes=tuple(notes),
        import_ms=1e3 * (imported - begin),
        load_ms=1e3 * (loaded - imported),
    )


def _open_litert(path: Path, threads: int) -> Model:
    begin = time.perf_counter()
    package = _installed("litert")
    interpreters = _imported(f"{package}.interpreter")
    imported = time.perf_counter()

    try:
        # Without an explicit resolver the interpreter applies XNNPACK by itself, the kernels a board runs.
        interpreter = interpreters.Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise AgentError(f"{path}: litert cannot open it: {_first_line(error)}") from error
    loaded = time.perf_counter()

    def spec(detail: dict[str, Any]) -> TensorSpec:
        scale, zero_point = detail["quantization"]
        shape = _shape(path, detail["name"], [int(n) for n in detail["shape"]])
        return TensorSpec(detail["name"], shape, np.dtype(detail["dtype"]), float(scale) or None, int(zero_point))

    source = _only_input(path, interpreter.get_input_details())
    sinks = interpreter.get_output_details()

    def infer(array: np.ndarray) -> list[np.ndarray]:
        try:
            interpreter.set_tensor(source["index"], array)
            interpreter.invoke()
            return [interpreter.get_tensor(sink["index"]) for sink in sinks]
        except Exception as error:
            raise AgentError(f"{path}: litert cannot run it: {_first_line(error)}") from error

    notes = []
    if package == "tflite_runtime":
        notes.append("tflite-runtime is frozen; ai-edge-litert is its successor, and the two are not bit-equal")
    if not (ROOT / "sys/devices/system/cpu").is_dir() and platform.machine() == "aarch64":
        notes.append("there is no /sys here: litert cannot tell the CPU and was seen to compute other int8 outputs")
    return Model(
        path=path,
        runtime="litert",
        version=_litert_version() or UNAVAILABLE,
        input=spec(source),
        outputs=tuple(spec(sink) for sink in sinks),
        infer=infer,
        settings={"threads": threads, "package": package, "delegate": "default (XNNPACK)"},
        notes=tuple(notes),
        import_ms=1e3 * (imported - begin),
        load_ms=1e3 * (loaded - imported),
    )


NCNN_HALF_FLOATS = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
"""ncnn's default where a CPU has them; then it computes another network than the one that was verified."""


def _open_ncnn(path: Path, threads: int) -> Model:
    """A zip archive of `network.param`, `network.bin` and `compress.json`, which has the shapes of `in0` and `out0`."""
    begin = time.perf_counter()
    ncnn = _imported(_installed("ncnn"))
    imported = time.perf_counter()

    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in NCNN_HALF_FLOATS:
        setattr(net.opt, name, False)
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            about = json.loads(archive.read("compress.json"))
            source, sink = (
                TensorSpec(about[key]["name"], _shape(path, key, about[key]["shape"]), np.dtype(np.float32))
                for key in ("input", "output")
            )
            lines = archive.read("network.param").decode().splitlines()
            unknown = [line.split()[0] for line in lines[2:] if ncnn.layer_to_index(line.split()[0]) < 0]
            if unknown:  # ncnn would say so itself, but on a standard error that is not Python's
                raise AgentError(f"{path}: ncnn {ncnn.__version__} has no layer {unknown[0]}")
            param, weights = (archive.extract(part, folder) for part in ("network.param", "network.bin"))
            if net.load_param(param) or net.load_model(weights):
                raise AgentError(f"{path}: ncnn cannot open it: its layers or weights are damaged")
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise AgentError(f"{path}: is no ncnn file of compress: {_first_line(error)}") from error
    loaded = time.perf_counter()

    def infer(array: np.ndarray) -> list[np.ndarray]:
        extractor = net.create_extractor()
        image = np.ascontiguousarray(array[0])  # ncnn has no batch axis, and reads this memory where it is
        status = extractor.input(source.name, ncnn.Mat(image))
        if not status:
            status, answer = extractor.extract(sink.name)
        if status:
            raise AgentError(f"{path}: ncnn cannot run it (status {status})")
        return [np.array(answer)[None]]

    return Model(
        path=path,
        runtime="ncnn",
        version=ncnn.__version__,
        input=source,
        outputs=(sink,),
        infer=infer,
        settings={"threads": threads, "half_floats": False},
        import_ms=1e3 * (imported - begin),
        load_ms=1e3 * (loaded - imported),
    )


def saturates() -> bool:
    """Whether onnxruntime's u8 x s8 kernels may compute wrong numbers here: x86 without VNNI.

    They add pairs of products in 16 bits (`vpmaddubsw`); VNNI sums in 32. Also true of an x86 CPU whose
    features cannot be read: exact and slow is the better mistake. ARM's kernels are exact.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & cpu_flags()


def _ort_dtype(path: Path, kind: str) -> np.dtype[Any]:
    name = kind[len("tensor(") : -1]
    names = {"float": "float32", "double": "float64"}
    try:
        return np.dtype(names.get(name, name))
    except TypeError as error:
        raise AgentError(f"{path}: holds a tensor of type {kind}, which cannot be fed or read") from error


def _only_input(path: Path, inputs: Sequence[Any]) -> Any:
    if len(inputs) != 1:
        raise AgentError(f"{path}: has {len(inputs)} inputs; only networks with one image input can be run")
    return inputs[0]


def _shape(path: Path, name: str, shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape with 1 for a symbolic batch and -1 for any other symbolic size."""
    batch = next(iter(shape), 1)
    if isinstance(batch, int) and batch != 1:
        raise AgentError(f"{path}: {name} has a fixed batch of {batch}; export it with batch 1")
    return tuple(n if isinstance(n, int) else (1 if axis == 0 else -1) for axis, n in enumerate(shape))


def _installed(runtime: str) -> str:
    """The name of the package that provides the runtime here."""
    for package in PACKAGES[runtime]:
        if importlib.util.find_spec(package):
            return package
    raise AgentError(f"{runtime} is not installed; {INSTALL[runtime]}")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AgentError(f"{module} is installed but cannot be imported: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------- machine

FEATURES = (
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8",
)  # fmt: skip
"""What decides how fast a network runs; the rest of the CPU's flags is left out."""

ARM_PARTS = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72", "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77", "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE", "0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710",
    "0xd49": "Neoverse-N2", "0xd4f": "Neoverse-V2",
}  # fmt: skip
"""Part numbers of implementer 0x41 (Arm), from the Main ID Register as /proc/cpuinfo prints it."""

THROTTLE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
"""Of `vcgencmd get_throttled` on a Raspberry Pi; the same bits plus 16 say that it happened since boot."""


def probe() -> dict[str, Any]:
    """The machine, its runtimes and its present conditions; what cannot be found out is "unavailable"."""
    flags = cpu_flags()
    return {
        "board": _board(),
        "cpu": _cpu_name(),
        "arch": platform.machine() or UNAVAILABLE,
        "machine": platform.machine() or UNAVAILABLE,
        "bits": bits(),
        "is_arm": platform.machine().lower().startswith(("aarch64", "arm")),
        "emulator": emulator(),
        "features": [name for name in FEATURES if name in flags] or UNAVAILABLE,
        "cores": os.cpu_count() or UNAVAILABLE,
        "cores_allowed": len(allowed_cores()),
        "cores_fastest": fastest_cores(),
        "ram_gb": _ram_gb(),
        "disk_free_mb": _disk_free_mb(Path(__file__).parent),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}".strip() or UNAVAILABLE,
        "libc": _libc(),
        "python": platform.python_version(),
        "python_path": sys.executable or UNAVAILABLE,
        "venv": all(map(importlib.util.find_spec, ("venv", "ensurepip"))),
        "agent": sha256(Path(__file__)),
        "numpy": np.__version__ if np else UNAVAILABLE,
        "runtimes": {
            "onnxruntime": _version_of("onnxruntime") or UNAVAILABLE,
            "litert": _litert_version() or UNAVAILABLE,
            "ncnn": _version_of("ncnn") or UNAVAILABLE,
        },
        **conditions(),
    }


def emulator() -> str:
    """What runs this process in place of a CPU, such as `qemu-aarch64`; "unavailable" where nothing is seen of it.

    qemu hides its own file in /proc/self/maps, in 7.2 not in smaps. Times that it takes say nothing of a board.
    """
    own, mapped = _read("/proc/self/comm") or "", _read("/proc/self/smaps") or ""
    names = (
        [own] if own.startswith("qemu-") else re.findall(r"/(qemu-[\w.-]+|[\w-]+-binfmt-[A-Z]+)$", mapped, re.MULTILINE)
    )
    return names[0] if names else "qemu" if "QEMU_CPU" in os.environ else UNAVAILABLE


def bits() -> int:
    """Of this Python's pointers: a 64-bit kernel may run a 32-bit system."""
    return 64 if sys.maxsize > 2**32 else 32


def allowed_cores() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def fastest_cores() -> list[int]:
    """The allowed CPUs of the fastest kind: within 10 % of the best, by the kernel's measure or by highest clock.

    All of them where they are of one kind, or where nothing is known. 10 %, because single cores of one kind
    differ a little in their highest clock.
    """
    speeds = _core_speeds()
    return [cpu for cpu in speeds if speeds[cpu] >= 0.9 * max(speeds.values())]


def _core_speeds() -> dict[int, int]:
    """Relative speeds of the allowed CPUs; equal ones where they are of one kind, or where nothing is known."""
    cores = allowed_cores()
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        texts = {cpu: _read(f"/sys/devices/system/cpu/cpu{cpu}/{name}") or "" for cpu in cores}
        speeds = {cpu: int(text) for cpu, text in texts.items() if text.isdigit()}
        if len(speeds) == len(cores) and min(speeds.values()) < 0.9 * max(speeds.values()):
            return speeds
    return dict.fromkeys(cores, 1)


def conditions() -> dict[str, Any]:
    """What may change while measuring: clock, temperature, throttling, load."""
    governors = {_read(path) for path in _globbed("/sys/devices/system/cpu/cpufreq/policy*/scaling_governor")}
    return {
        "governor": ", ".join(sorted(name for name in governors if name)) or UNAVAILABLE,
        "min_mhz": _policy_mhz("cpuinfo_min_freq", min),
        "max_mhz": _policy_mhz("cpuinfo_max_freq", max),
        "current_mhz": _current_mhz(),
        "temperature_c": _temperature_c(),
        "throttle": _throttle(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else UNAVAILABLE,
    }


def throttled(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why to take the machine for throttled between two `conditions`; empty when nothing speaks for it."""
    first, last = before["throttle"], after["throttle"]
    if UNAVAILABLE in (first, last):
        return []
    reasons = [f"{flag} during the run" for flag in last["now"]]
    reasons += [
        f"{flag} during the run" for flag in last["since_boot"] if flag not in first["since_boot"] + last["now"]
    ]
    if last["count"] > first["count"]:
        reasons.append(f"the CPU counted {last['count'] - first['count']} throttle events")
    if last["cooling"] > 0:
        reasons.append("the kernel caps the CPU's frequency to cool it")
    return reasons


def cpu_flags() -> set[str]:
    """The CPU's feature flags as the kernel names them; empty where they cannot be read."""
    return {flag for key, value in _cpuinfo() if key in ("flags", "Features") for flag in value.split()}


def _board() -> str:
    for path in ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model"):
        if text := _read(path):
            return text
    dmi = [_read(f"/sys/devices/virtual/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(text for text in dmi if text) or UNAVAILABLE


def _cpu_name() -> str:
    """The marketing name, or the Arm cores by kind: `4 x Cortex-A76 + 4 x Cortex-A55`."""
    info = _cpuinfo()
    parts = [ARM_PARTS.get(value, f"Arm part {value}") for key, value in info if key == "CPU part"]
    if parts:
        return " + ".join(f"{parts.count(name)} x {name}" for name in sorted(set(parts), reverse=True))
    names = [value for key, value in info if key in ("model name", "Model")]
    return names[0] if names else platform.processor() or UNAVAILABLE


def _cpuinfo() -> list[tuple[str, str]]:
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return [(key.strip(), value.strip()) for key, value in pairs]


def _libc() -> str:
    """Wheels of the runtimes are built for glibc; musl cannot load them."""
    if _globbed("/lib/ld-musl-*"):
        return "musl"
    return " ".join(platform.libc_ver()).strip() or UNAVAILABLE


def _disk_free_mb(folder: Path) -> Any:
    try:
        return shutil.disk_usage(folder).free >> 20
    except OSError:
        return UNAVAILABLE


def _ram_gb() -> Any:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return round(int(found[1]) / 2**20, 2) if found else UNAVAILABLE


def _os_name() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read("/etc/os-release") or "", re.MULTILINE)
    return found[1] if found else platform.platform() or UNAVAILABLE


def _policy_mhz(name: str, choose: Callable[[list[int]], int]) -> Any:
    texts = [_read(path) for path in _globbed(f"/sys/devices/system/cpu/cpufreq/policy*/{name}")]
    kilohertz = [int(text) for text in texts if text and text.isdigit()]
    return choose(kilohertz) // 1000 if kilohertz else UNAVAILABLE


def _current_mhz() -> Any:
    """Of the fastest core."""
    now = _policy_mhz("scaling_cur_freq", max)
    if now != UNAVAILABLE:
        return now
    clocks = [value for key, value in _cpuinfo() if key == "cpu MHz"]
    return round(max(map(float, clocks))) if clocks else UNAVAILABLE


def _clock_mhz() -> Any:
    """Of the fastest of the CPUs that this process may use, as the kernel set it."""
    texts = [_read(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq") or "" for cpu in allowed_cores()]
    return max((int(text) // 1000 for text in texts if text.isdigit()), default=UNAVAILABLE)


def _temperature_c() -> Any:
    """Of the hottest zone that names the CPU or the chip, or of the hottest zone at all."""
    zones = {}
    for path in _globbed("/sys/class/thermal/thermal_zone*"):
        text = _read(path / "temp") or ""
        if text.lstrip("-").isdigit():
            zones[f"{path.name} {_read(path / 'type') or ''}"] = int(text) / 1000
    of_chip = [value for name, value in zones.items() if re.search("cpu|soc|x86_pkg|package", name, re.IGNORECASE)]
    return max(of_chip or zones.values(), default=UNAVAILABLE)


def _throttle() -> Any:
    """Flags of the Raspberry Pi's firmware, Intel's counter, the kernel's cooling state; or "unavailable"."""
    firmware = _firmware_bits()
    counters = [_read(path) for path in _globbed("/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")]
    devices = [
        path for path in _globbed("/sys/class/thermal/cooling_device*") if "cpufreq" in (_read(path / "type") or "")
    ]
    if firmware is None and not counters and not devices:
        return UNAVAILABLE
    states = [_read(path / "cur_state") or "0" for path in devices]
    return {
        "now": [name for bit, name in THROTTLE_BITS.items() if (firmware or 0) >> bit & 1],
        "since_boot": [name for bit, name in THROTTLE_BITS.items() if (firmware or 0) >> (bit + 16) & 1],
        "count": sum(int(text) for text in counters if text and text.isdigit()),
        "cooling": max((int(text) for text in states if text.isdigit()), default=0),
    }


def _firmware_bits() -> int | None:
    """Of `THROTTLE_BITS`: from the firmware's tool, or from the kernel where that is missing, as in a container."""
    try:
        done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5)
        texts = re.findall(r"throttled=(0x[0-9a-fA-F]+)", done.stdout)
    except (OSError, subprocess.SubprocessError):
        texts = []
    texts += [_read(path) or "" for path in _globbed("/sys/devices/platform/soc*/*firmware/get_throttled")]
    return next((int(text, 16) for text in texts if re.fullmatch(r"(0x)?[0-9a-fA-F]+", text)), None)


def _litert_version() -> str | None:
    if version := _version_of("ai_edge_litert"):
        return version
    old = _version_of("tflite_runtime")
    return f"{old} (tflite-runtime)" if old else None


def _version_of(module: str) -> str | None:
    """The installed version without importing the package; None when it is not installed."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):  # hidden on purpose, or half imported
        return None
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:  # onnxruntime has several distributions for one module
        try:
            return str(importlib.import_module(module).__version__)
        except Exception:  # it is there; what is wrong with it is said when a model is opened
            return "unknown"


def _read(path: str | Path) -> str | None:
    """The text of a file below ROOT, None where there is none."""
    try:
        return (ROOT / str(path).lstrip("/")).read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None


def _globbed(pattern: str) -> list[Path]:
    return sorted(Path("/") / path.relative_to(ROOT) for path in ROOT.glob(pattern.lstrip("/")))


# -------------------------------------------------------------------------------------------------- measuring


@dataclass
class Timing:
    """One fresh process's measurement of one file."""

    first_ms: float
    samples_ms: list[float] = field(default_factory=list)
    """Steady state, in the order taken."""
    cpu_s: float = 0.0
    """Of all threads while the samples were taken."""
    mhz: Any = UNAVAILABLE
    """The clock right after the last sample."""


SIGN_OF_LIFE_S, ALIVE = 60.0, "measuring:"
"""How often a long measurement says that it goes on, and how: who listens ends an agent that is silent for long."""


def measure(model: Model, arrays: Sequence[np.ndarray], *, runs: int, warmup_s: float, min_s: float) -> Timing:
    """The first inference and, after the warm-up, at least `runs` samples over at least `min_s` seconds.

    `arrays` are fed in turn. A sample goes from numpy array to numpy arrays: the copies are part of it.
    """

    timing = Timing(first_ms=_inference_ms(model, arrays[0]))
    end = time.perf_counter() + warmup_s
    while time.perf_counter() < end:
        _inference_ms(model, arrays[0])
    gc.collect()
    gc.disable()  # a collection in the middle of a sample is Python's time, not the network's
    try:
        begin_cpu_s, end = time.process_time(), time.perf_counter() + min_s
        tell = time.perf_counter() + SIGN_OF_LIFE_S
        while len(timing.samples_ms) < runs or time.perf_counter() < end:
            timing.samples_ms.append(_inference_ms(model, arrays[len(timing.samples_ms) % len(arrays)]))
            if time.perf_counter() > tell:
                tell += SIGN_OF_LIFE_S
                _say(f"{ALIVE} {len(timing.samples_ms)} samples")
        timing.mhz = _clock_mhz()
        timing.cpu_s = time.process_time() - begin_cpu_s
    finally:
        gc.enable()
    return timing


def _inference_ms(model: Model, array: np.ndarray) -> float:
    begin = time.perf_counter_ns()
    model.infer(array)
    return (time.perf_counter_ns() - begin) / 1e6


STRETCH, LEAST = 3, 12
"""Samples that a model takes before the next has its turn, and how many each takes at least."""


def in_turns(models: Sequence[Model], *, sample_s: float) -> list[list[float]]:
    """Microseconds of single inferences of each model, `sample_s` seconds of them for each on average.

    Samples are taken in turns, so that a slow moment falls on all models alike. With one thread it is processor time:
    where more runs than there are cores, the clock tells of the scheduler. With more it is the clock's.
    """
    arrays = [random_input(model.input) for model in models]
    alone = all(model.settings.get("threads") == 1 for model in models)
    now_ns = time.thread_time_ns if alone else time.perf_counter_ns
    samples_us: list[list[float]] = [[] for _ in models]
    turns = list(zip(models, arrays, samples_us))  # noqa: B905 (Python 3.9 has no `strict`)
    for model, array_, _ in turns:
        model.infer(array_)
        model.infer(array_)
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is Python's time, not the network's
    try:
        end = time.perf_counter() + sample_s * len(models)
        while time.perf_counter() < end or len(samples_us[0]) < LEAST:
            for model, array_, taken in turns:
                for _ in range(STRETCH):
                    began = now_ns()
                    model.infer(array_)
                    taken.append((now_ns() - began) / 1e3)
    finally:
        if collects:
            gc.enable()
    return samples_us


QUIET = 5
"""Percentile of the samples that is taken for a model's time: others disturb it upwards only. On two cores with two
other programs the times of ten repetitions spread by 0.1 % (LiteRT), with the lower quartile by 0.3 %."""
STEADY, ATTEMPTS = 1.03, 2
"""How much longer than at its best the first file may take beside the others before they are measured again, and how
often at most."""


def measure_layers(
    archive: Path,
    runtime: str,
    threads: int,
    *,
    sample_s: float,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Times of the files in a zip archive; `on_layer` hears each entry's as it is measured.

    `layers.json` in it is a list of lists of entries: `name`, and `files` in the archive. The files of a list are
    measured in turns. The very first file is measured beside every list: its times are `reference_us`, and tell whether
    the machine kept its pace.
    """
    reference_us: list[float] = []
    facts: dict[str, Any] = {}
    with zipfile.ZipFile(archive) as packed, tempfile.TemporaryDirectory(prefix="compress-") as folder:
        batches = json.loads(packed.read("layers.json"))

        def opened(name: str) -> Model:
            path = Path(packed.extract(name, folder))
            try:
                return open_model(path, runtime, threads)
            finally:
                path.unlink()

        reference = opened(batches[0][0]["files"][0])
        facts = {"runtime": runtime, "version": reference.version, "settings": reference.settings}
        for chosen in batches:
            models = [opened(name) for entry in chosen for name in entry["files"]]
            attempts: list[list[list[float]]] = []
            paces: list[float] = []
            while len(paces) < ATTEMPTS and not (paces and min(paces) <= STEADY * min(reference_us, default=1e300)):
                attempts.append(in_turns([reference, *models], sample_s=sample_s))
                paces.append(_quiet(attempts[-1][0]))
            samples_us = iter(attempts[paces.index(min(paces))][1:])
            reference_us.append(min(paces))
            for entry in chosen:
                taken = [next(samples_us) for _ in entry["files"]]
                line = {
                    "name": entry["name"],
                    "us": [_quiet(own) for own in taken],
                    "halves_us": [[_quiet(own[half::2]) for own in taken] for half in (0, 1)],
                    "samples": len(taken[0]),
                }
                if on_layer:
                    on_layer(line)
    return {**facts, "layers": sum(map(len, batches)), "reference_us": reference_us}


def _quiet(samples_us: Sequence[float]) -> float:
    return float(np.percentile(samples_us, QUIET))


def sustain(
    model: Model,
    array_: np.ndarray,
    *,
    seconds: float,
    every_s: float,
    tolerance: float = 0.1,
    on_point: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Times under load that lasts, in windows of `every_s`, and whether the machine slowed down.

    The first and the last minute are compared, or the halves of a run of less than two minutes. THROTTLED when
    the machine says so, or when the last minute's median is longer, or its clock lower, by more than `tolerance`.
    """
    _inference_ms(model, array_)
    begun, before = time.perf_counter(), conditions()
    windows: list[array[float]] = []
    points: list[dict[str, Any]] = []
    reasons: list[str] = []
    kept = max(1, round(min(60.0, seconds / 2) / every_s))  # windows of a minute
    while not points or time.perf_counter() < begun + seconds:
        window, end = array("d"), min(begun + every_s * (len(points) + 1), begun + max(seconds, every_s))
        while not window or time.perf_counter() < end:
            window.append(_inference_ms(model, array_))
        clock, now = _clock_mhz(), conditions()
        found = throttled(before, now)
        p50_ms, p90_ms = np.percentile(window, [50, 90])
        points.append(
            {
                "t_s": round(time.perf_counter() - begun, 3),
                "p50_ms": float(p50_ms),
                "p90_ms": float(p90_ms),
                "samples": len(window),
                "mhz": now["current_mhz"] if clock == UNAVAILABLE else clock,
                "temperature_c": now["temperature_c"],
                "throttle": now["throttle"],
                "throttled": found,
            }
        )
        reasons += found
        windows.append(window)
        if len(windows) > 2 * kept:  # a tiny network makes millions of samples
            del windows[kept]
        if on_point:
            on_point(points[-1])
    first_ms, last_ms = (float(np.median(np.concatenate(part))) for part in (windows[:kept], windows[-kept:]))
    slowdown = last_ms / first_ms
    reasons = _distinct(reasons)
    if slowdown > 1 + tolerance:
        reasons.append(f"the last minute took {slowdown:.2f} times as long as the first")
    clocks = [point["mhz"] for point in points]
    if UNAVAILABLE not in clocks:
        first_mhz, last_mhz = (float(np.median(part)) for part in (clocks[:kept], clocks[-kept:]))
        if last_mhz < first_mhz / (1 + tolerance):
            reasons.append(f"the clock went from {first_mhz:.0f} to {last_mhz:.0f} MHz")
    return {
        "series": points,
        "seconds": time.perf_counter() - begun,
        "first_minute_p50_ms": first_ms,
        "last_minute_p50_ms": last_ms,
        "slowdown": slowdown,
        "throttled": reasons,
        "verdict": "THROTTLED" if reasons else "OK",
        "before": before,
        "after": conditions(),
    }


def random_input(spec: TensorSpec, seed: int = 0) -> np.ndarray:
    """An array that fits the input: floats in [-1, 1), integers over the whole range of their type."""
    rng = np.random.default_rng(seed)
    if spec.dtype.kind == "f":
        return rng.uniform(-1, 1, spec.shape).astype(spec.dtype)
    limits = np.iinfo(spec.dtype)
    return rng.integers(limits.min, limits.max, spec.shape, dtype=spec.dtype, endpoint=True)


def memory_mb(*, peak: bool) -> Any:
    """This process's resident memory in MiB, now or at its highest.

    Not `ru_maxrss`: Linux carries that over `exec`, and the child of a large process reports its parent's.
    """
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", _read("/proc/self/status") or "")
    return round(int(found[1]) / 1024, 2) if found else UNAVAILABLE


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# -------------------------------------------------------------------------------------------------- comparing
#
# A ratio of two timings is worth something only where equal files take equal times. So the baseline is measured
# twice in every round, and the two series' ratio says how far the machine can be trusted.


@dataclass(frozen=True)
class Slot:
    """One process of a comparison."""

    round: int
    runtime: str
    index: int
    """Of the file, among those given."""
    control: bool = False
    """The baseline's second measurement of the round."""


def schedule(files: Sequence[str | Path], *, runtimes: Sequence[str] = RUNTIMES, rounds: int = 4) -> list[Slot]:
    """The processes in the order they run: A B C A' per runtime and round, A being the runtime's first file.

    A runtime with one file gets no control, one without files nothing.
    """
    slots = []
    for number in range(rounds):
        for runtime in dict.fromkeys(runtimes):
            own = [index for index, file in enumerate(files) if SUFFIXES.get(Path(file).suffix) == runtime]
            slots += [Slot(number, runtime, index) for index in own]
            slots += [Slot(number, runtime, own[0], control=True)] if len(own) > 1 else []
    return slots


def summary(processes: Sequence[dict[str, Any]], *, tolerance: float = 0.05, seed: int = 0) -> dict[str, Any]:
    """Rows (times of each file), pairs (each against its baseline) and notes of a whole comparison.

    `processes` are what `time` answered, each with its slot's fields. fps = 1000 / p50; memory in MiB.
    """
    rows, pairs = [], []
    for runtime in _distinct(process["runtime"] for process in processes):
        own = [process for process in processes if process["runtime"] == runtime]
        control = [process for process in own if process["control"]]
        series: dict[int, list[dict[str, Any]]] = {}
        for process in own:
            if not process["control"]:
                series.setdefault(process["index"], []).append(process)
        baseline = next(iter(series.values()))
        rows += [_row(processes) for processes in series.values()]
        reasons = _distinct(reason for process in own for reason in process["throttled"])
        pairs += [
            {
                "runtime": runtime,
                "baseline": baseline[0]["file"],
                "candidate": candidate[0]["file"],
                "baseline_index": baseline[0]["index"],
                "candidate_index": candidate[0]["index"],
                "threads": candidate[0]["threads"],
                **judge(
                    _samples(baseline),
                    _samples(candidate),
                    control=_samples(control),
                    reasons=reasons + _clock_changes([*baseline, *control]) + _clock_changes(candidate),
                    tolerance=tolerance,
                    seed=seed,
                ),
            }
            for candidate in series.values()
            if candidate is not baseline
        ]
    return {
        "rows": rows,
        "pairs": pairs,
        "notes": _distinct(note for process in processes for note in process["notes"]),
        "throttled": _distinct(reason for process in processes for reason in process["throttled"]),
    }


WIDEST = 2.0


def judge(
    baseline: Rounds,
    candidate: Rounds,
    *,
    control: Rounds,
    reasons: Sequence[str] = (),
    tolerance: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Speed-up of `candidate` over `baseline` with its interval, and whether to believe it.

    NOISY for each of `reasons`, when the baseline differs from its `control` by more than `tolerance`, and when the
    interval's ends are further apart than a factor of `WIDEST`.
    """
    aa_ratio = _median(baseline) / _median(control)
    low, high = ratio_interval(baseline, candidate, seed=seed)
    reasons = list(reasons)
    if high > WIDEST * low:
        reasons.append(f"the interval goes from {low:.2f} to {high:.2f}")
    if max(aa_ratio, 1 / aa_ratio) > 1 + tolerance:
        reasons.insert(0, f"the baseline against itself gave {aa_ratio:.3f}")
    return {
        "speedup": _median(baseline) / _median(candidate),
        "interval": [low, high],
        "aa_ratio": aa_ratio,
        "verdict": "NOISY" if reasons else "OK",
        "reasons": reasons,
    }


def ratio_interval(
    baseline: Rounds, candidate: Rounds, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of median(baseline) / median(candidate).

    Samples of one process are not independent. So rounds are drawn first, the same for both files because
    they ran side by side, then samples within each (Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).
    """
    rng = np.random.default_rng(seed)
    series = [[np.asarray(samples) for samples in rounds] for rounds in (baseline, candidate)]
    ratios = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(baseline), size=len(baseline))
        base, cand = (
            np.median(np.concatenate([rng.choice(rounds[r], size=rounds[r].size) for r in drawn])) for rounds in series
        )
        ratios[i] = base / cand
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _row(processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = processes[0]
    samples_ms = np.concatenate(_samples(processes))
    p50_ms, p90_ms, p99_ms = (float(value) for value in np.percentile(samples_ms, [50, 90, 99]))
    return {
        "index": first["index"],
        "file": first["file"],
        "kind": Path(first["file"]).stem,
        "runtime": first["runtime"],
        "threads": first["threads"],
        "cores": first["cores"],
        "p50_ms": p50_ms,
        "p90_ms": p90_ms,
        "p99_ms": p99_ms,
        "min_ms": float(samples_ms.min()),
        "max_ms": float(samples_ms.max()),
        "spread": (p90_ms - p50_ms) / p50_ms,
        "rounds_p50_ms": [float(np.median(round_ms)) for round_ms in _samples(processes)],
        "fps": 1000 / p50_ms,
        "startup_ms": float(np.median([process["startup_ms"] for process in processes])),
        "first_ms": float(np.median([process["first_ms"] for process in processes])),
        "peak_rss_mb": _highest(process["peak_rss_mb"] for process in processes),
        "idle_rss_mb": _highest(process["idle_rss_mb"] for process in processes),
        "samples": len(samples_ms),
        "size_bytes": first["size_bytes"],
        "sha256": first["sha256"],
        "notes": first["notes"],
    }


def _clock_changes(processes: Sequence[dict[str, Any]]) -> list[str]:
    """One file's processes must run at one clock; another file's need not (AVX-512 lowers a CPU's)."""
    clocks = [process["mhz"] for process in processes if process["mhz"] != UNAVAILABLE]
    if clocks and min(clocks) < 0.9 * max(clocks):
        return [f"{processes[0]['file']} ran at {min(clocks)} to {max(clocks)} MHz"]
    return []


def _samples(processes: Sequence[dict[str, Any]]) -> Rounds:
    return [process["samples_ms"] for process in processes]


def _median(rounds: Rounds) -> float:
    return float(np.median(np.concatenate(rounds)))


def _highest(values: Iterable[Any]) -> float | None:
    return max((value for value in values if value != UNAVAILABLE), default=None)


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


# --------------------------------------------------------------------------------------------------- commands

TIMING = ("threads", "cores", "runs", "warmup_s", "min_s")
"""What a process of a comparison is asked for; equal for processes that may be compared."""


def _probe(arguments: argparse.Namespace) -> dict[str, Any]:
    return probe()


def _time(arguments: argparse.Namespace) -> dict[str, Any]:
    before, idle_mb = conditions(), memory_mb(peak=False)
    model, placed = _opened(arguments)
    timing = measure(
        model, _arrays(model, arguments.inputs), runs=arguments.runs, warmup_s=arguments.warmup_s, min_s=arguments.min_s
    )
    peak_mb, after = memory_mb(peak=True), conditions()
    return {
        **_described(model),
        **placed,
        "batch": 1,
        "import_ms": model.import_ms,
        "load_ms": model.load_ms,
        "startup_ms": model.import_ms + model.load_ms,
        "first_ms": timing.first_ms,
        "samples_ms": timing.samples_ms,
        "cpu_s": timing.cpu_s,
        "mhz": timing.mhz,
        "warmup_s": arguments.warmup_s,
        "idle_rss_mb": idle_mb,
        "peak_rss_mb": peak_mb,
        "before": before,
        "after": after,
        "throttled": throttled(before, after),
    }


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    runtimes = arguments.runtime or RUNTIMES
    slots = schedule(arguments.files, runtimes=runtimes, rounds=arguments.rounds)
    if not slots:
        raise AgentError(f"no file for {', '.join(runtimes)}; export the network first")
    for runtime in _distinct(slot.runtime for slot in slots):
        _installed(runtime)  # before minutes are spent on another
    hashes = [sha256(Path(file)) for file in arguments.files]
    asked = {name: getattr(arguments, name) for name in TIMING}
    machine = probe()
    kept = _kept(arguments.done, asked, hashes, machine["runtimes"]) if arguments.done else {}
    processes = []
    for number, slot in enumerate(slots, start=1):
        if slot not in kept:
            file = Path(arguments.files[slot.index])
            _say(f"process {number} of {len(slots)}: {file.name} on {slot.runtime}")
            answer = _fresh_time(file, slot.runtime, asked, arguments.launcher)
            processes.append({**answer, **vars(slot), "asked": asked})
            _print({"process": processes[-1]})
        else:
            processes.append(kept[slot])
    found = summary(processes, tolerance=arguments.tolerance, seed=arguments.seed)
    notes, stopped = found.pop("notes"), found.pop("throttled")
    reused = [vars(slot) for slot in slots if slot in kept]
    if reused:
        notes.append(f"{len(reused)} of {len(slots)} processes were measured in an earlier attempt")
    settings = {
        process["runtime"]: ", ".join(f"{key}={value}" for key, value in process["settings"].items())
        for process in processes
    }
    board, cpu = machine["board"], machine["cpu"]
    return {
        "conditions": {
            **machine,
            "machine": cpu if board == UNAVAILABLE else f"{board}, {cpu}",
            "temperature_after_c": processes[-1]["after"]["temperature_c"],
            "settings": "; ".join(f"{runtime}: {text}" for runtime, text in settings.items()),
            "notes": notes,
            "throttled": stopped,
            **{name: value for name, value in asked.items() if name != "cores"},
            "threads": processes[-1]["threads"],
            "cores_used": processes[-1]["cores"],
            "rounds": arguments.rounds,
            "batch": 1,
            "tolerance": arguments.tolerance,
        },
        **found,
        "reused": reused,
    }


def _kept(path: str, asked: dict[str, Any], hashes: Sequence[str], versions: dict[str, str]) -> dict[Slot, Any]:
    """The processes of an earlier attempt that answer the same question: same files, runtimes and settings.

    Lines that are something else are passed over, such as the last one of a connection that was cut.
    """
    found: dict[Slot, Any] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            process = json.loads(line)["process"]
            slot = Slot(process["round"], process["runtime"], process["index"], process["control"])
            same = process["sha256"] == hashes[slot.index] and process["version"] == versions[slot.runtime]
            if same and process["asked"] == asked:
                found.setdefault(slot, process)
        except (ValueError, KeyError, IndexError, TypeError):
            continue
    return found


def _fresh_time(file: Path, runtime: str, asked: dict[str, Any], launcher: list[str]) -> dict[str, Any]:
    """What `time` answers in a process of its own; it ends when this process does (see `_end_with_reader`)."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    command = [*launcher, os.path.abspath(__file__), "time", str(file), f"--runtime={runtime}", *words]
    place = f"{file.name} on {runtime}"
    pipe = subprocess.PIPE
    lines: list[str] = []
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
    except OSError as error:
        raise AgentError(f"{place}: cannot start {launcher[0]}: {error.strerror}; say how with --launcher") from error

    def listen(stream: Iterable[str]) -> None:
        for line in stream:
            lines.append(line.rstrip())
            if line.startswith(f"agent: {ALIVE}"):
                _say(f"{place}: {line.strip()}")

    listener = threading.Thread(target=listen, args=(child.stderr,), daemon=True)
    listener.start()
    with child:
        assert child.stdout is not None
        answer = child.stdout.read()
        returncode = child.wait()
        listener.join()
    said = [line for line in lines if line.strip()] or ["nothing"]
    number = -returncode if returncode < 0 else returncode - 128  # a launcher's shell adds 128
    if number in set(signal.Signals):
        hint = "; too little memory?" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        raise AgentError(f"{place}: its process was ended by {name}{hint}; it last said: {said[-1]}")
    if returncode and said[-1].startswith("agent: error: "):
        told = said[-1].removeprefix("agent: error: ")
        raise AgentError(told.replace(str(file), file.name) if told.startswith(str(file)) else f"{place}: {told}")
    try:
        if not returncode:
            return json.loads(answer.splitlines()[-1])
    except (IndexError, ValueError):
        pass
    raise AgentError(f"{place}: its process ended with status {returncode}, no result; it last said: {said[-1]}")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    images = _load_images(arguments.inputs)
    labels = _load_labels(arguments.labels, len(images)) if arguments.labels else None
    model, placed = _opened(arguments)
    done = 0

    def on_image() -> None:
        nonlocal done
        done += 1
        if done % max(1, len(images) // 20) == 0:
            _say(f"{model.path.name}: image {done} of {len(images)}")

    begin = time.perf_counter()
    outputs = model.answers(images, on_image=on_image)
    seconds = time.perf_counter() - begin
    _save(Path(arguments.outputs), outputs)
    answer = {
        **_described(model),
        **placed,
        "images": len(images),
        "seconds": seconds,
        "outputs_sha256": hashlib.sha256(outputs.tobytes()).hexdigest(),
    }
    if labels is not None:
        answer["correct"] = correct(outputs, labels, place=str(model.path))
    return answer


def correct(outputs: np.ndarray, labels: np.ndarray, *, place: str = "outputs") -> int:
    """How many images' largest output is their label's; of equal outputs the lowest index counts."""
    chosen = outputs.argmax(-1)
    if outputs.ndim < 2 or chosen.size != len(labels):
        raise AgentError(f"{place}: gives {outputs.shape[1:]} per image, not one number per class")
    return int((chosen.reshape(-1) == labels).sum())


def _sustain(arguments: argparse.Namespace) -> dict[str, Any]:
    model, placed = _opened(arguments)
    (array_,) = _arrays(model, None)
    found = sustain(
        model,
        array_,
        seconds=60 * arguments.minutes,
        every_s=arguments.every_s,
        tolerance=arguments.tolerance,
        on_point=lambda point: _print({"point": point}),
    )
    return {**_described(model), **placed, "minutes": arguments.minutes, "every_s": arguments.every_s, **found}


def _layers(arguments: argparse.Namespace) -> dict[str, Any]:
    before, placed = conditions(), place_process(arguments.threads, arguments.cores)
    try:
        found = measure_layers(
            Path(arguments.archive),
            arguments.runtime,
            placed["threads"],
            sample_s=arguments.sample_s,
            on_layer=lambda line: _print({"layer": line}),
        )
    except (zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError) as error:
        raise AgentError(f"{arguments.archive}: is no archive of layers: {_first_line(error)}") from error
    after = conditions()
    return {**found, **placed, "before": before, "after": after, "throttled": throttled(before, after)}


def _opened(arguments: argparse.Namespace) -> tuple[Model, dict[str, Any]]:
    """The model, and the threads and CPUs it runs on; this process is pinned to them."""
    placed = place_process(arguments.threads, arguments.cores)  # before the runtime starts its threads
    model = open_model(arguments.model, arguments.runtime, placed["threads"])
    _say(f"{model.path.name}: {model.runtime} {model.version}, {placed['threads']} thread(s)")
    return model, placed


def place_process(threads: Any, cores: str) -> dict[str, Any]:
    """The number of threads, and the CPUs that this process and its threads run on from now on.

    `threads` auto is one for each of the fastest CPUs. `cores` auto takes the fastest ones where CPUs differ, more of
    them for more threads, and all that are allowed where they are alike; any takes these; else numbers: 0,1.
    """
    pins = hasattr(os, "sched_setaffinity")
    if cores not in ("auto", "any"):
        if not pins:
            raise AgentError(f"cores {cores}: {platform.system()} cannot pin a process; leave it away")
        wanted = {int(word) for word in cores.split(",")}
        if wanted - set(allowed_cores()):
            raise AgentError(f"cores {cores}: allowed are {','.join(map(str, allowed_cores()))}")
        os.sched_setaffinity(0, wanted)
    speeds, fastest = _core_speeds(), fastest_cores()
    if threads == "auto":
        threads = len(fastest)
    if cores == "auto" and pins and len(fastest) < len(speeds):
        by_speed = sorted(speeds, key=lambda cpu: -speeds[cpu])
        os.sched_setaffinity(0, by_speed[: max(threads, len(fastest))])
    return {"threads": threads, "cores": allowed_cores() if pins else UNAVAILABLE}


def _arrays(model: Model, inputs: str | None) -> list[np.ndarray]:
    return [model.feed(image) for image in _load_images(inputs)] if inputs else [random_input(model.input)]


def _described(model: Model) -> dict[str, Any]:
    def spec(tensor: TensorSpec) -> dict[str, Any]:
        return {
            "name": tensor.name,
            "shape": tensor.shape,
            "dtype": str(tensor.dtype),
            "scale": tensor.scale,
            "zero_point": tensor.zero_point,
        }

    return {
        "file": model.path.name,
        "sha256": sha256(model.path),
        "size_bytes": model.path.stat().st_size,
        "runtime": model.runtime,
        "version": model.version,
        "settings": model.settings,
        "notes": model.notes,
        "input": spec(model.input),
        "outputs": [spec(tensor) for tensor in model.outputs],
    }


def _load_images(path: str) -> np.ndarray:
    images = _load(path, "images")
    if images.ndim < 2 or not len(images):
        raise AgentError(f"{path}: wants an array of shape (images, ...)")
    return images


def _load_labels(path: str, images: int) -> np.ndarray:
    labels = _load(path, "labels")
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise AgentError(f"{path}: wants one integer per image, {images} in all")
    return labels


def _load(path: str, what: str) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AgentError(f"{path}: not a .npy file of {what}: {_first_line(error)}") from error
    if not isinstance(found, np.ndarray):
        raise AgentError(f"{path}: not a .npy file of {what} but an archive")
    return found


def _save(path: Path, array: np.ndarray) -> None:
    """Writes all of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise AgentError(f"{path}: is no file that could be replaced")
    try:
        with open(part, "wb") as file:
            # Not the file itself: numpy would write past Python, and a full disk would be an error without a name.
            np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AgentError(f"{path}: cannot be written: {error.strerror}") from error


def _print(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _say(text: str) -> None:
    print(f"agent: {text}", file=sys.stderr, flush=True)


def _end_with_reader() -> None:
    """Ends this process as soon as nobody can read its answers: a dropped connection, a killed parent.

    A board keeps no processes behind then. Nothing else is sure to end them: sshd sends no signal to a process
    without a terminal, and one that is measuring writes nothing for minutes. Waiting costs no CPU time.
    """

    def watch() -> None:
        poller = select.poll()
        poller.register(1, 0)  # errors and hang-ups are reported unasked
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll()):
            os._exit(1)

    if hasattr(select, "poll"):
        threading.Thread(target=watch, daemon=True).start()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AgentError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="agent.py", description="Measures exported networks on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe", help="print the machine as JSON").set_defaults(do=_probe)
    timer = commands.add_parser("time", help="print start-up, first inference and steady-state times in ms as JSON")
    timer.set_defaults(do=_time)
    comparer = commands.add_parser("compare", help="time files in turns, each time in a fresh process")
    comparer.set_defaults(do=_compare)
    runner = commands.add_parser("run", help="run images through the model and write its first output")
    runner.set_defaults(do=_run)
    sustainer = commands.add_parser("sustain", help="time under load that lasts")
    sustainer.set_defaults(do=_sustain)

    layerer = commands.add_parser("layers", help="time many small files in turns")
    layerer.set_defaults(do=_layers)

    for command in (timer, runner, sustainer):
        command.add_argument("model")
        command.add_argument("--runtime", default="auto", choices=("auto", *RUNTIMES))
    for command in (timer, runner, sustainer, comparer, layerer):
        command.add_argument("--threads", type=_threads, default=1, help="a number, or auto: one per fastest core")
        command.add_argument("--cores", type=_cores, default="auto", help="auto, any, or CPU numbers: 0,1")
    for command in (timer, comparer):
        command.add_argument("--runs", type=_count, default=50, help="least number of samples")
        command.add_argument("--warmup-s", type=_seconds, default=0.2, help="seconds before the first sample")
        command.add_argument("--min-s", type=_seconds, default=0.0, help="least seconds of sampling")
    for command, tolerance in ((comparer, 0.05), (sustainer, 0.1)):
        command.add_argument("--tolerance", type=_seconds, default=tolerance, help="how far equal things may differ")
    images = "images, .npy: floats are real values, the input's own integer type stored ones"
    timer.add_argument("--inputs", help=images)

    comparer.add_argument("files", nargs="+", metavar="FILE", help="the first of each runtime is the baseline")
    comparer.add_argument("--runtime", action="append", choices=RUNTIMES, help="may be given again; default all")
    comparer.add_argument("--rounds", type=_count, default=4, help="fresh processes per file")
    comparer.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    comparer.add_argument("--done", help="lines that an earlier attempt printed; not measured again")
    comparer.add_argument("--launcher", type=_launcher, default=_own_launcher(), help="JSON list: how to start Python")

    runner.add_argument("--inputs", required=True, help=images)
    runner.add_argument("--outputs", required=True, help="the first output as stored, .npy")
    runner.add_argument("--labels", help="class numbers, .npy; counts the images that are right")

    layerer.add_argument("archive", metavar="ARCHIVE", help="files, and layers.json that names them")
    layerer.add_argument("--runtime", required=True, choices=RUNTIMES)
    layerer.add_argument("--sample-s", type=_some_seconds, default=0.02, help="seconds of sampling of a file")

    sustainer.add_argument("--minutes", type=_seconds, default=5.0)
    sustainer.add_argument("--every-s", type=_some_seconds, default=5.0, help="seconds of each point")
    return parser


def _threads(text: str) -> Any:
    return text if text == "auto" else _count(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+\.?\d*(e-?\d+)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return float(text)


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError("must be more than 0")
    return seconds


def _cores(text: str) -> str:
    if not re.fullmatch(r"auto|any|\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text} is not auto, any or numbers like 0,1")
    return text


def _launcher(text: str) -> list[str]:
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON list of words like ["python3"]')
    return words


def _own_launcher() -> Any:
    """How this Python was started, with the options that decide what it can import."""
    options = {"isolated": "-I", "safe_path": "-P", "no_user_site": "-s", "ignore_environment": "-E", "no_site": "-S"}
    given = [option for name, option in options.items() if getattr(sys.flags, name, False)]
    return os.environ.get("COMPRESS_AGENT_PYTHON") or [sys.executable, *given]


def _check_python() -> None:
    if bits() < 64:
        raise AgentError("this Python is 32-bit, and the runtimes need a 64-bit OS; install the board's 64-bit image")
    if np is None:
        raise AgentError("numpy is not installed or cannot be imported; python -m pip install numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    place = "agent"
    try:
        chosen = _parser().parse_args(arguments)
        place = chosen.command
        if chosen.do is not _probe:
            _check_python()
        _print(chosen.do(chosen))
    except BrokenPipeError:  # nobody listens any more; Python would complain again when it flushes
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 1
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        _say(f"error: {place}: not enough memory")
        return 1
    except AgentError as error:
        _say(f"error: {_first_line(error)}")
        return 1
    except OSError as error:
        _say(f"error: {error.filename or place}: {error.strerror or _first_line(error)}")
        return 1
    except Exception as error:
        traceback.print_exc()
        _say(f"error: {place}: {type(error).__name__}: {_first_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    _end_with_reader()
    sys.exit(main())
