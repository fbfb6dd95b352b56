"""An ARM core without a board: a Debian for aarch64 under qemu's user mode emulation.

It computes what the core computes, and its instructions can be counted. How long it takes says nothing about the core,
so nothing here prints a time.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets.agent import SUFFIXES, UNAVAILABLE, sha256
from compress.targets.emulated import counting, cycles
from compress.targets.emulated.cores import CORES
from compress.targets.emulated.debian import PLACE
from compress.targets.emulated.layers import estimate_layers
from compress.targets.emulated.parity import parity
from compress.targets.emulated.userland import Userland, ready
from compress.targets.local import Local
from compress.targets.machine import OnLine

REFUSED = ("time", "compare", "sustain")
DEFAULT = "cortex-a72"

UNESTIMATED = "Emulated: outputs and instruction counts are those of an ARM core, no time is measured."
STATEMENT = (
    f"{UNESTIMATED} Cycles are estimated from the hot blocks by llvm-mca, with data in the first-level cache: to about"
    " 10 % for dense layers on a Cortex-A76, about 50 % for depthwise ones and for the older cores."
)


def parse(name: str) -> tuple[str, ...]:
    """The CPUs that `emulated` (all) or `emulated:cortex-a76` names. Raises TargetError for another."""
    place, colon, cpu = name.partition(":")
    if place != PLACE or (colon and cpu not in CORES):
        raise TargetError(
            f"target {name}", "no such target", f"known: {PLACE}, {', '.join(f'{PLACE}:{c}' for c in CORES)}"
        )
    return (cpu,) if colon else tuple(CORES)


@dataclass
class Emulated:
    """A `Machine`; `emulated` without a CPU runs the agent as on a Cortex-A72."""

    name: str
    progress: Progress
    userland: Userland | None = None
    """Set up on entering where there is none."""
    _host: Local = field(default_factory=Local, init=False, repr=False)

    @property
    def cpu(self) -> str:
        named = parse(self.name)
        return named[0] if len(named) == 1 else DEFAULT

    def __enter__(self) -> Self:
        cpu = self.cpu
        self.userland = self.userland or ready(self.progress)
        self._host = Local(
            [*self.userland.python(cpu), "-P"], self.userland.environment_on(cpu), name=self.name
        ).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.__exit__(kind, error, trace)

    def estimating(self) -> dict[str, Any]:
        """What estimated times depend on besides the machine's own facts. Raises TargetError without llvm-mca."""
        assert self.userland is not None
        versions = {"userland": self.userland.key, "qemu": self.userland.qemu.version}
        return {**versions, "llvm_mca": cycles.find(self.progress).version, "mhz": CORES[self.cpu].mhz}

    def put(self, path: Path) -> str:
        return self._host.put(path)

    def place(self, name: str) -> str:
        return self._host.place(name)

    def get(self, name: str, path: Path) -> None:
        self._host.get(name, path)

    def ask(
        self, arguments: Sequence[str], *, about: str, on_line: OnLine | None = None, timeout_s: float = 900
    ) -> dict[str, Any]:
        """As `Machine.ask`; refuses to measure time, and estimates that of `layers`."""
        if arguments and arguments[0] == "layers":
            assert self.userland is not None
            return estimate_layers(arguments[1:], self.userland, self.cpu, self.progress, about=about, on_line=on_line)
        if arguments and arguments[0] in REFUSED:
            raise TargetError(
                about,
                f"`{arguments[0]}` measures time, and emulated time is not ARM time",
                "count instructions instead, or measure on a board (ssh://user@host)",
            )
        return self._host.ask(arguments, about=about, on_line=on_line, timeout_s=timeout_s)


