"""What `compress` wants to know of a machine, asked of the agent that runs there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.errors import TargetError
from compress.targets.agent import SUFFIXES, Slot, schedule, sha256
from compress.targets.journal import MACHINE, Journal, own_journal
from compress.targets.local import open_model
from compress.targets.machine import Machine, OnLine

Runtime = Literal["onnxruntime", "litert", "ncnn"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "litert")
"""What every installation has; ncnn is measured where it is named."""
Threads = int | Literal["auto"]
"""`auto`: as many as the fastest cluster of cores has."""


@dataclass(frozen=True)
class Measuring:
    """How files are timed."""

    runtimes: tuple[Runtime, ...] = RUNTIMES
    threads: Threads = 1
    cores: str = "auto"
    """`auto`: the fastest cores where a machine has several kinds, else any. `any`. Or CPU numbers: `0,1`."""
    rounds: int = 4
    """Fresh processes per file, interleaved: baseline, the others, baseline again."""
    runs: int = 50
    """Least samples of each process."""
    warmup_s: float = 0.2
    """Of each process before its first sample."""
    min_s: float = 0.0
    """Least seconds of sampling of each process."""
    tolerance: float = 0.05
    """How far the baseline against itself may be from 1."""
    seed: int = 0
    """Of the bootstrap."""

    def slots(self, files: Mapping[str, Path]) -> list[Slot]:
        """The processes that a comparison starts, in their order."""
        return schedule([str(path) for path in files.values()], runtimes=self.runtimes, rounds=self.rounds)

    @property
    def words(self) -> list[str]:
        """The agent's options."""
        options: dict[str, Any] = asdict(self)
        runtimes = options.pop("runtimes")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return [*words, *(f"--runtime={runtime}" for runtime in runtimes)]


@dataclass(frozen=True)
class Comparison:
    conditions: dict[str, Any]
    """The machine and how it was asked."""
    rows: list[dict[str, Any]]
    """Per file and runtime, over all rounds: times in ms, fps = 1000 / p50, memory in MiB."""
    pairs: list[dict[str, Any]]
    """Per candidate: speed-up over the baseline, its interval, the A/A ratio, OK or NOISY and why."""
    samples: list[dict[str, Any]]
    """The agent's whole answer for every process, in the order they ran."""


@dataclass(frozen=True)
class Answers:
    """What a file computes on a machine for a sample of images."""

    outputs_NK: np.ndarray
    """The first output as the file stores it: int8 as int8."""
    correct: int | None
    """Images whose largest output is their label's; None without labels."""
    images: int
    facts: dict[str, Any]
    """The agent's answer: runtime, version, settings, `outputs_sha256`."""


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """The files under their names, or under their paths where two have the same name.

    Raises TargetError for a file that is missing, given twice, or of no kind that a runtime reads.
    """
    paths = list(paths)
    names = [path.name for path in paths]
    for path in paths:
        if not path.is_file():
            raise TargetError(path, "no such file")
        if path.suffix not in SUFFIXES:
            raise TargetError(path, f"no runtime reads this kind of file; known are {', '.join(SUFFIXES)}")
        if paths.count(path) > 1:
            raise TargetError(path, "given twice")
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}


def probe(machine: Machine) -> dict[str, Any]:
    """What `agent.probe` finds out: board, CPU, memory, system, runtimes, clock, temperature."""
    return machine.ask(["probe"], about=machine.name)


