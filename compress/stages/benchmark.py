"""How fast the exported files run on the target, each against the parent, and whether they compute the same there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compress.product import Data, Product, Run
from compress.settings import Settings
from compress.stages.export import KINDS
from compress.targets import Comparison, Machine, Measuring, Runtime, asking, is_emulated, open_target
from compress.targets.agent import SUFFIXES, UNAVAILABLE, sha256
from compress.targets.asking import RUNTIMES, Answers
from compress.targets.journal import MACHINE
from compress.targets.outputs import compared
from compress.written import write_json

ACCURACY_IMAGES = 64
"""On a board: a class more or less is seen in accuracy only on many, a wrong kernel on few."""
EMULATED_IMAGES = 8
"""Emulated, a network takes some hundred times as long."""
MEASURING = "measuring"
"""Beside a run's stages: what a benchmark that was cut off has found."""


class Benchmark(Settings):
    """Times files on `local` and on a board; an emulated target says what they compute and counts instructions."""

    use: Literal["benchmark"]
    runtimes: tuple[Runtime, ...] = Field(default=RUNTIMES, min_length=1)
    """Measured where the product has files for them."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """`auto`: as many as the fastest cluster of cores has."""
    cores: Literal["auto", "any"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = "auto"
    """What the processes may run on. `auto`: the fastest cores of a machine with several kinds. Or CPU numbers."""
    rounds: int = Field(default=4, ge=1)
    """Fresh processes per file, interleaved: parent, the others, parent again."""
    runs: int = Field(default=50, ge=1)
    """Least samples of each process."""
    min_s: float = Field(default=0.0, ge=0)
    """Least seconds of sampling of each process."""
    warmup_s: float = Field(default=0.2, ge=0)
    """Seconds of each process before its first sample; long enough for the clock to settle."""
    tolerance: float = Field(default=0.05, gt=0)
    """How far the parent against itself may be from 1 before a comparison is called NOISY."""
    accuracy_images: int | None = Field(default=None, ge=0)
    """Evaluation images that every file computes on the target and here with the same runtime; the outputs are compared
    bit for bit. Default 64, emulated 8, and 0 on `local`: there the same runtime would be compared with itself."""
    sustained_minutes: float = Field(default=0.0, ge=0, le=240)
    """The most compressed file of each runtime once more without a pause: what the machine does when it is hot."""

    def apply(self, product: Product, run: Run) -> Product:
        """What is measured before a fault is kept in `measuring/` beside the stages, and the next attempt goes on with
        it; a sustained run that is cut begins anew, because the machine has cooled since."""
        files = _in_order(product.files)
        if is_emulated(run.target):
            return dataclasses.replace(product, metrics=self._examined(files, run))
        with open_target(run.target, run.progress, setup=run.setup, runtimes=self.runtimes) as machine:
            kept = Kept.open(run, machine, [self.model_dump(mode="json"), *map(sha256, files.values())])
            compared = kept.part("comparison", lambda: self._compared(files, machine, kept, run))
            sample = kept.part("accuracy", lambda: self._sampled(files, machine, run))
            sustained = [
                kept.part(f"sustained {name}", lambda name=name: self._sustained(name, files[name], machine, run))  # type: ignore[misc]
                for name in self._most_compressed(files)
            ]
        for note in [*self._unread(files), *_notes(compared), *map(difference, sample), *map(_slowdown, sustained)]:
            if note:
                run.progress.note(note)
        samples = compared.pop("samples")
        (run.folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
        kept.forget()
        return dataclasses.replace(product, metrics=compared | {"accuracy": sample, "sustained": sustained})

    def _compared(self, files: Mapping[str, Path], machine: Machine, kept: Kept, run: Run) -> dict[str, Any]:
        """`Comparison` as JSON, its rows with the seconds of sampling, its conditions with those before and after."""
        options = self.model_dump(exclude={"use", "cores", "accuracy_images", "sustained_minutes"})
        measuring = Measuring(**options, cores=self._cores, seed=run.seed)
        with run.progress.steps("benchmark", len(measuring.slots(files))) as advance:
            comparison = asking.compare(
                machine,
                files,
                measuring,
                journal=kept.path.with_suffix(".jsonl"),
                on_process=advance,
                on_note=run.progress.note,
            )
        rows = [row | {"sampled_s": _sampled_s(row, comparison)} for row in comparison.rows]
        return dataclasses.asdict(comparison) | {"rows": rows, "conditions": _conditions(comparison)}

    def _sampled(self, files: Mapping[str, Path], machine: Machine, run: Run) -> list[dict[str, Any]]:
        """Per file what it computes on the machine, compared with what the same runtime makes of it here."""
        count = self.accuracy_images
        if count is None:
            count = 0 if machine.name == "local" else ACCURACY_IMAGES
        chosen = self._readable(files) if count else {}
        if not chosen:
            return []
        images_NCHW, labels = sample_images(run.data, count, run.seed)
        # A board counts right classes; in other tasks outputs are compared and nothing is counted.
        labels_N = labels if run.data.task == "classification" else None
        found = []
        with run.progress.steps("accuracy", len(chosen)) as advance, open_target("local", run.progress) as host:
            for name, path in chosen.items():
                there = asking.answers(machine, path, images_NCHW, labels_N)
                here = asking.answers(host, path, images_NCHW, labels_N)
                found.append({"file": name, **agreement(there, here, int8=Path(name).stem == "int8")})
                advance(f"{name} {found[-1]['differing']} of {found[-1]['outputs']} outputs differ")
        return found

    def _sustained(self, name: str, path: Path, machine: Machine, run: Run) -> dict[str, Any]:
        every_s = min(5.0, 60 * self.sustained_minutes / 12)
        with run.progress.steps(f"sustained {name}", max(1, int(60 * self.sustained_minutes / every_s))) as advance:
            answer = asking.sustain(
                machine,
                path,
                minutes=self.sustained_minutes,
                every_s=every_s,
                threads=self.threads,
                cores=self._cores,
                on_point=lambda point: advance(f"{point['p50_ms']:.2f} ms"),
            )
        return answer | {"file": name}

    def _examined(self, files: Mapping[str, Path], run: Run) -> dict[str, Any]:
        """What the emulated cores compute, and how many instructions they take for it; nothing is timed."""
        from compress.targets import emulated

        count = EMULATED_IMAGES if self.accuracy_images is None else self.accuracy_images
        images_NCHW = sample_images(run.data, count, run.seed)[0] if count else None
        cpus = emulated.parse(run.target)
        found = emulated.examine(files, images_NCHW, cpus=cpus, runtimes=self.runtimes, progress=run.progress)
        for note in [*self._unread(files), *map(difference, found["parity"])]:
            if note:
                run.progress.note(note)
        return found | {"rows": [], "pairs": []}

    def _readable(self, files: Mapping[str, Path]) -> dict[str, Path]:
        return {name: path for name, path in files.items() if SUFFIXES.get(path.suffix) in self.runtimes}

    def _unread(self, files: Mapping[str, Path]) -> list[str]:
        """A sentence per runtime that has nothing to measure."""
        read = {SUFFIXES[path.suffix] for path in self._readable(files).values()}
        return [f"{runtime}: no file of its kind, not measured" for runtime in self.runtimes if runtime not in read]

    def _most_compressed(self, files: Mapping[str, Path]) -> list[str]:
        """The last file of each runtime; none without minutes to sustain."""
        readable = self._readable(files) if self.sustained_minutes else {}
        return list({path.suffix: name for name, path in readable.items()}.values())

    @property
    def _cores(self) -> str:
        return self.cores if isinstance(self.cores, str) else ",".join(map(str, self.cores))


def agreement(there: Answers, here: Answers, *, int8: bool = False) -> dict[str, Any]:
    """How many outputs of a file differ between two machines, and by how much: in LSB where they are integers."""
    found = compared(there.outputs_NK, here.outputs_NK, int8=int8)
    return {
        "runtime": there.facts["runtime"],
        "images": there.images,
        "correct": there.correct,
        "accuracy": None if there.correct is None else there.correct / there.images,
        "host_accuracy": None if here.correct is None else here.correct / here.images,
        **found,
        "equal": found["differing"] == 0,
        "board_version": there.facts["version"],
        "host_version": here.facts["version"],
        "host_sha256": here.facts["outputs_sha256"],
    }


def difference(sample: Mapping[str, Any]) -> str:
    """A sentence on integers that the target computes otherwise than this machine; empty where it does not.

    Float sums are rounded in another order by another CPU's kernels: no fault, and in the figures all the same.
    """
    if not sample["differing"] or (sample["max_lsb"] is None and Path(sample["file"]).stem != "int8"):
        return ""
    largest = f"{sample['max_lsb']} LSB" if sample["max_lsb"] is not None else f"{sample['largest_steps']:.3g} LSB"
    if "cpu" in sample:
        place = f"{sample['runtime']} on an emulated {sample['cpu']}"
    else:
        versions = sample["board_version"], sample["host_version"]
        runtimes = (
            f"{versions[0]} there, {versions[1]} here" if versions[0] != versions[1] else f"{versions[0]} on both"
        )
        place = f"{sample['runtime']} {runtimes}"
    return (
        f"{sample['file']}: {sample['differing']} of {sample['outputs']} outputs differ from those computed here, by at"
        f" most {largest} ({place})"
    )


def sample_images(data: Data, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation images (N, C, H, W), float32 as the network reads them, and their labels, spread over classes."""
    batches = list(data.batches("evaluation", batch_size=64, limit=count, seed=seed))
    images_NCHW = np.concatenate([batch.images_NCHW.numpy() for batch in batches])
    return np.ascontiguousarray(images_NCHW), np.concatenate([batch.labels_N.numpy() for batch in batches])