def examine(
    files: Mapping[str, Path],
    images_real: np.ndarray | None,
    *,
    cpus: Sequence[str] = tuple(CORES),
    runtimes: Sequence[str] = ("onnxruntime", "litert"),
    progress: Progress,
) -> dict[str, Any]:
    """`conditions`, `parity` per file and CPU against this machine, and `counts` of one inference per file and CPU.

    `images_real` (N, C, H, W) are compared; the first is what is counted. Without them random inputs serve. Files that
    none of `runtimes` reads are left out. Raises TargetError.
    """
    chosen = {name: path for name, path in files.items() if SUFFIXES.get(path.suffix) in runtimes}
    if not chosen:
        raise TargetError(PLACE, f"no file for {', '.join(runtimes)}", "export the network first")
    userland = ready(progress)
    with contextlib.ExitStack() as stack:
        machines = {cpu: stack.enter_context(Emulated(f"{PLACE}:{cpu}", progress, userland)) for cpu in cpus}
        with progress.steps("parity", len(chosen) * len(cpus)) as advance:
            rows = parity(chosen, images_real, machines, advance)
    mca, no_cycles = _analyzer(progress)
    statement = STATEMENT if mca else f"{UNESTIMATED} No cycles are estimated: {no_cycles}."
    counts: list[dict[str, Any]] = []
    try:
        plugin = counting.plugin(userland.qemu, progress)
    except TargetError as error:
        progress.note(f"no instructions are counted: {error}")
        statement = f"{UNESTIMATED} No instructions are counted: {error}."
    else:
        counts = _counts(chosen, images_real, cpus, userland, plugin, mca, progress)
    conditions = {
        "target": PLACE if tuple(cpus) == tuple(CORES) else f"{PLACE}:{','.join(cpus)}",
        "machine": f"emulated {', '.join(cpus)} (qemu {userland.qemu.version} on {platform.machine()})",
        "qemu": userland.qemu.version,
        "cpus": list(cpus),
        "boards": {cpu: CORES[cpu].found_in for cpu in cpus},
        "runtimes": {"onnxruntime": userland.versions["onnxruntime"], "litert": userland.versions["ai-edge-litert"]},
        "python": userland.versions["python"],
        "numpy": userland.versions["numpy"],
        "userland": userland.key,
        "threads": 1,
        "llvm_mca": mca.version if mca else UNAVAILABLE,
        "cycle_models": {cpu: CORES[cpu].scheduling for cpu in cpus} if mca else UNAVAILABLE,
        "statement": statement,
    }
    return {"conditions": conditions, "parity": rows, "counts": counts}


def _analyzer(progress: Progress) -> tuple[cycles.Mca | None, str]:
    """llvm-mca, or why there is none."""
    try:
        return cycles.find(progress), ""
    except TargetError as error:
        progress.note(f"cycles are not estimated: {error}")
        return None, str(error)


def _counts(
    files: Mapping[str, Path],
    images_real: np.ndarray | None,
    cpus: Sequence[str],
    userland: Userland,
    plugin: Path,
    mca: cycles.Mca | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Two processes per file and CPU, side by side: the second shows that the count repeats."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="compress-") as folder,
        progress.steps("instructions", len(files) * len(cpus)) as advance,
        ThreadPoolExecutor(2) as pool,
    ):
        image, stop = None, threading.Event()
        if images_real is not None:
            image = Path(folder) / "image.npy"
            np.save(image, images_real[:1], allow_pickle=False)
        for name, path in files.items():
            for cpu in cpus:
                own = (userland, plugin, path, cpu)
                twice = [pool.submit(counting.count, *own, image=image, stop=stop) for _ in range(2)]
                try:
                    first, second = (one.result() for one in twice)
                except BaseException:  # Ctrl-C, or a fault of one: the other is not waited for
                    stop.set()
                    raise
                row = {
                    "file": name,
                    "runtime": first.runtime,
                    "cpu": cpu,
                    "instructions": first.instructions,
                    "repeat_instructions": second.instructions,
                    "overhead_instructions": first.overhead_instructions,
                    "cycles_estimated": UNAVAILABLE,
                    "share_covered": UNAVAILABLE,
                    "size_bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                if mca:
                    estimate = cycles.estimate(mca, first.blocks, cpu)
                    if estimate.blocks:
                        row |= {"cycles_estimated": estimate.cycles, "share_covered": estimate.share_covered}
                rows.append(row)
                advance(f"{name} on {cpu}: {first.instructions:,}")
    return rows
