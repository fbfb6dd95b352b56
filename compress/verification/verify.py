"""Whether files compute what they should: against their torch network, each other, or a runtime's plainer kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.errors import CompressError, ModelError, TargetError
from compress.formats.metadata import task_said
from compress.labels import Task
from compress.progress import Progress
from compress.quantization import freeze
from compress.targets.asking import by_name
from compress.tasks import agreement, task_of
from compress.verification import noise
from compress.verification.differences import (
    Pair,
    compare_decisions,
    compare_floats,
    compare_steps,
    finite,
    per_image,
    sqnr_db,
)
from compress.verification.facts import Comparison, Facts, Grid, compare_facts, merged, short
from compress.verification.inputs import Inputs, for_files
from compress.verification.layers import LayerComparison, compare_layers
from compress.verification.mistakes import confidence
from compress.verification.ncnn_file import NcnnFile
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile
from compress.verification.torch_network import FROZEN, TRAINED, FrozenNetwork, UnroundedNetwork
from compress.verification.twin import float_twin

Inspected = OnnxFile | TFLiteFile
"""Files whose insides can be compared."""
File = Inspected | NcnnFile
Predict = Callable[[np.ndarray], np.ndarray]
"""Logits (N, ...) of images (N, 3, H, W)."""

REFERENCE_LSB = 3
"""LiteRT's reference kernels are 1 to 3 LSB off XNNPACK on their own."""
WEIGHT_ONLY = ("float16", "int8_weights")
"""Kinds that store weights in fewer bits and compute in float."""
LAYER_IMAGES = 3
"""Images whose every tensor is compared."""
NOISE_IMAGES = 4
FEW = 3
"""Static differences that the reason spells out."""


