"""Measures and runs exported networks on the machine it lies on: one file, to be copied to a board.

    python agent.py probe
    python agent.py time MODEL [--runtime auto] [--threads 1] [--runs 50] [--warmup-s 0.2] [--min-s 0]
                               [--inputs X.npy]
    python agent.py run MODEL --inputs X.npy --outputs Y.npy [--runtime auto] [--threads 1]

Each command prints one JSON object as the last line of its standard output; progress and errors go to
standard error, the error last. It needs Python 3.9, numpy, and onnxruntime or ai-edge-litert (or
tflite-runtime); nothing of `compress`.

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
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

UNAVAILABLE = "unavailable"

ROOT = Path("/")
"""Where proc, sys and etc lie; tests put a board's files elsewhere."""

SUFFIXES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".tflite": "litert"}
"""Which runtime reads which file."""

PACKAGES = {"onnxruntime": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}
"""What provides a runtime, best first."""

INSTALL = {
    "onnxruntime": "python -m pip install onnxruntime",
    "litert": "python -m pip install ai-edge-litert",
}


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
        """Real values in the tensor's own type; halves round to even, as in ONNX."""
        if self.scale is None:
            if self.dtype.kind != "f" and real.dtype != self.dtype:
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
    """onnxruntime or litert."""
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
        """One real-valued image, CHW or HWC, as the file's input stores it, with a batch axis."""
        wanted = self.input.shape[1:]
        layouts = [image]
        if image.ndim == 3:
            layouts += [image.transpose(2, 0, 1), image.transpose(1, 2, 0)]  # HWC to CHW, CHW to HWC
        for layout in layouts:
            if layout.shape == wanted:
                return np.ascontiguousarray(self.input.store(layout)[None])
        raise AgentError(f"{self.path}: wants images of shape {wanted}, given {image.shape}")

    def predict(self, images: np.ndarray, *, on_image: Callable[[], None] | None = None) -> np.ndarray:
        """Real values (N, ...) of the first output for real-valued NCHW or NHWC images, one by one."""
        if not len(images):
            raise AgentError(f"{self.path}: no images given")
        rows = []
        for image in images:
            rows.append(self.infer(self.feed(image))[0][0])
            if on_image:
                on_image()
        return self.outputs[0].real(np.stack(rows))


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
        raise AgentError(f"no runtime {runtime!r}; known are {', '.join(INSTALL)}")
    if not path.is_file():
        raise AgentError(f"{path}: no such file")
    if threads < 1:
        raise AgentError(f"threads: {threads} is less than 1")
    model = (_open_onnxruntime if runtime == "onnxruntime" else _open_litert)(path, threads)
    if -1 in model.input.shape:
        raise AgentError(f"{path}: its input has an open size {model.input.shape}; export it with a fixed one")
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
    options.log_severity_level = 3  # errors only: warnings would drown the agent's own lines
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
        return session.run(None, {source.name: array})

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
        interpreter.set_tensor(source["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(sink["index"]) for sink in sinks]

    notes = []
    if package == "tflite_runtime":
        notes.append("tflite-runtime is frozen; ai-edge-litert is its successor, and the two are not bit-equal")
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
        "is_arm": platform.machine().lower().startswith(("aarch64", "arm")),
        "features": [name for name in FEATURES if name in flags] or UNAVAILABLE,
        "cores": os.cpu_count() or UNAVAILABLE,
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else UNAVAILABLE,
        "ram_gb": _ram_gb(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}".strip() or UNAVAILABLE,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "runtimes": {
            "onnxruntime": _version_of("onnxruntime") or UNAVAILABLE,
            "litert": _litert_version() or UNAVAILABLE,
        },
        **conditions(),
    }


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
    bits = _firmware_bits()
    counters = [_read(path) for path in _globbed("/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")]
    devices = [
        path for path in _globbed("/sys/class/thermal/cooling_device*") if "cpufreq" in (_read(path / "type") or "")
    ]
    if bits is None and not counters and not devices:
        return UNAVAILABLE
    states = [_read(path / "cur_state") or "0" for path in devices]
    return {
        "now": [name for bit, name in THROTTLE_BITS.items() if (bits or 0) >> bit & 1],
        "since_boot": [name for bit, name in THROTTLE_BITS.items() if (bits or 0) >> (bit + 16) & 1],
        "count": sum(int(text) for text in counters if text and text.isdigit()),
        "cooling": max((int(text) for text in states if text.isdigit()), default=0),
    }


