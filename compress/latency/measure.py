"""Times of many layers on a machine: packed into one archive, measured there by the agent, kept line by line.

What a board has measured before it drops off stays in a journal; the next attempt measures the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import statistics
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import TargetError
from compress.latency.shapes import Shape
from compress.latency.single import layer_file
from compress.latency.table import Key, row_of, shape_of_row
from compress.progress import Progress
from compress.targets import Machine, Runtime, is_emulated
from compress.targets.agent import UNAVAILABLE
from compress.targets.asking import probe
from compress.targets.journal import Journal, own_journal

DEVICE = (
    "board",
    "cpu",
    "arch",
    "bits",
    "features",
    "cores",
    "cores_allowed",
    "governor",
    "max_mhz",
    "emulator",
)
"""Facts of a probe on which a layer's time depends; the rest changes with the hour or does not matter."""
MANY = 5
"""Layers in the second file of a shape, the first has one."""
MANY_BYTES, TWO_BYTES = 1 << 20, 1 << 25
"""Layers with more weights than this are measured with two in the second file, or with a single file."""
SAMPLE_S = 0.011
"""Seconds of sampling of each file, on average."""
WHOLE_S = 0.06
"""The same for whole networks."""
BATCH = 8
NOISY = 0.05
"""How far the pace may change before the table is called noisy."""
LEAST_US = 0.02
"""Of a layer whose time is lost in the noise of the clock."""


@dataclass
class Found:
    """What was measured."""

    cells: dict[Shape, float] = field(default_factory=dict)
    """Microseconds that one more layer of this shape takes."""
    wholes: dict[str, float] = field(default_factory=dict)
    """Microseconds of each of the given files."""
    noise: float = 0.0
    """Median difference of the two halves of the samples, as a share."""
    reasons: list[str] = field(default_factory=list)
    """Why not to trust it."""


def key_of(machine: Machine, runtime: Runtime, threads: int) -> Key:
    """What a table of the machine is of; asks it. Raises TargetError without the runtime."""
    found = probe(machine)
    version = found["runtimes"].get(runtime, UNAVAILABLE)
    if version == UNAVAILABLE:
        raise TargetError(machine.name, f"{runtime} is not installed there", "install it, or name another runtime")
    device = {name: found.get(name) for name in DEVICE}
    if is_emulated(machine.name):
        from compress.targets.emulated import Emulated

        assert isinstance(machine, Emulated)
        device |= machine.estimating()
    return Key(device, runtime, str(version), threads)


def measure(
    machine: Machine,
    shapes: Sequence[Shape],
    runtime: Runtime,
    *,
    key: Key,
    progress: Progress,
    together: Sequence[Sequence[Shape]] = (),
    wholes: Mapping[str, bytes] | None = None,
    label: str = "latency",
) -> Found:
    """Times of layers and of whole networks (files by name) on the machine, some at a time in turns.

    Those of each list of `together` have their turns in common: a slow moment hits them alike.

    What an interrupted attempt has measured of layers is not measured again, and what is measured until the machine
    fails is kept, until `forget`. Raises TargetError when the machine cannot measure.
    """
    wholes = wholes or {}
    entries: dict[str, Shape | bytes] = {_name(shape): shape for shape in shapes}
    entries |= {_sha256(content): content for content in wholes.values()}
    found, lines, result = Found(), dict[str, dict[str, Any]](), dict[str, Any]()
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(_journal(key, progress)) if shapes else None
        if journal is not None:
            lines = {line["layer"]["name"]: line["layer"] for line in journal.lines if _sound(line)}
        missing = {name: entry for name, entry in entries.items() if name not in lines}
        if journal is not None and len(missing) < len(entries):
            kept = f"{len(entries) - len(missing)} of {len(entries)}"
            progress.note(f"{kept} were measured before, from {journal.begun} on")
        if missing:
            advance = stack.enter_context(progress.steps(f"{label} {runtime} on {machine.name}", len(missing)))

            def heard(line: dict[str, Any]) -> None:
                if not _sound(line) or line["layer"]["name"] not in missing:
                    return
                own = line["layer"]
                entry = missing[own["name"]]
                if journal is not None and isinstance(entry, Shape):
                    journal.keep(line)
                lines[own["name"]] = own
                about = f"{entry}, {entry.channels}" if isinstance(entry, Shape) else "a whole network"
                advance(f"{about}: {_us(own['us'], entry):.1f} us")

            archive = stack.enter_context(_packed(missing, runtime, together))
            words = [f"--runtime={runtime}", f"--threads={key.threads}"]
            words.append(f"--sample-s={SAMPLE_S if shapes else WHOLE_S}")
            about = f"latency table of {machine.name}"
            try:
                result = machine.ask(["layers", machine.put(archive), *words], about=about, on_line=heard)
            except TargetError as error:
                if journal is None or not journal.lines:
                    raise
                way_out = f"{len(lines)} of {len(entries)} are kept, the same command goes on"
                raise TargetError(error.place, error.problem, f"{error.way_out}; {way_out}".lstrip("; ")) from error
        if left := [name for name in entries if name not in lines]:
            raise TargetError(machine.name, f"the agent left {len(left)} layers out", "run the same command again")
        for name, own in lines.items():  # also what was measured for another network and lies in the journal
            if (shape := _shape(name)) is not None:
                found.cells[shape] = _us(own["us"], shape)
        found.wholes = {name: float(lines[_sha256(content)]["us"][0]) for name, content in wholes.items()}
        found.noise = _noise([lines[name] for name in entries])
        found.reasons = [*result.get("throttled", []), *_pace(result.get("reference_us", []))]
    return found