def compare(
    machine: Machine,
    files: Mapping[str, Path],
    measuring: Measuring = Measuring(),
    *,
    journal: Path | None = None,
    on_process: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Comparison:
    """Every file on the runtimes that read its kind; the first file of each runtime is the others' baseline.

    `on_process` hears a short text for each of `measuring.slots(files)`. What is measured is kept in `journal` until
    all is; with a journal that an earlier attempt left, only the rest is measured, and `on_note` hears a sentence on
    it. Raises TargetError when the machine cannot measure, or no file fits.
    """
    slots = measuring.slots(files)
    if not slots:
        raise TargetError("benchmark", f"no file for {', '.join(measuring.runtimes)}", "export the network first")
    names = list(files)
    processes: list[dict[str, Any]] = []

    def heard(line: dict[str, Any]) -> None:
        if "process" not in line:
            return
        process = line["process"]
        processes.append({**process, "file": names[process["index"]]})
        if on_process:
            ms = float(np.median(process["samples_ms"]))
            on_process(f"{names[process['index']]} {process['runtime']} {ms:.2f} ms")

    with contextlib.ExitStack() as stack:
        kept, done = None, list[str]()
        if journal is not None:
            taken = stack.enter_context(own_journal(journal))
            if not taken:
                kept = Journal.open(journal, _asked(machine, files, measuring))
            elif on_note:
                on_note(f"What is measured is not kept, an interruption would lose it ({taken}).")
        if kept is not None and kept.lines:
            if on_note:
                on_note(f"{len(kept.lines)} of {len(slots)} processes were measured before, from {kept.begun} on")
            for line in kept.lines:
                heard(line)
            lines = "".join(json.dumps(line) + "\n" for line in kept.lines)
            done = [f"--done={machine.put(stack.enter_context(_written(lines.encode(), '.jsonl')))}"]

        def measured(line: dict[str, Any]) -> None:
            if kept is not None and "process" in line:
                kept.keep(line)
            heard(line)

        try:
            found = machine.ask(
                ["compare", *(machine.put(path) for path in files.values()), *measuring.words, *done],
                about=f"benchmark on {machine.name}",
                on_line=measured,
            )
        except TargetError as error:
            if kept is None or not kept.lines:
                raise
            way_out = f"{len(kept.lines)} of {len(slots)} processes are kept, the same command goes on"
            raise TargetError(error.place, error.problem, f"{error.way_out}; {way_out}".lstrip("; ")) from error
        if kept is not None:
            kept.forget()
    # A line of the journal that the agent did not take, for another version of the runtime, has come a second time.
    by_slot = {(p["round"], p["runtime"], p["index"], p["control"]): p for p in processes}
    processes = [by_slot[slot.round, slot.runtime, slot.index, slot.control] for slot in slots]
    rows = [{**row, "file": names[row["index"]], "kind": Path(names[row["index"]]).stem} for row in found["rows"]]
    pairs = [
        {**pair, "baseline": names[pair["baseline_index"]], "candidate": names[pair["candidate_index"]]}
        for pair in found["pairs"]
    ]
    return Comparison({"target": machine.name, **found["conditions"]}, rows, pairs, processes)


def _asked(machine: Machine, files: Mapping[str, Path], measuring: Measuring) -> dict[str, Any]:
    """What a journal is of."""
    found = probe(machine)
    return {
        "files": [[name, sha256(path)] for name, path in files.items()],
        "options": measuring.words,
        "machine": {key: found.get(key) for key in MACHINE} | {"name": machine.name},
    }


def answers(
    machine: Machine,
    path: Path,
    images_NCHW: np.ndarray,
    labels_N: np.ndarray | None = None,
    *,
    runtime: str = "auto",
    threads: int = 1,
    on_line: OnLine | None = None,
) -> Answers:
    """What the file in `path` computes on the machine for real-valued float32 images, fed as the file stores them.

    The images are quantized here, the same for every machine. Raises TargetError, also when what came back is not what
    the machine says it computed.
    """
    model = open_model(path, runtime, threads)
    stored = np.stack([model.feed(image)[0] for image in images_NCHW])
    words = [f"--runtime={model.runtime}", f"--threads={threads}"]
    with _saved(stored) as inputs, contextlib.ExitStack() as stack:
        words += [f"--inputs={machine.put(inputs)}", f"--outputs={machine.place('outputs.npy')}"]
        if labels_N is not None:
            words.append(f"--labels={machine.put(stack.enter_context(_saved(labels_N.astype(np.int64))))}")
        about = f"{path.name} on {machine.name}"
        facts = machine.ask(["run", machine.put(path), *words], about=about, on_line=on_line)
        with tempfile.TemporaryDirectory(prefix="compress-") as folder:
            fetched = Path(folder) / "outputs.npy"
            machine.get("outputs.npy", fetched)
            outputs_NK = np.load(fetched, allow_pickle=False)
    if hashlib.sha256(np.ascontiguousarray(outputs_NK).tobytes()).hexdigest() != facts["outputs_sha256"]:
        raise TargetError(about, "the outputs changed on their way here", "run it again")
    return Answers(outputs_NK, facts.get("correct"), len(images_NCHW), facts)


def sustain(
    machine: Machine,
    path: Path,
    *,
    minutes: float,
    every_s: float = 5,
    threads: Threads = 1,
    cores: str = "auto",
    on_point: OnLine | None = None,
) -> dict[str, Any]:
    """Inference without a pause: the series of points, the first and the last minute's p50, and whether it throttled.

    `on_point` hears each point as it is measured. Raises TargetError.
    """

    def heard(line: dict[str, Any]) -> None:
        if on_point and "point" in line:
            on_point(line["point"])

    words = [f"--minutes={minutes}", f"--every-s={every_s}", f"--threads={threads}", f"--cores={cores}"]
    about = f"{path.name} on {machine.name}"
    return machine.ask(["sustain", machine.put(path), *words], about=about, on_line=heard)


@contextlib.contextmanager
def _written(content: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        path = Path(folder) / f"content{suffix}"
        path.write_bytes(content)
        yield path


def _saved(array: np.ndarray) -> contextlib.AbstractContextManager[Path]:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return _written(content.getvalue(), ".npy")