@dataclass
class Kept:
    """Parts of the stage that are finished, in a file beside the stages: a fault in a later part does not lose them.

    A file of another attempt counts only where files, settings and machine are the same.
    """

    path: Path
    asked: str
    note: Callable[[str], None]
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Run, machine: Machine, settings: list[Any]) -> Kept:
        probed = asking.probe(machine)
        known = {key: probed.get(key) for key in MACHINE}
        asked = json.dumps([settings, machine.name, run.seed, run.data.fingerprint, known])
        path = run.folder.parent.parent / MEASURING / f"{run.stage or 'benchmark'}.json"
        kept = cls(path, hashlib.sha256(asked.encode()).hexdigest(), run.progress.note)
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return kept
        if isinstance(before, dict) and before.get("asked") == kept.asked:
            kept.parts = before["parts"]
        return kept

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or returned in the earlier attempt."""
        if name in self.parts:
            self.note(f"{name} was measured on {self.parts[name]['measured']}")
            return self.parts[name]["found"]
        self.parts[name] = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "found": measure()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"asked": self.asked, "parts": self.parts})
        return self.parts[name]["found"]

    def forget(self) -> None:
        """Removes the file, and its folder where no other stage has one: all of it is in the stage's folder now."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def _in_order(files: Mapping[str, Path]) -> dict[str, Path]:
    """Parent first: it is the baseline."""
    rank: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
    return {name: files[name] for name in sorted(files, key=lambda name: rank.get(Path(name).stem, len(KINDS)))}


