"""`compress latency`: how long an int8 network's layers take on a machine, and what narrower ones would."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.console import Setup, messages, say, show_table
from compress.errors import CompressError
from compress.progress import Progress, RichProgress

if TYPE_CHECKING:
    from torch import nn

    from compress.latency.predict import Predictor
    from compress.latency.shapes import Placed
    from compress.product import Preprocess
    from compress.quantization import Quantization
    from compress.targets import Runtime

SIZE, CLASSES = 96, 10
"""Of the network that is measured where none is named, MobileNetV2, and of a recipe whose data cannot be read."""
MOST = (1.0, 0.8, 0.6, 0.4, 0.25)
"""Largest share of their channels that the layers of narrower networks keep, by turns: from near to far."""
CORNERS = 1 + len(MOST)
"""Whole networks that a prediction is fitted to: the one that is named (seed 0), and narrower ones by chance."""
CHECKED = 1000
"""The first seed of the networks of --check."""
ROUND_TO = 8


class Chosen(StrEnum):
    ONNXRUNTIME = "onnxruntime"
    LITERT = "litert"
    BOTH = "both"


@dataclass(frozen=True)
class Subject:
    """The network whose layers the table is to cover."""

    name: str
    module: nn.Module
    preprocess: Preprocess
    quantization: Quantization


def latency(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="local, a board as ssh://user@host[:port], or emulated:cortex-a72.")
    ],
    what: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE|RUN|NETWORK", help="Whose layers; default: MobileNetV2 at 96 px."),
    ] = None,
    runtime: Annotated[Chosen, typer.Option(help="Which runtime's table.")] = Chosen.BOTH,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    check: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure N narrower networks by chance, beside what is predicted.")
    ] = 0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure everything anew.")] = False,
    setup: Setup = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Predict how long narrower networks take.

    From their int8 layers, measured on a machine once. The table is kept and used again; what is missing of it is
    measured, also after an interruption.
    """
    from compress.targets import check_name

    check_name(target)
    progress = RichProgress(messages)
    subject = _subject(what, progress)
    runtimes: list[Runtime] = ["onnxruntime", "litert"]
    if runtime is not Chosen.BOTH:
        runtimes = [name for name in runtimes if name == runtime.value]
    found = _predicted(subject, target, runtimes, threads, check, refresh, setup, progress)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for one in found:
        _show(subject, one)


