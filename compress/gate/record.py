"""What a run or a baseline says of its files: one form for both, so that either can stand on either side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.gate import answers as answering
from compress.gate.answers import Answers
from compress.gate.goals import Goal
from compress.gate.paired import Paired, paired
from compress.gate.resampled import Resampled, resampled
from compress.gate.timing import Rounds
from compress.labels import Task
from compress.targets.agent import sha256
from compress.tasks import RULES, task_of
from compress.written import refuse_pipes

DEVICE = ("board", "cpu", "arch", "features", "emulator")
"""Of the conditions of a benchmark: what makes times of two machines incomparable."""
SETTINGS = ("threads", "cores_used", "batch")
"""How the machine was asked."""
PARENT = "parent"


class BaselineError(CompressError):
    """A baseline or a run that cannot be read, or that cannot be compared with the other."""


@dataclass(frozen=True)
class File:
    """An exported file as it was verified."""

    name: str
    kind: str
    sha256: str
    size_bytes: int
    runtime: str
    version: str
    """Of the runtime that answered the images."""
    accuracy: float
    path: Path | None = None
    """Where it lies; None where a baseline does not keep it."""
    outputs_NK: np.ndarray | None = None
    """What it computed for the sample of images, as it stores it."""


@dataclass(frozen=True)
class Timing:
    """One file timed on one runtime."""

    file: str
    runtime: str
    version: str
    settings: str
    rounds_ms: Rounds
    control_ms: Rounds = ()
    """The same file's second measurement in each round."""
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    place: str
    name: str
    """Of the recipe."""
    recipe_hash: str
    fingerprint: str
    """Of the data."""
    answers: Answers
    files: Mapping[str, File]
    timings: Sequence[Timing]
    shipped: Sequence[str]
    """The files that are judged: those a baseline keeps; of a run, the most compressed of each format."""
    parity: Mapping[str, Any]
    """Of verify: verdict, reason, and the pairs of results it compared. `target`: what the benchmark's machine made of
    each file, beside what the host did."""
    conditions: Mapping[str, Any]
    """Of the benchmark; empty where there was none."""
    made: str
    """When, UTC."""
    sample: Path | None = None
    """The images that `answers.sample` names."""
    goals: Sequence[Goal] = field(default=())
    task: Task = "classification"
    """What the answers are, and so what `accuracy` is: the score of this task."""

    @property
    def images(self) -> int:
        return len(self.answers.labels_N)

    def right(self, file: str) -> np.ndarray:
        """Whether each image was classified rightly, (N,)."""
        right_N: np.ndarray = self.answers.top1[file] == self.answers.labels_N
        return right_N

    def score(self, file: str) -> float:
        """The task's score of a file's answers."""
        return task_of(self.task).score(self.answers.top1[file], self.answers.labels_N)

    def timing(self, file: str) -> Timing | None:
        return next((timing for timing in self.timings if timing.file == file), None)

    def parent_of(self, runtime: str) -> Timing | None:
        """The parent's timing on a runtime."""
        own = [t for t in self.timings if t.runtime == runtime and self.files[t.file].kind == PARENT]
        return own[0] if own else None

    @property
    def machine(self) -> str:
        return str(self.conditions.get("machine", "a machine without a name"))


def read_run(folder: Path) -> Record:
    """A run as its folder says. Raises BaselineError: no run, not verified, files that were changed since."""
    if not (folder / "run.json").is_file():
        raise BaselineError(folder, "not a run: it has no run.json", "give the folder that `compress run` wrote")
    refuse_pipes(folder)
    run = read_json(folder / "run.json")
    with understood(folder / "run.json", "run its recipe again"):
        name, recipe_hash = str(run["name"]), str(run["recipe_hash"])
        fingerprint, labels = str(run["data"]["fingerprint"]), [str(label) for label in run["stages"]]
        made = str(run.get("finished") or run.get("started") or "")
        task = known_task(run["data"])
    stages = {label.partition("-")[2]: folder / "stages" / label for label in labels}
    for wanted in ("export", "verify"):
        if wanted not in stages:
            raise BaselineError(folder, f"has no stage `{wanted}`", f"add `- use: {wanted}` to its recipe and run it")
    manifests = {use: read_json(stages[use] / "manifest.json") for use in ("export", "verify")}
    answers_path = stages["verify"] / answering.NAME
    if not answers_path.is_file():
        raise BaselineError(answers_path, "no such file: verified by an older version", "run its recipe again")
    content = read_json(answers_path)
    with understood(answers_path, "run its recipe again"):
        answers = answering.from_dict(content)
    with understood(stages["verify"] / "manifest.json", "run its recipe again"):
        exported, verified = manifests["export"]["metrics"]["files"], manifests["verify"]["metrics"]
        paths = {name: folder / where for name, where in manifests["export"]["product"]["files"].items()}
        files = {
            file: File(
                name=file,
                kind=str(facts["kind"]),
                sha256=str(exported[file]["sha256"]),
                size_bytes=int(exported[file]["size_bytes"]),
                runtime=str(facts["runtime"]),
                version=str(facts["version"]),
                accuracy=task_of(task).score(answers.top1[file], answers.labels_N),
                path=paths[file],
            )
            for file, facts in verified["files"].items()
        }
        parity = parity_facts(verified)
    for file in files.values():
        unchanged(file, "run its recipe again")
    sample = stages["verify"] / answering.SAMPLE
    timings, conditions, on_target = _benchmark(stages.get("benchmark"), files)
    return Record(
        place=str(folder),
        name=name,
        recipe_hash=recipe_hash,
        fingerprint=fingerprint,
        answers=answers,
        files=files,
        timings=timings,
        shipped=_most_compressed(files),
        parity=parity | {"target": on_target},
        conditions=conditions,
        made=made,
        sample=sample if sample.is_file() else None,
        task=task,
    )