@dataclass(frozen=True)
class Tolerances:
    lsb: int = 1
    """Of an int8 output."""
    layer_lsb: int = 1
    """Of a layer of an int8 file on equal inputs."""
    relative: float = 1e-3
    """Of a float output, as a part of the largest."""
    grown: float = 0.01
    """Part of the images, one at least, on which rounding that grows may pass `lsb`: where stored numbers are equal and
    every layer is right on its own."""
    top1: float = 0.02
    """Part of the decisions (classes of images) that change when weights become integers or float16."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and the verdict."""

    inputs: str
    images: int
    tolerances: Tolerances
    files: dict[str, dict[str, Any]]
    """By name: kind, runtime, version, images, and `accuracy`, the task's score, where labels are known."""
    agreement: list[Pair]
    quantization: list[Pair]
    """Float against int8: not judged."""
    static: Comparison | None
    layers: list[LayerComparison]
    noise: noise.Noise | None
    notes: list[str]
    problems: list[str] = field(default_factory=list)
    """Why not PASS, the most telling first."""
    top1: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By file, what a score needs of its outputs: the class of each image, (N,), or in other tasks the outputs, (N, K).
    Two runs are compared by it, image by image. Not part of the report."""
    labels_N: np.ndarray | None = None
    task: Task = "classification"
    confidence: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What softmax gives that class, by file, (N,). Not part of the report."""

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        return "PASS" if self.passed else "FAIL"

    @property
    def reason(self) -> str:
        """One line; empty if all is well."""
        return "; ".join(self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the stage's manifest."""
        return {
            "tolerance_lsb": self.tolerances.lsb,
            "tolerance_layer_lsb": self.tolerances.layer_lsb,
            "tolerance_float": self.tolerances.relative,
            "tolerance_top1": self.tolerances.top1,
            "task": self.task,
            "inputs": self.inputs,
            "images": self.images,
            "verdict": self.verdict,
            "reason": self.reason,
            "files": self.files,
            "agreement": self.agreement,
            "quantization": self.quantization,
            "static": self.static.as_dict() if self.static else None,
            "layers": [comparison.as_dict() for comparison in self.layers],
            "sqnr": self.noise.as_dict() if self.noise else None,
            "notes": self.notes,
        }


def open_file(path: Path, *, name: str = "", threads: int = 1) -> File:
    """The file, checked and ready to run. Raises CompressError for one that no runtime opens."""
    openers: dict[str, type[File]] = {".tflite": TFLiteFile, ".ncnn": NcnnFile}
    return openers.get(path.suffix, OnnxFile)(path, name=name, threads=threads)


def verify_files(
    paths: Sequence[Path],
    *,
    images: Path | None = None,
    limit: int | None = None,
    threads: int = 1,
    tolerances: Tolerances | None = None,
    seed: int = 0,
    progress: Progress,
) -> Verification:
    """Files of one network, foreign ones included, compared with each other; one file alone, with plainer kernels.

    `images` is a folder or zip archive, or a .npy of real-valued images; without it, inputs are synthetic.
    Raises CompressError for files that are no networks or not of one network, and for images that do not fit.
    """
    named = by_name(paths)
    try:
        with np.errstate(all="ignore"):  # a verdict says what is not finite, no warning beside it
            return _verified(named, images, limit, threads, tolerances or Tolerances(), seed, progress)
    except CompressError:
        raise
    except Exception as error:  # files that a runtime opens and whose parts contradict each other: no kind is missing
        problem = "has parts that contradict each other, or needs more memory than there is"
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ModelError(", ".join(named), f"{problem} ({said})", "export it again") from error


def _verified(
    named: Mapping[str, Path],
    images: Path | None,
    limit: int | None,
    threads: int,
    tolerances: Tolerances,
    seed: int,
    progress: Progress,
) -> Verification:
    files = _opened(named, threads)
    outputs = int(np.prod(next(iter(files.values())).model.outputs[0].shape))
    inputs = for_files(list(files.values()), images, limit, seed, outputs)
    kinds: dict[str, list[str]] = {}
    for name, file in files.items():
        kinds.setdefault(file.metadata.get("compress.kind") or file.storage, []).append(name)
    for names in kinds.values():
        if len(names) == 1 and isinstance(files[names[0]], NcnnFile):
            raise ModelError(
                names[0], "nothing to compare it with", "give the .onnx or .tflite of the same kind as well"
            )
    said = [task_said(file.metadata) for file in files.values()]
    task: Task = next((task for task in said if task != "classification"), "classification")
    return _Verifier(files, kinds, inputs, tolerances, progress, task=task).verify()


def verify_product(
    files: Mapping[str, Path],
    references: Mapping[str, nn.Module | None],
    inputs: Inputs,
    *,
    threads: int = 1,
    tolerances: Tolerances | None = None,
    progress: Progress,
    task: Task = "classification",
) -> Verification:
    """Exported files (`int8.onnx`) compared with the torch networks they were written from, and with each other.

    `references` has the network of each kind (`parent`, `float`, `int8` ...); that of `int8` is fake-quantized.
    """
    prepared = references.get("int8") if any(Path(name).stem == "int8" for name in files) else None
    assert prepared is None or isinstance(prepared, fx.GraphModule)
    frozen = None if prepared is None else FrozenNetwork(freeze(prepared))
    opened = _opened(files, threads, frozen)
    kinds: dict[str, list[str]] = {}
    for name in opened:
        kinds.setdefault(Path(name).stem, []).append(name)
    given = tolerances or Tolerances()
    return _Verifier(opened, kinds, inputs, given, progress, references, prepared, frozen, task).verify()


def _opened(files: Mapping[str, Path], threads: int, frozen: FrozenNetwork | None = None) -> dict[str, File]:
    opened: dict[str, File] = {}
    refused: tuple[str, Path, TargetError] | None = None
    for name, path in files.items():
        try:
            opened[name] = open_file(path, name=name, threads=threads)
        except TargetError as error:
            refused = refused or (name, path, error)
    if refused is not None:
        facts = [] if frozen is None else [frozen.facts]
        raise _refusal(
            *refused,
            [*facts, *(file.facts for file in opened.values() if not isinstance(file, NcnnFile) and file.quantized)],
        )
    _one_network(opened)
    return opened


def _refusal(name: str, path: Path, error: TargetError, others: Sequence[Facts]) -> CompressError:
    """Why the runtime refuses the file; where its kernels do, the stored numbers may say which layer is to blame."""
    if path.suffix != ".tflite" or "node" not in error.problem:
        return error
    try:
        found = compare_facts([*others, TFLiteFile(path, name=name, runs=False).facts])
    except Exception:  # bytes that LiteRT did not even read
        return error
    if not found.problems:
        return error
    return ModelError(name, f"{found.problems[0].text.removeprefix(f'{name}: ')}, and so {error.problem}")


def _one_network(files: Mapping[str, File]) -> None:
    """Raises ModelError where the files cannot be forms of one network."""
    first, *others = files.values()
    for other in others:
        for what, ours, theirs in (
            ("inputs", first.model.input.shape, other.model.input.shape),
            ("outputs", first.model.outputs[0].shape, other.model.outputs[0].shape),
        ):
            if sorted(ours) != sorted(theirs):
                raise ModelError(
                    other.name,
                    f"has {what} of shape {theirs}, {first.name} of {ours}",
                    "compare files of one network",
                )


class _Plainer:
    """The same file in plainer arithmetic: the only partner that a lone file has."""

    def __init__(self, file: Inspected, tolerance_lsb: int) -> None:
        self.file = file
        # Without optimization, ONNX Runtime computes in float between the grids: no more than a rounding off.
        self.tolerance_lsb = max(tolerance_lsb, REFERENCE_LSB) if isinstance(file, TFLiteFile) else tolerance_lsb

    @property
    def name(self) -> str:
        how = "reference kernels" if isinstance(self.file, TFLiteFile) else "unoptimized graph"
        return f"{self.file.name}, {how}"

    def steps(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(self.file, TFLiteFile):
            return self.file.steps(images, "reference")
        return self.file.unfused_steps(images)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.file.predict_plainly(images)


class _Verifier:
    """The comparison in progress."""

    def __init__(
        self,
        files: Mapping[str, File],
        kinds: Mapping[str, list[str]],
        inputs: Inputs,
        tolerances: Tolerances,
        progress: Progress,
        references: Mapping[str, nn.Module | None] | None = None,
        prepared: fx.GraphModule | None = None,
        frozen: FrozenNetwork | None = None,
        task: Task = "classification",
    ) -> None:
        self.rules = task_of(task)
        self.files, self.kinds, self.inputs, self.tolerances = files, kinds, inputs, tolerances
        self.progress, self.references = progress, references
        self.prepared, self.frozen = prepared, frozen
        self.inspected = {name: file for name, file in files.items() if not isinstance(file, NcnnFile)}
        self.int8 = [name for name, file in files.items() if file.quantized]
        self.lone = {
            names[0]: _Plainer(self.inspected[names[0]], tolerances.layer_lsb)
            for names in kinds.values()
            if len(names) == 1 and references is None
        }
        self.predictors = self._predictors()
        self.logits: dict[str, np.ndarray] = {}
        self.labels: np.ndarray | None = None

    def verify(self) -> Verification:
        self._predict()
        agreement, quantization = self._agreement(), self._quantization()
        static = self._static()
        notes = list(self.inputs.notes)
        layers = self._layers(agreement, notes)
        self._explain(agreement, layers, static, notes)
        notes += [note for file in self.files.values() for note in file.notes]
        notes += [
            f"{name} has {len(file.model.outputs)} outputs: the first is compared"
            for name, file in self.files.items()
            if len(file.model.outputs) > 1
        ]
        try:
            noise_found = self._noise(notes)
        except ModelError as error:
            noise_found = None
            notes.append(f"no SQNR per layer: {error.problem}")
        for name in self.int8:
            if name in self.lone:
                notes.append(
                    f"{name} has no partner and is compared with plainer kernels of its own runtime, which round"
                    f" otherwise (up to {self.lone[name].tolerance_lsb} LSB per layer, more at the output): its layers"
                    " are judged, its outputs are not"
                )
        grown = [p for p in agreement if p["verdict"] == "FAIL" and "max_lsb" in p]
        if grown and not any(c.first_wrong for c in layers) and not (static and static.problems):
            worst = max(pair["max_lsb"] for pair in grown)
            same = min(pair["top1_agreement"] for pair in grown)
            notes.append(
                f"stored numbers are equal and no layer is wrong: outputs differ by rounding alone, in"
                f" {self.rules.differing.format(f'{1 - same:.1%}')}, and `tolerance_lsb: {worst}` accepts that"
            )
        return Verification(
            inputs=self.inputs.about,
            images=self.inputs.count,
            tolerances=self.tolerances,
            files=self._files(),
            agreement=agreement,
            quantization=quantization,
            static=static,
            layers=layers,
            noise=noise_found,
            notes=list(dict.fromkeys(notes)),
            problems=self._problems(agreement, static, layers),
            top1={name: self.rules.kept(self.logits[name]) for name in self.files},
            labels_N=self.labels,
            task=self.rules.name,
            confidence={name: confidence(self.logits[name]) for name in self.files},
        )

    # -- outputs

    def _predictors(self) -> dict[str, Predict]:
        """Who computes logits: the networks first, then the files."""
        found: dict[str, Predict] = {}
        for kind in self.kinds:
            if kind == "int8" and self.frozen is not None and self.prepared is not None:
                found[TRAINED], found[FROZEN] = _in_torch(self.prepared), self.frozen.predict
            elif self.references and (module := self.references.get(kind)) is not None:
                found[f"torch {kind}"] = _in_torch(module)
        exact = self._float_reference()
        if self.references and exact and any(kind in WEIGHT_ONLY for kind in self.kinds):
            module = self.references[exact.removeprefix("torch ")]
            assert module is not None
            found[exact] = _in_torch(module)
        found |= {plainer.name: plainer.predict for plainer in self.lone.values()}
        return found | {name: file.predict for name, file in self.files.items()}

    def _float_reference(self) -> str | None:
        """Who has the float logits that rounded weights are compared with."""
        if self.references is not None:
            kind = next((kind for kind in ("float", "parent") if self.references.get(kind) is not None), None)
            return f"torch {kind}" if kind else None
        for kind in ("float", "parent"):
            if self.kinds.get(kind):
                return self.kinds[kind][0]
        return None

    def _predict(self) -> None:
        logits: dict[str, list[np.ndarray]] = {name: [] for name in self.predictors}
        labels: list[np.ndarray] = []
        seen, total = 0, self.inputs.count
        with self.progress.steps("verify", -(-total // 32)) as advance:
            for images, own in self.inputs.batches():
                for name, predict in self.predictors.items():
                    logits[name].append(predict(images))
                if own is not None:
                    labels.append(own)
                seen += len(images)
                advance(f"{seen}/{total} images")
        self.logits = {name: np.concatenate(parts) for name, parts in logits.items()}
        self.logits = {name: rows.reshape(len(rows), -1) for name, rows in self.logits.items()}
        self.labels = np.concatenate(labels) if labels else None

    def _files(self) -> dict[str, dict[str, Any]]:
        found = {}
        for kind, names in self.kinds.items():
            for name in names:
                file = self.files[name]
                facts: dict[str, Any] = {
                    "kind": kind,
                    "runtime": file.model.runtime,
                    "version": file.model.version,
                    "images": self.inputs.count,
                }
                if self.labels is not None:
                    facts["accuracy"] = self.rules.score(self.rules.kept(self.logits[name]), self.labels)
                found[name] = facts
        return {name: found[name] for name in self.files}

    def _agreement(self) -> list[Pair]:
        """One entry per pair of a float kind, per pair of int8 results, and for what rounding weights changed."""
        found: list[Pair] = []
        logits, tolerances = self.logits, self.tolerances
        exact = self._float_reference()
        for kind, files in self.kinds.items():
            names = [name for name in (f"torch {kind}",) if name in logits] + files
            names = [self.lone[name].name for name in files if name in self.lone] + names
            if any(name in self.int8 for name in files):
                names = ([FROZEN] if self.frozen is not None else []) + names
                lsb = self._lsb(names)
                if self.frozen is not None:
                    trained = compare_decisions(
                        TRAINED,
                        FROZEN,
                        np.rint(logits[TRAINED] / lsb),
                        np.rint(logits[FROZEN] / lsb),
                        tolerances.top1,
                        self.rules,
                    )
                    found.append(trained | {"kind": kind})
                for a, b in combinations(names, 2):
                    steps_a, steps_b = _steps(logits[a], lsb), _steps(logits[b], lsb)
                    pair = compare_steps(a, b, steps_a, steps_b, tolerances.lsb, self.rules)
                    pair |= {"kind": kind, "lsb": lsb}
                    if b in self.lone:  # other kernels of one file are no second opinion on its outputs
                        pair |= {"verdict": "PASS", "reason": ""}
                    found.append(pair)
                continue
            for a, b in combinations(names, 2):
                pair = compare_floats(a, b, logits[a], logits[b], tolerances.relative, self.rules)
                found.append(pair | {"kind": kind})
            if kind in WEIGHT_ONLY and exact is not None:
                for name in files:
                    pair = compare_decisions(exact, name, logits[exact], logits[name], tolerances.top1, self.rules)
                    if self.inputs.synthetic:
                        pair |= {"verdict": "PASS", "reason": ""}
                    found.append(pair | {"kind": kind})
        return found

    def _lsb(self, names: Sequence[str]) -> float:
        """The step of the output's grid; of 255 steps over the logits' range where the last layers are float."""
        grids: list[Grid | None] = [self.frozen.output_grid] if self.frozen is not None else []
        grids += [self.files[name].output_grid for name in names if name in self.files]
        if grids[0] is not None:
            return float(grids[0].scale)
        logits = self.logits[names[0]]
        return max(float(np.ptp(logits)) / 255, 1e-30)

    def _quantization(self) -> list[Pair]:
        """Each int8 result beside a float one: how much of it is left. Not judged."""
        candidates = ["torch float", "torch parent", *self.kinds.get("float", []), *self.kinds.get("parent", [])]
        exact = next((name for name in candidates if name in self.logits), None)
        if exact is None:
            return []
        found = []
        for name in self.int8:
            peers = [n for n in self.kinds.get("float", []) if Path(n).suffix == Path(name).suffix]
            other = exact if exact.startswith("torch ") else next(iter(peers), exact)
            found.append(
                {
                    "a": other,
                    "b": name,
                    "top1_agreement": agreement(self.rules, self.logits[other], self.logits[name]),
                    "sqnr_db": finite(sqnr_db(self.logits[other], self.logits[name])),
                }
            )
        return found

    # -- inside the int8 networks

    def _static(self) -> Comparison | None:
        found = []
        for files in self.kinds.values():
            inspected = [self.inspected[name] for name in files if name in self.inspected]
            stored = [file.facts for file in inspected if file.storage in ("int8", "int8_weights")]
            if stored and self.frozen is not None and any(name in self.int8 for name in files):
                stored = [self.frozen.facts, *stored]
            if stored:
                found.append(compare_facts(stored))
        return merged(found) if found else None

    def _layers(self, agreement: Sequence[Pair], notes: list[str]) -> list[LayerComparison]:
        if not self.int8:
            return []
        images = self.inputs.pick(self._worst(agreement))
        base: Any
        tolerance = self.tolerances.layer_lsb
        if self.frozen is not None:
            base, others = self.frozen, self.int8
        elif self.int8[0] in self.lone:
            base, others = self.lone[self.int8[0]], self.int8[:1]
            tolerance = base.tolerance_lsb
        else:
            base, others = self.files[self.int8[0]], self.int8[1:]
        found = []
        with self.progress.steps("layers", len(others)) as advance:
            known: dict[str, np.ndarray] | None = None
            for name in others:
                try:
                    known = base.steps(images) if known is None else known
                    found.append(
                        compare_layers(base, self.inspected[name], images, tolerance_lsb=tolerance, known=known)
                    )
                except ModelError as error:
                    notes.append(f"{name}: layers are not compared: {error.problem}")
                advance(name)
        for comparison in found:
            if not comparison.layers:
                notes.append(f"{comparison.b}: no layer is compared, for no tensor has a name that {comparison.a} has")
        return [comparison for comparison in found if comparison.layers]

    def _worst(self, agreement: Sequence[Pair]) -> list[int]:
        """The images on which int8 results lie furthest apart, worst first; the first ones where none does."""
        apart = np.zeros(self.inputs.count)
        for pair in agreement:
            if "max_lsb" in pair:
                apart += per_image(np.abs(self.logits[pair["a"]] - self.logits[pair["b"]]))
        return np.argsort(-apart, kind="stable")[:LAYER_IMAGES].tolist()

    def _explain(
        self,
        agreement: Sequence[Pair],
        layers: Sequence[LayerComparison],
        static: Comparison | None,
        notes: list[str],
    ) -> None:
        """Adds to each failed int8 pair which layer it began at; accepts what grew from right layers on few images."""
        few = max(1, int(self.tolerances.grown * self.inputs.count)) if self.tolerances.grown else 0
        for pair in agreement:
            if pair["verdict"] == "PASS" or "max_lsb" not in pair:
                continue
            own = [c for c in layers if {c.a, c.b} & {pair["a"], pair["b"]}]
            exactly = [c for c in own if {c.a, c.b} == {pair["a"], pair["b"]}]
            own.sort(key=lambda c: (c.first_wrong is None, c.first_differing is None))
            for comparison in (exactly or own)[:1]:
                pair["reason"] += f", {comparison.sentence()}"
                pair["layers"] = [
                    {key: getattr(layer, key) for key in ("layer", "values", "differing", "max_lsb", "alone_lsb")}
                    for layer in comparison.layers
                    if layer.differing
                ]
            compared = {name for comparison in own for name in (comparison.a, comparison.b)}
            right = {pair["a"], pair["b"]} <= compared and not any(c.first_wrong for c in own)
            if right and static is not None and not static.problems and pair["images_beyond"] <= few:
                notes.append(
                    f"{pair['a']} and {pair['b']} differ by {pair['max_lsb']} LSB on {pair['images_beyond']} of"
                    f" {self.inputs.count} images: stored numbers are equal and every layer is right on its own, so it"
                    f" is rounding that grows, accepted on up to {few}"
                )
                pair["verdict"], pair["reason"] = "PASS", ""

    def _problems(
        self, agreement: Sequence[Pair], static: Comparison | None, layers: Sequence[LayerComparison]
    ) -> list[str]:
        found = []
        if static is not None and static.problems:
            found += [problem.text for problem in static.problems[:FEW]]
            if len(static.problems) > FEW:
                found.append(f"{len(static.problems) - FEW} more such differences")
        failed = [pair["reason"] for pair in agreement if pair["verdict"] == "FAIL"]
        for comparison in layers:
            wrong = comparison.first_wrong
            if wrong is not None and not any(short(wrong.layer) in reason for reason in failed):
                found.append(
                    f"{comparison.b}: layer {short(wrong.layer)} computes up to {wrong.alone_lsb} LSB off"
                    f" {comparison.a} on equal inputs, allowed {comparison.tolerance_lsb}"
                )
        return found + failed

    # -- what int8 costs

    def _noise(self, notes: list[str]) -> noise.Noise | None:
        if not self.int8:
            return None
        images = self.inputs.pick(range(min(NOISE_IMAGES, self.inputs.count)))
        if self.frozen is not None and self.prepared is not None:
            unrounded = UnroundedNetwork(self.prepared, self.frozen.frozen)
            return noise.measure(unrounded, self.inspected[self.int8[0]], images)
        rounded = self.inspected[self.int8[0]]
        partners = [file for name, file in self.inspected.items() if name not in self.int8 and file.storage == "float"]
        tensors = list(rounded.grids)
        matching = {file.name: len(noise.pairs(file, rounded, tensors)) for file in partners}
        partners.sort(key=lambda file: (-matching[file.name], file.path.suffix))
        if partners and 2 * matching[partners[0].name] >= len(tensors):
            return noise.measure(partners[0], rounded, images)
        if partners:
            notes.append(
                f"{partners[0].name} names {matching[partners[0].name]} of {rounded.name}'s {len(tensors)} quantized"
                " tensors: SQNR per layer is measured against a float twin, which has the int8 file's own weights"
            )
        with tempfile.TemporaryDirectory() as folder:
            try:
                twin = float_twin(rounded, Path(folder))
            except CompressError as error:
                notes.append(f"no SQNR per layer: {rounded.name} has no float twin ({error.problem})")
                return None
            return noise.measure(twin, rounded, images)


def _steps(logits: np.ndarray, lsb: float) -> np.ndarray:
    """Whole numbers of the output's grid; what is no number becomes a huge one."""
    steps = np.rint(logits.astype(np.float64) / lsb)
    return np.nan_to_num(steps, nan=2.0**31, posinf=2.0**31, neginf=-(2.0**31)).astype(np.int64)


def _in_torch(module: nn.Module) -> Predict:
    def predict(images_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = module.eval()(torch.from_numpy(images_NCHW)).numpy()
        return result

    return predict