def _predicted(
    subject: Subject,
    target: str,
    runtimes: list[Runtime],
    threads: int,
    check: int,
    refresh: bool,
    setup: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """For each runtime the table, the prediction and, with `check`, what networks by chance really took."""
    from compress.latency.networks import int8_files, narrower
    from compress.latency.predict import calibrated, predictor_for, times_of
    from compress.latency.shapes import place_layers
    from compress.models.coupled import find_coupled

    size, channels = subject.preprocess.size, subject.preprocess.channels
    layers = place_layers(subject.module, size, channels)
    if not layers:
        raise CompressError(subject.name, "has no convolution or linear layer", "name another network")
    sets, _ = find_coupled(subject.module, size, channels)

    def drawn(seed: int) -> nn.Module:
        if not seed:
            return subject.module
        return narrower(subject.module, sets, seed=seed, round_to=ROUND_TO, most=MOST[seed % len(MOST)])

    def written(seeds: range, label: str) -> list[tuple[list[Placed], dict[Runtime, bytes]]]:
        networks = []
        with progress.steps(label, len(seeds)) as advance:
            for seed in seeds:
                module = drawn(seed)
                files = int8_files(module, subject.preprocess, runtimes, subject.quantization)
                networks.append((place_layers(module, size, channels), files))
                advance(f"network {len(networks)} of {len(seeds)}")
        return networks

    corners: list[tuple[list[Placed], dict[Runtime, bytes]]] = []
    tests: list[tuple[list[Placed], dict[Runtime, bytes]]] = []
    answers = []
    for runtime in runtimes:
        predictor = predictor_for(
            target, runtime, layers, threads=threads, progress=progress, setup=setup, refresh=refresh
        )
        if not predictor.fitted:
            corners = corners or written(range(CORNERS if sets else 1), "write networks to fit to")
            networks = [(placed, files[runtime]) for placed, files in corners]
            predictor = calibrated(target, predictor, networks, progress=progress, setup=setup)
        answer = _described(predictor, layers) | {"target": target, "network": subject.name, "checked": []}
        if check and sets:
            tests = tests or written(range(CHECKED, CHECKED + check), "write networks to check")
            files = {str(number): files[runtime] for number, (_, files) in enumerate(tests)}
            times_us = times_of(target, predictor.table.key, files, progress=progress, setup=setup, label="check")
            answer["checked"] = [
                {
                    "predicted_us": predictor.network_us(layer.shape for layer in placed),
                    "measured_us": times_us[str(number)],
                }
                for number, (placed, _) in enumerate(tests)
            ]
        answers.append(answer)
    return answers


def _described(predictor: Predictor, layers: list[Placed]) -> dict[str, Any]:
    table = predictor.table
    return {
        "runtime": table.key.runtime,
        "version": table.key.version,
        "threads": table.key.threads,
        "device": dict(table.key.device),
        "estimated": predictor.estimated,
        "noise": table.noise,
        "cells": len(table.cells),
        "path": str(table.path),
        "fast_multiples": {f"{family}, {side}": profile.step for (family, side), profile in predictor.profiles.items()},
        "layers": [
            {
                "name": layer.name,
                "shape": str(layer.shape),
                "channels": layer.shape.channels,
                "macs": layer.macs,
                "us": predictor.layer_us(layer.shape),
            }
            for layer in layers
        ],
        "sum_us": sum(predictor.layer_us(layer.shape) for layer in layers),
        "fixed_us": predictor.fixed_us,
        "scale": predictor.scale,
        "predicted_us": predictor.network_us(layer.shape for layer in layers),
    }


def _show(subject: Subject, found: dict[str, Any]) -> None:
    unit = "estimated us" if found["estimated"] else "us"
    title = f"{subject.name}: int8 layers on {found['target']}, {found['runtime']} {found['version']}"
    rows = [
        [
            layer["name"],
            layer["shape"],
            layer["channels"],
            f"{layer['us']:.1f}",
            f"{100 * layer['us'] / found['sum_us']:.1f}",
        ]
        for layer in found["layers"]
    ]
    show_table(["layer", "kind and input", "channels", unit, "% of the sum"], rows, title)
    multiples = [[name, str(step)] for name, step in found["fast_multiples"].items()]
    if multiples:
        show_table(["kind and side", "fast multiple of channels"], multiples)
    if found["checked"]:
        checked = [
            [
                f"{one['predicted_us']:.0f}",
                f"{one['measured_us']:.0f}",
                f"{100 * (one['predicted_us'] / one['measured_us'] - 1):+.1f}",
            ]
            for one in found["checked"]
        ]
        show_table(
            [f"predicted {unit}", f"measured {unit}".replace("measured est", "counted, est"), "error %"], checked
        )
        errors = [abs(one["predicted_us"] / one["measured_us"] - 1) for one in found["checked"]]
        median, worst = statistics.median(errors), max(errors)
        say(f"{len(errors)} networks by chance: median error {median:.1%}, largest {worst:.1%}")
    say(
        f"{found['predicted_us']:.0f} {unit} predicted for the whole network"
        f" = {found['fixed_us']:.0f} + {found['scale']:.3f} x {found['sum_us']:.0f}, the sum of its layers"
    )
    if found["estimated"]:
        mhz = found["device"]["mhz"]
        say(f"Estimated from emulated instructions by llvm-mca at {mhz} MHz, one thread: no time was measured.")
    elif found["device"].get("emulator") not in (None, "unavailable"):
        say(f"Timed under {found['device']['emulator']}: these are no times of {found['device']['cpu']}.")
    say(f"{found['cells']} layers in {found['path']}")


def _subject(what: Path | None, progress: Progress) -> Subject:
    """A recipe's network before its first stage, a run's last one, or that of a saved network's folder."""
    from compress.quantization import Quantization

    if what is None:
        from compress.models import build
        from compress.models.mobilenet_v2 import MobileNetV2Settings
        from compress.product import Preprocess

        module = build(MobileNetV2Settings(use="mobilenet_v2"), CLASSES, SIZE)
        return Subject("mobilenet_v2", module, Preprocess(size=SIZE), Quantization())
    if what.is_dir():
        return _saved(what)
    from compress import recipe as recipes
    from compress.data import open_data
    from compress.errors import DataError
    from compress.models import build
    from compress.stages.quantize import Quantize

    recipe = recipes.load(what, [])
    try:
        classes = len(open_data(recipe.data, recipe.preprocess, progress, Path.cwd()).labels)
    except DataError as error:
        progress.note(f"the recipe's data cannot be read ({error}); {CLASSES} classes assumed")
        classes = CLASSES
    preprocess = recipe.preprocess
    module = build(recipe.model, classes, preprocess.size, progress, preprocess.channels, Path.cwd())
    stage = next((stage for stage in recipe.stages if isinstance(stage, Quantize)), None)
    return Subject(recipe.name, module, preprocess, stage.quantization() if stage else Quantization())


def _saved(folder: Path) -> Subject:
    """The network of a folder with a structure, or the last one of a run; its weights are not needed."""
    from compress.checkpoint import STRUCTURE, described
    from compress.models import build
    from compress.models.rebuild import rebuild
    from compress.quantization import Quantization

    place = folder
    if not (folder / STRUCTURE).is_file():
        saved = sorted(folder.glob(f"stages/*/network/{STRUCTURE}"))
        if not saved:
            raise CompressError(folder, "neither a run with a finished stage nor a saved network", "name another")
        place = saved[-1].parent
    structure, settings, _ = described(place)
    preprocess = structure.preprocess
    module = build(settings, structure.num_classes, preprocess.size, channels=preprocess.channels)
    rebuild(module, structure)
    quantization = Quantization()
    if structure.quantize is not None:
        quantization = Quantization.model_validate_json(json.dumps(structure.quantize))
    return Subject(str(folder), module.eval(), preprocess, quantization)