def forget(key: Key) -> None:
    """Removes what is kept for a next attempt: it is part of a table now."""
    _journal_path(key).unlink(missing_ok=True)


def _journal_path(key: Key) -> Path:
    return key.path.with_suffix(".jsonl")


@contextlib.contextmanager
def _journal(key: Key, progress: Progress) -> Iterator[Journal | None]:
    """What earlier attempts have measured for the table; None, and a note, where another process has it."""
    with own_journal(_journal_path(key)) as taken:
        if taken:
            progress.note(f"What is measured is not kept until all is ({taken}).")
        yield None if taken else Journal.open(_journal_path(key), {"layers": key.as_json})


def copies(shape: Shape) -> tuple[int, ...]:
    """How many layers the files have that a shape is measured with."""
    weights = shape.outputs * (shape.inputs // shape.groups) * shape.kernel[0] * shape.kernel[1]
    return (1, MANY) if weights <= MANY_BYTES else (1, 2) if weights <= TWO_BYTES else (1,)


@contextlib.contextmanager
def _packed(
    entries: Mapping[str, Shape | bytes], runtime: Runtime, together: Sequence[Sequence[Shape]]
) -> Iterator[Path]:
    """The archive that the agent's `layers` takes; in an order by chance, so that a slow minute hits no kind alone."""
    suffix = "onnx" if runtime == "onnxruntime" else "tflite"
    groups = [[name for name in map(_name, shapes) if name in entries] for shapes in together]
    own = {name for names in groups for name in names}
    order = sorted(name for name in entries if name not in own)
    random.Random(0).shuffle(order)
    groups += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    numbers: dict[str, int] = {}
    listed = []
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        path = Path(folder) / "layers.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for names in groups:
                batch = []
                for name in names:
                    if name in numbers:  # of two groups
                        continue
                    numbers[name] = len(numbers)
                    entry = entries[name]
                    contents = (
                        [layer_file(entry, runtime, count) for count in copies(entry)]
                        if isinstance(entry, Shape)
                        else [entry]
                    )
                    files = [f"{numbers[name]}-{place}.{suffix}" for place in range(len(contents))]
                    for file, content in zip(files, contents, strict=True):
                        archive.writestr(file, content)
                    batch.append({"name": name, "files": files})
                listed += [batch] if batch else []
            archive.writestr("layers.json", json.dumps(listed))
        yield path


def _us(us: Sequence[float], entry: Shape | bytes) -> float:
    """What one more layer takes; of a whole network's file, what it takes."""
    if not isinstance(entry, Shape) or len(us) == 1:
        return float(us[0])
    counts = copies(entry)
    return max(LEAST_US, (us[1] - us[0]) / (counts[1] - counts[0]))


def _noise(lines: Sequence[Mapping[str, Any]]) -> float:
    """Median of how far the last files' two halves of samples are apart."""
    apart = []
    for line in lines:
        first, second = (half[-1] for half in line["halves_us"])
        apart.append(abs(first - second) / max(first, second))
    return statistics.median(apart) if apart else 0.0


def _pace(reference_us: Sequence[float]) -> list[str]:
    """Why the machine did not keep its pace; nothing where it did."""
    if not reference_us:
        return []
    slower = statistics.quantiles(reference_us, n=10)[-1] / min(reference_us) if len(reference_us) > 1 else 1.0
    return [f"the same layer took up to {slower:.2f} times as long from batch to batch"] if slower > 1 + NOISY else []


def _sound(line: Mapping[str, Any]) -> bool:
    """Whether a line of the agent or the journal is one of a layer, with its times."""
    own = line.get("layer")
    return (
        isinstance(own, dict)
        and isinstance(own.get("name"), str)
        and isinstance(own.get("us"), list)
        and isinstance(own.get("halves_us"), list)
        and bool(own["us"])
        and all(isinstance(us, float) and us > 0 for us in own["us"])
    )


def _name(shape: Shape) -> str:
    return json.dumps(row_of(shape), separators=(",", ":"))


def _shape(name: str) -> Shape | None:
    """The shape of `_name`; None for a file's hash."""
    try:
        return shape_of_row(json.loads(name))
    except (ValueError, TypeError):
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
