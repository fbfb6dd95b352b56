"""What it takes to turn a trained network into verified int8 files: calibration, both formats, comparison. Warm.

    python benchmarks/export_chain.py               # MobileNetV2 at 96 px, 32 images to calibrate, 16 to compare
    python benchmarks/export_chain.py --profile 25  # the functions in which the export's time goes
    python benchmarks/export_chain.py --verify      # `compress verify` in full as well, on the same 16 images

The first of the runs loads libraries and is thrown away. Times are medians of the process's CPU time and of wall time.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits in a loop would count as CPU time

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.models.mobilenet_v2 import MobileNetV2
from compress.product import Batch, Preprocess
from compress.progress import Silent
from compress.quantization import Quantization, calibrate, freeze, prepare, run_integers
from compress.targets import open_model
from compress.verification import Inputs, verify_product

Times = dict[str, tuple[float, float]]
"""(CPU seconds, wall seconds) by step, in order."""


@contextlib.contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    times[name] = (time.process_time() - cpu, time.perf_counter() - wall)


def chain(module: torch.nn.Module, size: int, images_NCHW: torch.Tensor, folder: Path, threads: int) -> Times:
    """Every step from the float network to files whose logits are those of the integers."""
    times: Times = {}
    preprocess = Preprocess(size=size)
    with timed(times, "prepare"):
        prepared = prepare(module, Quantization(), preprocess)
    with timed(times, "calibrate, 32 images"):
        calibrate(prepared, [Batch(images_NCHW, torch.zeros(len(images_NCHW)))], torch.device("cpu"))
    with timed(times, "freeze"):
        frozen = freeze(prepared.eval())
    with timed(times, "to ONNX"):
        model = int8_onnx(frozen, size, {})
    with timed(times, "to TFLite"):
        lite = to_tflite(model, {})
    with timed(times, "write and open both"):
        files = {"onnx": model.SerializeToString(), "tflite": lite}
        opened = []
        for suffix, content in files.items():
            path = folder / f"int8.{suffix}"
            path.write_bytes(content)
            opened.append(open_model(path, threads=threads))
    few_NCHW = images_NCHW[:16].contiguous()
    with timed(times, "compare, 16 images"):
        in_torch = frozen.steps(run_integers(frozen, few_NCHW).logits_NK).numpy()
        logits = [open_.predict(few_NCHW.numpy()) for open_ in opened]
        scale = frozen.output.scale if frozen.output is not None else 1.0
        off = [int(np.abs(np.rint(values / scale) - in_torch).max()) for values in logits]
    if max(off) > 1:
        raise SystemExit(f"the files are {off} LSB from the integers")
    return times


def full_verification(module: torch.nn.Module, size: int, images_NCHW: torch.Tensor, folder: Path) -> Times:
    """`verify` as the pipeline runs it, on the files that `chain` left in `folder`."""
    times: Times = {}
    prepared = prepare(module, Quantization(), Preprocess(size=size))
    calibrate(prepared, [Batch(images_NCHW, torch.zeros(len(images_NCHW)))], torch.device("cpu"))
    few = images_NCHW[:16].contiguous().numpy()
    inputs = Inputs("16 random images", len(few), lambda: [(few, None)])
    files = {path.name: path for path in sorted(folder.iterdir())}
    with timed(times, "verify in full, 16 images"):
        verify_product(files, {"int8": prepared.eval()}, inputs, progress=Silent())
    return times


def medians(runs: list[Times]) -> list[dict[str, Any]]:
    """Medians over the runs by step, in ms, and of their sum."""
    rows = []
    for name in runs[0]:
        cpu, wall = (1000 * statistics.median(run[name][k] for run in runs) for k in (0, 1))
        rows.append({"step": name, "cpu_ms": cpu, "wall_ms": wall})
    sums = [1000 * statistics.median(sum(spent[k] for spent in run.values()) for run in runs) for k in (0, 1)]
    return [*rows, {"step": "in all", "cpu_ms": sums[0], "wall_ms": sums[1]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verify", action="store_true", help="time the whole of `verify` too")
    parser.add_argument("--profile", type=int, metavar="N", help="the N functions with the most time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module = MobileNetV2(10).eval()
    images_NCHW = torch.randn(32, 3, options.size, options.size).to(memory_format=torch.channels_last)
    arguments = (module, options.size, images_NCHW)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chain(*arguments, folder, options.threads)
        if options.profile:
            with cProfile.Profile() as profiled:
                chain(*arguments, folder, options.threads)
            pstats.Stats(profiled).sort_stats("cumulative").print_stats(options.profile)
            return
        runs = [chain(*arguments, folder, options.threads) for _ in range(options.runs)]
        rows = medians(runs)
        if options.verify:
            full_verification(*arguments, folder)
            rows += medians([full_verification(*arguments, folder) for _ in range(options.runs)])[:1]
    print("| step | CPU ms | wall ms |\n|---|---|---|")
    for row in rows:
        print(f"| {row['step']} | {row['cpu_ms']:.0f} | {row['wall_ms']:.0f} |")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "threads": options.threads, "size": options.size}, indent=1))


if __name__ == "__main__":
    main()
