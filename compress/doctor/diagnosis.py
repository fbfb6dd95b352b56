"""One network looked at from every side before it is trained: `examine`, and the `Diagnosis` it returns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from compress import measures
from compress.doctor import risks
from compress.doctor.damage import Ranking, rank
from compress.doctor.kernels import Kernels, kernels
from compress.doctor.program import Program, litert_program, onnxruntime_program
from compress.doctor.sizes import FileSize, file_size
from compress.doctor.switches import groups
from compress.doctor.widths import MOST_LAYERS, Widths, candidates, in_turns, measure_widths, runtimes_of
from compress.errors import CompressError, ModelError
from compress.formats.tflite import to_tflite
from compress.formats.weight_only import float16_weights
from compress.latency.shapes import Placed, place_layers
from compress.product import Batch, Network, Preprocess, Structure
from compress.progress import Progress
from compress.quantization import calibrate, fold_batchnorm, prepare
from compress.quantization.bias_correction import correct_bias
from compress.quantization.calibration import calibrate_weights
from compress.quantization.equalize import find_pairs
from compress.quantization.graph import trace
from compress.quantization.operators import QUANTIZED
from compress.quantization.rewrite import rewritable
from compress.stages.export import to_onnx
from compress.stages.quantize import Quantize
from compress.targets import Runtime, asking, open_model
from compress.targets.local import Local

CPU = torch.device("cpu")
PTQ = Quantize(use="quantize", epochs=0)
"""How a network without a recipe is quantized: the stage's defaults."""
REWRITE_S = 0.4
"""Seconds of timing per file and runtime, for the offer to rewrite activations."""


@dataclass(frozen=True)
class Refusal:
    """What cannot be done with this network, and where."""

    step: str
    """`int8`, `int8.tflite`, `float.onnx` ..."""
    place: str
    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}" + (f"; {self.way_out}" if self.way_out else "")


@dataclass(frozen=True)
class Rewrite:
    """What `quantize.rewrite_activations` would gain, measured here: ms of processor time per image."""

    replaced: dict[str, int]
    """Operators of the network by kind."""
    machine: str
    times_ms: dict[str, dict[str, float]]
    """By runtime: `float`, `int8` as it is, `rewritten` to int8; empty where it was not measured."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    network: str
    input_size: int
    images: str
    """What the batch was, in words."""
    params: int
    macs: int
    risks: tuple[risks.Risk, ...] = ()
    runtimes: tuple[Kernels, ...] = ()
    files: tuple[FileSize, ...] = ()
    rewrite: Rewrite | None = None
    widths: Widths | None = None
    damage: Ranking | None = None
    keepable: tuple[str, ...] = ()
    """Layers that `quantize.keep_float` can keep."""
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing that the recipe asks for is refused."""
        return not self.refusals