def _firmware_bits() -> int | None:
    try:
        done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", done.stdout)
    return int(found[1], 16) if found else None


def _litert_version() -> str | None:
    if version := _version_of("ai_edge_litert"):
        return version
    old = _version_of("tflite_runtime")
    return f"{old} (tflite-runtime)" if old else None


def _version_of(module: str) -> str | None:
    """The installed version without importing the package; None when it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:  # onnxruntime has several distributions for one module
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))


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


def measure(model: Model, arrays: Sequence[np.ndarray], *, runs: int, warmup_s: float, min_s: float) -> Timing:
    """The first inference and, after the warm-up, at least `runs` samples over at least `min_s` seconds.

    `arrays` are fed in turn. A sample goes from numpy array to numpy arrays: the copies are part of it.
    """

    def inference(array: np.ndarray) -> float:
        begin = time.perf_counter_ns()
        model.infer(array)
        return (time.perf_counter_ns() - begin) / 1e6

    timing = Timing(first_ms=inference(arrays[0]))
    end = time.perf_counter() + warmup_s
    while time.perf_counter() < end:
        inference(arrays[0])
    gc.collect()
    gc.disable()  # a collection in the middle of a sample is Python's time, not the network's
    try:
        end = time.perf_counter() + min_s
        while len(timing.samples_ms) < runs or time.perf_counter() < end:
            timing.samples_ms.append(inference(arrays[len(timing.samples_ms) % len(arrays)]))
    finally:
        gc.enable()
    return timing


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
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------- commands


def _time(arguments: argparse.Namespace) -> dict[str, Any]:
    before, idle_mb = conditions(), memory_mb(peak=False)
    model = open_model(arguments.model, arguments.runtime, arguments.threads)
    if arguments.inputs:
        arrays = [model.feed(image) for image in _load_images(arguments.inputs)]
    else:
        arrays = [random_input(model.input)]
    _say(f"{model.path.name}: {model.runtime} {model.version}, {arguments.threads} thread(s)")
    timing = measure(model, arrays, runs=arguments.runs, warmup_s=arguments.warmup_s, min_s=arguments.min_s)
    peak_mb, after = memory_mb(peak=True), conditions()
    return {
        **_described(model),
        "batch": 1,
        "import_ms": model.import_ms,
        "load_ms": model.load_ms,
        "startup_ms": model.import_ms + model.load_ms,
        "first_ms": timing.first_ms,
        "samples_ms": timing.samples_ms,
        "warmup_s": arguments.warmup_s,
        "idle_rss_mb": idle_mb,
        "peak_rss_mb": peak_mb,
        "before": before,
        "after": after,
        "throttled": throttled(before, after),
    }


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    model = open_model(arguments.model, arguments.runtime, arguments.threads)
    images = _load_images(arguments.inputs)
    done = 0

    def on_image() -> None:
        nonlocal done
        done += 1
        if done % max(1, len(images) // 20) == 0:
            _say(f"{model.path.name}: image {done} of {len(images)}")

    begin = time.perf_counter()
    outputs = model.predict(images, on_image=on_image)
    with open(arguments.outputs, "wb") as file:
        np.save(file, outputs)
    return {**_described(model), "images": len(images), "seconds": time.perf_counter() - begin}


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
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise AgentError(f"{path}: not a .npy file of images: {_first_line(error)}") from error
    if not isinstance(images, np.ndarray) or images.ndim < 2 or not len(images):
        raise AgentError(f"{path}: wants an array of shape (images, ...)")
    return images


def _say(text: str) -> None:
    print(f"agent: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.py", description="Measures exported networks on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe", help="print the machine as JSON")
    timer = commands.add_parser("time", help="print start-up, first inference and steady-state times in ms as JSON")
    runner = commands.add_parser("run", help="run images through the model and write its first output")
    for command in (timer, runner):
        command.add_argument("model")
        command.add_argument("--runtime", default="auto", choices=("auto", *INSTALL))
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--inputs", required=command is runner, help="real-valued images, .npy")
    runner.add_argument("--outputs", required=True, help="the first output's real values, .npy")
    timer.add_argument("--runs", type=int, default=50, help="least number of samples")
    timer.add_argument("--warmup-s", type=float, default=0.2, help="seconds before the first sample")
    timer.add_argument("--min-s", type=float, default=0.0, help="least seconds of sampling")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        answer = probe() if chosen.command == "probe" else (_time if chosen.command == "time" else _run)(chosen)
    except (AgentError, OSError) as error:
        _say(f"error: {_first_line(error)}")
        return 1
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