def known_task(data: Mapping[str, Any]) -> Task:
    """What a run or a baseline says of its data's task; older ones knew only classes. Raises ValueError."""
    said = data.get("task", "classification")
    for task in RULES:
        if task == said:
            return task
    raise ValueError(f"no task {said!r}")


def compared(a: Record, b: Record, file: str) -> Paired | Resampled:
    """A file of `b` against that of `a`, on the same images in the same order: the caller has made sure."""
    if b.task == "classification":
        return paired(baseline=a.right(file), candidate=b.right(file))
    return resampled(
        baseline=a.answers.top1[file],
        candidate=b.answers.top1[file],
        labels=b.answers.labels_N,
        score=task_of(b.task).score,
    )


def _most_compressed(files: Mapping[str, File]) -> list[str]:
    """The last file of each format: verify lists the parent first, then the more compressed the later."""
    return list({Path(name).suffix: name for name, file in files.items() if file.kind != PARENT}.values())


def _benchmark(
    folder: Path | None, files: Mapping[str, File]
) -> tuple[list[Timing], dict[str, Any], list[dict[str, Any]]]:
    """Nothing where the run has no such stage, or an emulated machine did it: that one's own time means nothing."""
    if folder is None or not (folder / "samples.json").is_file():
        return [], {}, []
    facts, samples = read_json(folder / "manifest.json"), _read(folder / "samples.json")
    timings: dict[tuple[str, str], dict[str, Any]] = {}
    with understood(folder / "manifest.json", "run its recipe again"):
        on_target = target_facts(facts["metrics"].get("accuracy", []))
    with understood(folder / "samples.json", "run its recipe again"):
        conditions = dict(facts["metrics"]["conditions"])
        for process in samples:
            if process["file"] not in files:
                continue
            found = timings.setdefault(
                (process["file"], process["runtime"]), {"rounds": [], "control": [], "throttled": []}
            )
            found["control" if process["control"] else "rounds"].append(_milliseconds(process["samples_ms"]))
            found["throttled"] += process.get("throttled", [])
            found |= {"version": str(process["version"]), "settings": said(process["settings"])}
        made = [
            Timing(
                file=file,
                runtime=runtime,
                version=found["version"],
                settings=found["settings"],
                rounds_ms=found["rounds"],
                control_ms=found["control"],
                throttled=tuple(dict.fromkeys(found["throttled"])),
            )
            for (file, runtime), found in timings.items()
        ]
        if any(not timing.rounds_ms for timing in made):
            raise ValueError("a file was timed only as a control")
    return made, conditions, on_target


def parity_facts(verified: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of verify's metrics, checked: the verdict, and the int8 results that it compared."""
    words, numbers = ("a", "b", "kind"), ("logits", "differing")
    return {
        "verdict": str(verified["verdict"]),
        "reason": str(verified["reason"]),
        "agreement": [
            {key: str(pair.get(key, "")) for key in words} | {key: int(pair[key]) for key in numbers}
            for pair in verified["agreement"]
            if "differing" in pair
        ],
    }


def target_facts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of a benchmark's comparison of machines, checked."""
    counts, sizes = ("differing", "outputs"), ("max_lsb", "max_difference", "largest_steps")
    return [
        {"file": str(one["file"])}
        | {key: int(one[key]) for key in counts}
        | {key: float(one[key]) for key in sizes if one.get(key) is not None}
        for one in found
    ]


def said(settings: Mapping[str, Any]) -> str:
    """What a runtime was asked for, on one line."""
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))


def unchanged(file: File, way_out: str) -> None:
    """Raises BaselineError where the file on the disk is not the one that was judged."""
    assert file.path is not None
    if not file.path.is_file():
        raise BaselineError(file.path, "no such file", way_out)
    if sha256(file.path) != file.sha256:
        raise BaselineError(file.path, "has changed since it was verified (another SHA-256)", way_out)


@contextmanager
def understood(path: Path, way_out: str) -> Iterator[None]:
    """Turns what is missing or of the wrong kind in a file's content into one BaselineError."""
    try:
        yield
    except KeyError as error:
        raise BaselineError(path, f"has no {error.args[0]}", way_out) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise BaselineError(path, f"does not say what it should ({told})", way_out) from error


def read_json(path: Path, way_out: str = "run its recipe again") -> dict[str, Any]:
    value = _read(path, way_out)
    if not isinstance(value, dict):
        raise BaselineError(path, "holds no JSON object", way_out)
    return value


def _read(path: Path, way_out: str = "run its recipe again") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(path, f"cannot be read: {error.strerror}", way_out) from error
    except ValueError as error:  # not UTF-8, not JSON, or cut short
        raise BaselineError(path, f"not JSON: {str(error).splitlines()[0]}", way_out) from error


def _milliseconds(values: Sequence[Any]) -> list[float]:
    found = [round(float(value), 6) for value in values]
    if not found or not all(0 < value < float("inf") for value in found):
        raise ValueError("samples that are no times")
    return found


def milliseconds(rounds: Any) -> list[list[float]]:
    """Rounds of samples, checked. Raises ValueError or TypeError."""
    return [_milliseconds(samples) for samples in rounds]
