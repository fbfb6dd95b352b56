"""What each distillation loss costs in time and memory: forward and backward, alone, on maps as MobileNetV2 has them.

    python benchmarks/distillation_cost.py                  # all losses, each choice of their settings: a few minutes
    python benchmarks/distillation_cost.py --only nst cwd   # a look; writes no table

All members of `LossSettings` are measured with their defaults, and once more for each other choice that a setting
offers (`kernel: gaussian`). A loss gets what the training would give it: random maps of the layers that `layers: auto`
takes at 96 px, a student of about half the width, the kept channels where it compares channel with channel. Losses that
look into networks, or at gradients of pixels, get a MobileNetV2 and the same pruned to a third of its MACs; both
forward passes are part of their time. The table is distillation_cost.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits in a loop would count as CPU time

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from compress.losses import LossSettings
from compress.losses.lesson import Facts, FeatureTerm, Lesson, Term
from compress.models.mobilenet_v2 import MobileNetV2
from compress.product import Batch, Network, Preprocess, Run, Structure
from compress.progress import Silent
from compress.pruning import MacGoal, Pruning, prune_network
from compress.training import memory_kept

HERE = Path(__file__).parent
CLASSES = 10
IMAGES = 9469
"""In Imagenette's training split: some losses remember an embedding for each."""
SIZE = 96

Shape = tuple[int, int, int]
Step = Callable[[], Tensor]

LAYERS: dict[str, list[tuple[str, Shape, Shape]]] = {
    # name, teacher's and student's channels, height, width
    "stages": [
        ("features.1", (16, 48, 48), (8, 48, 48)),
        ("features.3", (24, 24, 24), (12, 24, 24)),
        ("features.6", (32, 12, 12), (16, 12, 12)),
        ("features.13", (96, 6, 6), (48, 6, 6)),
        ("features.18", (1280, 3, 3), (640, 3, 3)),
    ],
    "activations": [
        ("features.2.conv.0.1", (96, 48, 48), (48, 48, 48)),
        ("features.4.conv.0.1", (144, 24, 24), (72, 24, 24)),
        ("features.7.conv.0.1", (192, 12, 12), (96, 12, 12)),
        ("features.14.conv.0.1", (576, 6, 6), (288, 6, 6)),
        ("features.18.1", (1280, 3, 3), (640, 3, 3)),
    ],
}
LAYERS["last"] = LAYERS["stages"][-1:]


@dataclass(frozen=True)
class Row:
    name: str
    ms: float
    megabytes: float
    layers: int
    passes: bool
    """Whether forward passes of networks are part of it."""


class Noise:
    """One batch, again and again: the time does not depend on what the images show."""

    labels = tuple(str(k) for k in range(CLASSES))
    preprocess = Preprocess(size=SIZE)
    fingerprint = "noise"
    channels_last = True

    def __init__(self, batch: int) -> None:
        images_NCHW = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
        self.batch = Batch(images_NCHW, torch.randint(0, CLASSES, (batch,)), torch.arange(batch))

    def in_nchw(self) -> Noise:
        return self

    def count(self, split: str) -> int:
        return IMAGES

    def batches(self, split: str, **_: Any) -> Iterable[Batch]:
        yield self.batch


@dataclass(frozen=True)
class Networks:
    """The original network and the one pruned from it."""

    teacher: nn.Module
    student: nn.Module
    kept: Any

    @classmethod
    def build(cls, data: Noise) -> Networks:
        torch.manual_seed(0)
        structure = Structure(model={"use": "mobilenet_v2"}, num_classes=CLASSES, preprocess=data.preprocess)
        whole = Network(MobileNetV2(CLASSES).eval(), structure)
        run = Run(Path(), data, torch.device("cpu"), 0, Silent(), "")
        narrow = prune_network(whole, MacGoal(macs=0.33), Pruning(batchnorm_images=0), run=run)
        with torch.no_grad():  # as after some training: no longer a part of the original
            for parameter in narrow.module.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        for network in (whole, narrow):
            network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(whole.module.requires_grad_(False), narrow.module.train(), narrow.structure.kept)


def members() -> list[type[Term]]:
    """The settings classes of all losses."""
    union = get_args(LossSettings)[0]
    return list(get_args(union))


def choices(kind: type[Term]) -> Iterator[tuple[str, Term]]:
    """A loss with its defaults, then with each other value of each setting that is a choice, by name in the table."""
    use = get_args(kind.model_fields["use"].annotation)[0]
    yield use, kind.model_validate({"use": use})
    common = FeatureTerm.model_fields if issubclass(kind, FeatureTerm) else Term.model_fields
    for field, info in kind.model_fields.items():
        values: Sequence[Any] = ()
        if get_origin(info.annotation) is Literal and field not in common:
            values = get_args(info.annotation)
        elif info.annotation is bool:
            values = (True, False)
        for value in values:
            if value != info.default and field != "use":
                try:
                    yield f"{use}, {field}: {str(value).lower()}", kind.model_validate({"use": use, field: value})
                except ValidationError:  # only together with other settings
                    continue


