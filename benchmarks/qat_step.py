"""What a training step costs: float, QAT, each with a teacher, and torch's own FX QAT, interleaved round by round.

    python benchmarks/qat_step.py                              # 96 px, batch 64, two threads: minutes
    python benchmarks/qat_step.py --size 64 --batch 32 --rounds 8
    python benchmarks/qat_step.py --profile qat+kd-remembered  # what that step consists of

A step is what `compress.training.fit` does: loss, backward, clipped gradients, AdamW. Process CPU time counts all
threads. `x float` is the median, over rounds, of the CPU time divided by that of the float step of the same round.
Run it on a quiet machine: with other work on its cores, caches and clocks are shared, and CPU time grows too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits in a loop would count as CPU time

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from compress.models.mobilenet_v2 import MobileNetV2
from compress.product import Batch, Network, Preprocess, Product, Run, Structure
from compress.progress import Silent
from compress.quantization import Quantization, calibrate, prepare
from compress.quantization.fake_quant import hold_grids
from compress.teaching import Distillation, objective
from compress.training import Fit, Loss, labels_loss, memory_kept, optimizer_of

CPU = torch.device("cpu")
CLASSES = 10

Step = Callable[[], None]


class Synthetic:
    """One batch, again and again: the time of a step does not depend on what the images show."""

    labels = tuple(str(k) for k in range(CLASSES))
    fingerprint = "synthetic"
    channels_last = True

    def __init__(self, size: int, batch: int) -> None:
        self.preprocess = Preprocess(size=size)
        images_NCHW = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        self.batch = Batch(images_NCHW, torch.randint(0, CLASSES, (batch,)), torch.arange(batch))

    def in_nchw(self) -> Synthetic:
        return self

    def count(self, split: str) -> int:
        return len(self.batch.labels_N)

    def batches(self, split: str, **_: Any) -> Iterable[Batch]:
        yield self.batch


def step_of(module: nn.Module, loss: Loss, batch: Batch) -> Step:
    """One training step of `fit`."""
    settings = Fit(optimizer="adamw", lr=1e-4)
    module.to(memory_format=torch.channels_last).train()
    optimizer = optimizer_of(module, settings, CPU)

    def step() -> None:
        value = loss(module, batch)
        value.item()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()

    return step


def torch_fx_qat(module: nn.Module, image_NCHW: torch.Tensor) -> nn.Module:
    """torch's own, deprecated: fake quant with moving min/max, BatchNorm beside the convolution while it trains."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared: nn.Module = prepare_qat_fx(module.train(), get_default_qat_qconfig_mapping("x86"), (image_NCHW,))
    return prepared


def steps(size: int, batch: int) -> dict[str, Step]:
    """The step of each way to train, by name."""
    torch.manual_seed(0)
    data = Synthetic(size, batch)
    run = Run(Path(), data, CPU, 0, Silent(), "")

    def network() -> nn.Module:
        torch.manual_seed(1)
        return MobileNetV2(CLASSES)

    def quantized(held: bool = False) -> nn.Module:
        prepared = prepare(network().eval(), Quantization(), data.preprocess)
        calibrate(prepared, [data.batch], CPU)
        hold_grids(prepared, held)
        return prepared

    structure = Structure(model={"use": "mobilenet_v2"}, num_classes=CLASSES, preprocess=data.preprocess)
    product = Product(Network(network().eval(), structure))
    student = product.network.module
    online = objective(Distillation(), product, run, student=student).loss
    remembered = objective(Distillation(views=1), product, run, student=student).loss
    labels = labels_loss()
    made = {
        "float": (network(), labels),
        "float+kd-online": (network(), online),
        "float+kd-remembered": (network(), remembered),
        "qat": (quantized(), labels),
        "qat-held": (quantized(held=True), labels),
        "qat+kd-online": (quantized(), online),
        "qat+kd-remembered": (quantized(), remembered),
        "qat-held+kd-online": (quantized(held=True), online),
        "qat-held+kd-remembered": (quantized(held=True), remembered),
        "torch-fx-qat": (torch_fx_qat(network(), data.batch.images_NCHW[:1]), labels),
    }
    return {name: step_of(module, loss, data.batch) for name, (module, loss) in made.items()}


