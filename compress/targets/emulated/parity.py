"""Whether a file computes on ARM kernels what it computes here, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.targets import asking
from compress.targets.agent import random_input
from compress.targets.local import open_model
from compress.targets.machine import Machine
from compress.targets.outputs import compared, sha256_of

RANDOM_IMAGES = 4
"""Where no images are given."""


def parity(
    files: Mapping[str, Path],
    images_real: np.ndarray | None,
    machines: Mapping[str, Machine],
    on_result: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Per file and CPU, how many numbers of the first output differ from those of the same runtime here (`compared`).

    `machines` has an entered machine for each CPU. Without images random ones are taken.
    """
    rows = []
    for name, path in files.items():
        model = open_model(path)
        images = images_real
        if images is None:
            images = np.concatenate(
                [model.input.real(random_input(model.input, seed)) for seed in range(RANDOM_IMAGES)]
            )
        here = model.answers(images)
        for cpu, machine in machines.items():
            there = asking.answers(machine, path, images)
            row = {"file": name, "runtime": model.runtime, "cpu": cpu, "images": len(images)}
            rows.append(
                {**row, **compared(there.outputs_NK, here, int8=path.stem == "int8"), "host_sha256": sha256_of(here)}
            )
            on_result(f"{name} on {cpu}: {rows[-1]['differing']} of {rows[-1]['outputs']} outputs differ")
    return rows
