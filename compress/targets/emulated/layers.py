"""The agent's command `layers` on an emulated core: cycles are estimated where a machine would measure time."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets.emulated import counting, cycles
from compress.targets.emulated.cores import CORES
from compress.targets.emulated.userland import Userland
from compress.targets.machine import OnLine

AT_ONCE = 32
"""Entries of one process: starting it takes as long as some fifteen of them."""


def estimate_layers(
    arguments: Sequence[str], userland: Userland, cpu: str, progress: Progress, *, about: str, on_line: OnLine | None
) -> dict[str, Any]:
    """As `agent.py layers ARCHIVE --runtime=R`; `us` are estimated cycles at the core's clock (`CORES[cpu].mhz`).

    Two processes side by side, some entries each. Raises TargetError, also without llvm-mca.
    """
    archive = Path(arguments[0])
    options = dict(word.removeprefix("--").split("=", 1) for word in arguments[1:])
    runtime = options["runtime"]
    if options.get("threads", "1") != "1":
        raise TargetError(about, "emulated cores are counted with one thread", "leave out --threads")
    mca, plugin = cycles.find(progress), counting.plugin(userland.qemu, progress)
    stop, version = threading.Event(), ""
    known: cycles.Known = {}
    with zipfile.ZipFile(archive) as packed, TemporaryDirectory(prefix="compress-") as folder:
        entries = [entry for batch in json.loads(packed.read("layers.json")) for entry in batch]
        for name in {name for entry in entries for name in entry["files"]}:
            (Path(folder) / Path(name).name).write_bytes(packed.read(name))

        def count(chosen: Sequence[dict[str, Any]]) -> tuple[list[tuple[counting.Block, ...]], str]:
            paths = [Path(folder) / name for entry in chosen for name in entry["files"]]
            return counting.count_each(userland, plugin, paths, cpu, runtime, stop=stop)

        parts = [entries[start : start + AT_ONCE] for start in range(0, len(entries), AT_ONCE)]
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(count, part) for part in parts]
            try:
                for part, one in zip(parts, running, strict=True):
                    found, version = one.result()
                    rest = iter(found)
                    for entry in part:
                        us = [_us(mca, next(rest), cpu, known, about) for _ in entry["files"]]
                        if on_line:
                            on_line({"layer": {"name": entry["name"], "us": us, "halves_us": [us, us], "samples": 1}})
            except BaseException:  # Ctrl-C, or a fault: the others are not waited for
                stop.set()
                for one in running:
                    one.cancel()
                raise
    facts = {"runtime": runtime, "version": version, "layers": len(entries), "reference_us": []}
    return {**facts, "estimated": True, "mhz": CORES[cpu].mhz, "llvm_mca": mca.version, "throttled": []}


def _us(mca: cycles.Mca, blocks: tuple[counting.Block, ...], cpu: str, known: cycles.Known, about: str) -> float:
    found = cycles.estimate(mca, blocks, cpu, known)
    if not found.blocks:
        raise TargetError(about, f"llvm-mca {mca.version} knows none of its instructions")
    return found.cycles / CORES[cpu].mhz