def measured(chosen: dict[str, Step], rounds: int, warmup: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of each step in each round; rounds start at a different step each."""
    names = list(chosen)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cpu, wall = time.process_time(), time.perf_counter()
            chosen[name]()
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            if number >= 0:
                times[name].append(spent)
    return times


def summary(times: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Medians and quartiles, in ms, and the ratio to the float step of the same round."""
    rows = []
    for name, rounds in times.items():
        cpu, wall = (sorted(1000 * spent[k] for spent in rounds) for k in (0, 1))
        ratios = sorted(spent[0] / base[0] for spent, base in zip(rounds, times["float"], strict=True))
        rows.append(
            {
                "step": name,
                "cpu_ms": statistics.median(cpu),
                "cpu_ms_quartiles": _quartiles(cpu),
                "wall_ms": statistics.median(wall),
                "to_float": statistics.median(ratios),
                "to_float_quartiles": _quartiles(ratios),
            }
        )
    return rows


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| step | CPU ms, median (quartiles) | wall ms | x float (quartiles) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["cpu_ms_quartiles"]
        least, most = row["to_float_quartiles"]
        lines.append(
            f"| {row['step']} | {row['cpu_ms']:.0f} ({low:.0f}-{high:.0f}) | {row['wall_ms']:.0f} "
            f"| {row['to_float']:.2f} ({least:.2f}-{most:.2f}) |"
        )
    return "\n".join(lines)


PARTS = (
    ("convolutions, backward", ("convolution_backward", "mkldnn_linear_backward", "aten::mm", "aten::addmm")),
    ("convolutions, forward", ("mkldnn_convolution", "_convolution_pointwise", "mkldnn_linear")),
    ("BatchNorm", ("native_batch_norm",)),
    ("optimizer and clipping", ("_fused_adam", "clip_grad", "_foreach", "linalg_vector_norm")),
    ("clipped gradients (rounding, rectifiers)", ("hardtanh_backward",)),
    ("gradients of scales", ("aten::dot",)),
    ("rounding, rectifiers, sums", ("aten::mul", "aten::round", "aten::clamp", "aten::hardtanh", "aten::add")),
)


def parts(step: Step, repeats: int = 4) -> list[tuple[str, float]]:
    """What share of the operators' time goes where."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            step()
    shares: dict[str, float] = dict.fromkeys([name for name, _ in PARTS], 0.0)
    shares["all else"] = 0.0
    total = sum(event.self_cpu_time_total for event in profiled.key_averages())
    for event in profiled.key_averages():
        part = next((name for name, keys in PARTS if any(key in event.key for key in keys)), "all else")
        shares[part] += event.self_cpu_time_total / total
    return sorted(shares.items(), key=lambda item: -item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="side of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", help="names separated by commas; float is always there")
    parser.add_argument("--profile", metavar="STEP", help="where the time of this step goes")
    parser.add_argument("--json", type=Path, help="write every time here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = steps(options.size, options.batch)
    asked = set((options.steps or ",".join(chosen)).split(",")) | {"float"}
    if options.profile:
        asked = {options.profile}
    if unknown := asked - set(chosen):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    chosen = {name: step for name, step in chosen.items() if name in asked}
    where = {
        "size": options.size,
        "batch": options.batch,
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.processor() or platform.machine(),
    }
    with memory_kept():
        if options.profile:
            measured(chosen, 0, options.warmup)
            for part, share in parts(chosen[options.profile]):
                print(f"{share:6.1%}  {part}")
            return
        times = measured(chosen, options.rounds, options.warmup)
    rows = summary(times)
    print(f"MobileNetV2, {', '.join(f'{key} {value}' for key, value in where.items())}\n\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"where": where, "rows": rows, "times": times}, indent=1))


if __name__ == "__main__":
    main()