def _sampled_s(row: Mapping[str, Any], comparison: Comparison) -> float:
    """Seconds of the samples that a row is made of."""
    own = [
        sample["samples_ms"]
        for sample in comparison.samples
        if (sample["file"], sample["runtime"], sample["control"]) == (row["file"], row["runtime"], False)
    ]
    return sum(map(sum, own)) / 1000


def _conditions(comparison: Comparison) -> dict[str, Any]:
    """The machine before the first process, after the last and over all of them, beside what else is said of it."""
    samples = comparison.samples
    states = [sample[when] for sample in samples for when in ("before", "after")]
    during = {
        "current_mhz": _ends([sample["mhz"] for sample in samples]),
        "temperature_c": _ends([state["temperature_c"] for state in states]),
    }
    found = {name: ends for name, ends in during.items() if ends}
    return {**comparison.conditions, "before": samples[0]["before"], "during": found, "after": samples[-1]["after"]}


def _ends(values: list[Any]) -> list[float]:
    """Least and most of what the machine told; empty where it told nothing."""
    known = [value for value in values if value != UNAVAILABLE]
    return [min(known), max(known)] if known else []


def _notes(compared: Mapping[str, Any]) -> list[str]:
    noisy = [
        f"{pair['candidate']} on {pair['runtime']}: NOISY, {'; '.join(pair['reasons'])}"
        for pair in compared["pairs"]
        if pair["verdict"] == "NOISY"
    ]
    return [*compared["conditions"]["notes"], *noisy]


def _slowdown(sustained: Mapping[str, Any]) -> str:
    """A sentence on a machine that slowed down when it was hot; empty where it did not."""
    if sustained["verdict"] == "OK":
        return ""
    reasons = "".join(f"; {reason}" for reason in sustained["throttled"])
    slowdown = f"{sustained['slowdown']:.2f} times as long in the last minute as in the first"
    return f"{sustained['file']}: {sustained['verdict']}, {slowdown}{reasons}"