def examine(
    module: nn.Module,
    preprocess: Preprocess,
    images_NCHW: Tensor,
    progress: Progress,
    *,
    name: str = "",
    images: str = "one batch",
    stage: Quantize = PTQ,
    formats: Sequence[str] = ("onnx", "tflite"),
    measure: bool = True,
    budget_s: float = 20.0,
    notes: Sequence[str] = (),
) -> Diagnosis:
    """What int8 will do to `module`, which is not changed, with the settings of the recipe's `quantize` stage.

    A step that the network or a format refuses is recorded, and the others go on. `measure` times single layers on
    this machine for at most about `budget_s`.
    """
    return _Examination(module, preprocess, images_NCHW, progress, stage, formats, list(notes)).diagnosis(
        name=name or type(module).__name__, images=images, measure=measure, budget_s=budget_s
    )


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """All of it as plain lists, texts and numbers; an error of zero has a SQNR of null."""
    plain = {"ok": diagnosis.ok} | asdict(diagnosis)
    found: dict[str, Any] = _finite(plain)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Examination:
    """The steps in their order; each leaves what the later ones need."""

    module: nn.Module
    preprocess: Preprocess
    images_NCHW: Tensor
    progress: Progress
    stage: Quantize
    formats: Sequence[str]
    notes: list[str]
    refusals: list[Refusal] = field(default_factory=list)
    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)

    def diagnosis(self, *, name: str, images: str, measure: bool, budget_s: float) -> Diagnosis:
        layers = place_layers(self.module, self.preprocess.size, self.preprocess.channels)
        folded = self._try("float", lambda: fold_batchnorm(self.module))
        prepared = self._try("int8", lambda: self._prepared(self.stage)) if folded is not None else None
        self._export(prepared)
        found = risks.norm_risks(self.module)
        pairs = None
        if folded is not None:
            if not self.stage.equalize:
                pairs = [(pair.first, pair.second) for pair in find_pairs(folded)]
            found += risks.weight_risks(folded, pairs)
        ranking = None
        if prepared is not None:
            found += risks.activation_risks(prepared, self.images_NCHW, pairs)
            if not self.stage.simulated:
                found += risks.bias_risks(prepared)
            ranking = self._rank(prepared)
        rewrite = self._rewrite(measure)
        if measure and (busy := busy_machine()):
            self.notes.append(busy)
        weights, biases = self._counts(folded)
        return Diagnosis(
            network=name,
            input_size=self.preprocess.size,
            images=images,
            params=sum(parameter.numel() for parameter in self.module.parameters()),
            macs=measures.macs(self.module, self.preprocess.size, self.preprocess.channels),
            risks=tuple(sorted(found, key=lambda risk: -risk.severity)),
            runtimes=tuple(kernels(p) for file, p in self.programs.items() if file.startswith("int8.")),
            files=tuple(
                file_size(file, content, (weights, biases), self.programs.get(file))
                for file, content in self.contents.items()
            ),
            rewrite=rewrite,
            widths=self._widths(layers, measure, budget_s),
            damage=ranking,
            keepable=tuple(_keepable(prepared)),
            refusals=tuple(self.refusals),
            notes=tuple(self.notes),
        )

    # -- steps

    def _prepared(self, stage: Quantize) -> fx.GraphModule:
        prepared = prepare(self.module, stage.quantization(), self.preprocess)
        labels_N = torch.zeros(len(self.images_NCHW), dtype=torch.long)
        batch = Batch(self.images_NCHW, labels_N)
        if stage.weight_calibration == "mse":
            calibrate_weights(prepared)
        calibrate(prepared, [batch], CPU, stage.calibration, percentile=stage.percentile)
        if stage.bias_correction:
            correct_bias(prepared, [batch], CPU)
        return prepared

    def _export(self, prepared: fx.GraphModule | None) -> None:
        kinds = ["float", "float16"]
        if prepared is not None and self.stage.simulated:
            self.notes.append("fewer than 8 bits are simulated in training; no int8 file is written")
        elif prepared is not None:
            kinds.append("int8")
        with self.progress.steps("export", len(kinds) * len(self.formats)) as advance:
            for kind in kinds:
                model = self._try(f"{kind}.onnx", lambda kind=kind: self._model(kind, prepared))  # type: ignore[misc]
                if model is None:
                    continue
                self.models[kind] = model
                for file_format in self.formats:
                    file = f"{kind}.{file_format}"
                    self._try(file, lambda file=file, model=model: self._write(file, model))  # type: ignore[misc]
                    advance(file)

    def _model(self, kind: str, prepared: fx.GraphModule | None) -> onnx.ModelProto | None:
        if kind == "float16":  # the float file with other weights: if that one was refused, this has been said
            return float16_weights(self.models["float"]) if "float" in self.models else None
        return self._to_onnx(prepared if kind == "int8" else None, self.stage)

    def _to_onnx(self, prepared: fx.GraphModule | None, stage: Quantize) -> onnx.ModelProto:
        """As the export stage writes it, without metadata."""
        quantize = stage.quantization().model_dump() if prepared is not None else None
        structure = Structure(model={}, num_classes=1, preprocess=self.preprocess, quantize=quantize)
        return to_onnx(Network(prepared if prepared is not None else self.module, structure), {})

    def _write(self, file: str, model: onnx.ModelProto) -> None:
        """The file and what its runtime makes of it; weights in 16 bits are no other program."""
        content = model.SerializeToString() if file.endswith(".onnx") else to_tflite(model, {})
        self.contents[file] = content
        if not file.startswith("float16"):
            self.programs[file] = onnxruntime_program(model) if file.endswith(".onnx") else litert_program(content)

    def _rank(self, prepared: fx.GraphModule) -> Ranking | None:
        with self.progress.steps("damage", len(groups(prepared))) as advance:
            return self._try("damage", lambda: rank(prepared, self.images_NCHW, advance))

    def _widths(self, layers: Sequence[Placed], measure: bool, budget_s: float) -> Widths:
        if not measure:
            return measure_widths(layers, [], "", budget_s=budget_s)
        with self.progress.steps("widths", min(MOST_LAYERS, len(candidates(layers)))) as advance:
            runtimes = list(runtimes_of(self.formats))
            return measure_widths(layers, runtimes, cpu_name(), budget_s=budget_s, advance=advance)

    # -- rewriting activations

    def _rewrite(self, measure: bool) -> Rewrite | None:
        replaced = hard_activations(self.module)
        if not replaced or self.stage.rewrite_activations or self.stage.simulated:
            return None
        times_ms: dict[str, dict[str, float]] = {}
        if measure and "int8" in self.models:
            try:
                with self.progress.steps("rewrite", 1) as advance:
                    times_ms = self._times_of_rewrite()
                    advance("with ReLU6 and sigmoid instead")
            except CompressError as error:
                self.notes.append(f"the rewrite of activations could not be measured: {error}")
        return Rewrite(replaced, cpu_name() if times_ms else "", times_ms)

    def _times_of_rewrite(self) -> dict[str, dict[str, float]]:
        stage = self.stage.model_copy(update={"rewrite_activations": True})
        rewritten = self._to_onnx(self._prepared(stage), stage)
        found: dict[str, dict[str, float]] = {}
        for runtime in runtimes_of(self.formats):
            contents = {kind: self.contents.get(f"{kind}.{_suffix(runtime)}", b"") for kind in ("float", "int8")}
            contents["rewritten"] = (
                rewritten.SerializeToString() if runtime == "onnxruntime" else to_tflite(rewritten, {})
            )
            present = {kind: content for kind, content in contents.items() if content}
            found[runtime] = dict(zip(present, times_ms(list(present.values()), runtime, REWRITE_S), strict=True))
        return found

    # -- questions

    def _counts(self, folded: fx.GraphModule | None) -> tuple[int, int]:
        """Weights of layers, and all other parameters, after BatchNorm is folded."""
        module = folded if folded is not None else self.module
        everything = sum(parameter.numel() for parameter in module.parameters())
        weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, risks.Weighted))
        return weights, everything - weights

    def _try(self, step: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None, and a Refusal on record, where the network or a format does not take part."""
        try:
            return work()
        except ModelError as error:
            refusal = Refusal(step, error.place, error.problem, error.way_out)
        except Exception as error:  # a fault of ours or of a library: the rest of the diagnosis is still worth having
            said = " ".join(str(error).split())[:200]
            refusal = Refusal(step, step, f"failed with {type(error).__name__}: {said}", "please report it")
        if (refusal.place, refusal.problem) in [(known.place, known.problem) for known in self.refusals]:
            return None
        if step.startswith("float16"):  # nobody has asked for it: how large it would be is all it is made for
            self.notes.append(f"no {step}: {refusal}")
        else:
            self.refusals.append(refusal)
        return None


def _keepable(prepared: fx.GraphModule | None) -> list[str]:
    """Layers with integer weights; what computes in float anyway cannot be kept so."""
    layers = prepared.named_modules() if prepared is not None else ()
    return [name for name, layer in layers if isinstance(layer, QUANTIZED)]


def hard_activations(module: nn.Module) -> dict[str, int]:
    """How many hard-swish and hard-sigmoid the network computes; empty where it cannot be traced."""
    try:
        graph_module = trace(module)
    except ModelError:
        return {}
    return dict(Counter(kind for _, kind in rewritable(graph_module)))


def times_ms(contents: Sequence[bytes], runtime: Runtime, seconds: float) -> list[float]:
    """Milliseconds of processor time per inference of files, measured in turns with one thread."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.{_suffix(runtime)}" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        models = [open_model(path, runtime, threads=1) for path in paths]
        return [us / 1000 for us in in_turns(models, sample_s=seconds)]


def cpu_name() -> str:
    """This machine's CPU, as reports name it."""
    probe = _probe()
    return f"{probe['cpu']} ({probe['arch']})"


def busy_machine() -> str:
    """A sentence where more runs on this machine than it has cores; empty where not, or where nobody knows."""
    probe = _probe()
    load, cores = probe["load_1min"], probe["cores_allowed"]
    if not isinstance(load, float) or not isinstance(cores, int) or load <= cores:
        return ""
    return f"the machine is busy (load {load:.1f} on {cores} cores): measured times are longer than on an idle one"


def _probe() -> dict[str, Any]:
    with Local() as machine:
        return asking.probe(machine)


def _suffix(runtime: str) -> str:
    return "onnx" if runtime == "onnxruntime" else "tflite"