def step_of(term: Term, networks: Networks, batch: Batch) -> tuple[Step, nn.Module, int]:
    """The weighted value of a loss for one batch, ready for `backward`; what it trains; how many layers it looks at."""
    torch.manual_seed(0)
    count = len(batch.labels_N)
    learns = nn.ParameterList()

    def noise(*shape: int, trained: bool) -> Tensor:
        values = torch.randn(count, *shape)
        values = values.to(memory_format=torch.channels_last) if len(shape) == 3 else values
        if trained:
            learns.append(values)
            return learns[-1]
        return values

    layers = LAYERS[term.where] if isinstance(term, FeatureTerm) else []
    theirs = [mine if term.same_width else teacher for _, teacher, mine in layers]
    facts = Facts(
        layers=[name for name, _, _ in layers],
        student_shapes=[mine for _, _, mine in layers],
        teacher_shapes=theirs,
        classes=CLASSES,
        images=IMAGES,
        student=networks.student if term.needs_networks else None,
        teacher=networks.teacher if term.needs_networks else None,
        kept=networks.kept if term.needs_networks else None,
    )
    parts = term.parts(facts)
    fixed: dict[str, Any] = {
        "labels_N": batch.labels_N,
        "indices_N": batch.indices_N,
        "student_maps": [noise(*mine, trained=True) for _, _, mine in layers],
        "teacher_maps": [noise(*shape, trained=False) for shape in theirs],
        "layers": facts.layers,
        "parts": parts,
        "progress": 0.5,
        "student": facts.student,
        "teacher": facts.teacher,
        "kept": facts.kept,
    }
    passes = term.needs_networks or term.needs_input_gradients
    logits = noise(CLASSES, trained=True), noise(CLASSES, trained=False)

    def step() -> Tensor:
        pixels = batch.images_NCHW.clone().requires_grad_(term.needs_input_gradients) if passes else None
        student, teacher = (networks.student(pixels), networks.teacher(pixels)) if passes else logits
        lesson = Lesson(student_NK=student, teacher_NK=teacher, images_NCHW=pixels, **fixed)
        value: Tensor = term.weight * term(lesson).sum()  # type: ignore[operator]
        return value

    return step, nn.ModuleList([learns, networks.student, *([parts] if parts is not None else [])]), len(layers)


def measured(step: Step, learns: nn.Module, rounds: int) -> tuple[float, float]:
    """Median CPU time of forward and backward in ms, and the most memory that their tensors take at a time, in MB."""
    clear = partial(learns.zero_grad, set_to_none=True)
    clear()
    step().backward()
    times = []
    for _ in range(rounds):
        clear()
        start = time.process_time()
        step().backward()
        times.append(1000 * (time.process_time() - start))
    clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step().backward()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return statistics.median(times), most / 1e6


def rows(only: Sequence[str], batch_size: int, rounds: int) -> Iterator[Row]:
    """A training step without a teacher and the teacher's answers to compare with, then each loss."""
    data = Noise(batch_size)
    networks = Networks.build(data)
    batch = data.batch

    def plain() -> Tensor:
        return F.cross_entropy(networks.student(batch.images_NCHW), batch.labels_N)

    def teacher() -> Tensor:
        return networks.teacher(batch.images_NCHW).sum().requires_grad_()

    yield Row("the student's step on labels alone", *measured(plain, networks.student, rounds), 0, True)
    yield Row("the teacher's logits", *measured(teacher, networks.student, rounds), 0, True)
    for kind in members():
        for name, term in choices(kind):
            if only and get_args(kind.model_fields["use"].annotation)[0] not in only:
                continue
            step, learns, layers = step_of(term, networks, batch)
            passes = term.needs_networks or term.needs_input_gradients
            yield Row(name, *measured(step, learns, rounds), layers, passes)


def table(found: Sequence[Row]) -> str:
    lines = ["| | ms | MB | layers | |", "|---|---|---|---|---|"]
    for row in found:
        passes = "with the networks' forward passes" if row.passes else ""
        lines.append(f"| {row.name} | {short(row.ms)} | {short(row.megabytes)} | {row.layers or ''} | {passes} |")
    return "\n".join(lines)


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), metavar="USE", help="these losses; writes no table")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="the time is the median of so many")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    with memory_kept():
        for row in rows(options.only, options.batch, options.rounds):
            found.append(row)
            print(f"{row.ms:9.2f} ms {row.megabytes:9.2f} MB  {row.name}", flush=True)
    found[2:] = sorted(found[2:], key=lambda row: (row.passes, row.ms))
    text = f"""# What a distillation loss costs

Forward and backward of one loss alone, batch {options.batch}: CPU time in ms (median of {options.rounds}), and the most
memory that its tensors hold at a time, beyond those it is given. Maps are random, of the sizes that MobileNetV2 has at
{SIZE} px: 16 x 48 x 48, 24 x 24 x 24, 32 x 12 x 12, 96 x 6 x 6 and 1280 x 3 x 3 (before the activations 96, 144, 192,
576 and 1280 channels); the student has half the channels. The first two rows are what a step costs without any of them:
a MobileNetV2 pruned to a third of its MACs, and the whole one as its teacher.

{table(found)}

{machine(options.threads)}; torch {torch.__version__}.

    {" ".join(["python", "benchmarks/distillation_cost.py", *sys.argv[1:]])}
"""
    print(f"\n{text}")
    if not options.only:
        (HERE / "distillation_cost.md").write_text(text)


def machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}"


if __name__ == "__main__":
    main()
