"""What is asked before anything trains: a refusal after an hour helps nobody."""

from __future__ import annotations

from pathlib import Path

import torch

from compress import processes
from compress.data import open_data
from compress.errors import ModelError, RecipeError
from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.models import description, label_notes, started
from compress.pipeline.notes import Notes
from compress.product import Data, Network, Preprocess, Structure
from compress.progress import Progress
from compress.quantization import freeze, prepare
from compress.recipe import Recipe
from compress.recipe.task import task_mistakes
from compress.recipe.words import dotted
from compress.stages import StageSettings
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.teaching import Distillation
from compress.written import read_json


def opened_data(recipe: Recipe, folder: Path, notes: Notes, base: Path) -> Data:
    """The data; the first process looks at every image, the others believe it."""
    opened: list[Data] = []

    def first() -> str:
        before = read_json(folder / "run.json").get("data")
        checked = before.get("fingerprint") if isinstance(before, dict) else None
        opened.append(open_data(recipe.data, recipe.preprocess, notes, base, checked))
        return opened[0].fingerprint

    fingerprint = processes.shared(first)
    return opened[0] if opened else open_data(recipe.data, recipe.preprocess, notes, base, fingerprint)


def first_network(recipe: Recipe, data: Data, progress: Progress, base: Path) -> Network:
    """The recipe's network with its weights, as the stages find it."""
    torch.manual_seed(recipe.seed)
    module = started(recipe.model, len(data.labels), recipe.preprocess, progress, base)
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            given = getattr(recipe.model, "weights", None)
            place = f"weights {given}" if given else f"model {recipe.model.use}"
            raise ModelError(place, f"`{name}` holds NaN or inf", "start from other weights")
    for note in label_notes(recipe.model, data.labels, base):
        progress.note(note)
    structure = Structure(
        model=description(recipe.model, base, progress),
        num_classes=len(data.labels),
        preprocess=recipe.preprocess,
        task=data.task,
        scale=data.scale,
    )
    return Network(module.eval(), structure)


def reads_channels_last(module: torch.nn.Module, preprocess: Preprocess) -> bool:
    images = torch.zeros(2, preprocess.channels, preprocess.size, preprocess.size).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            module(images)
    except RuntimeError:  # in NCHW it has just answered `models.check`
        return False
    return True


def refuse_unsuited(recipe: Recipe, data: Data) -> None:
    """Raises RecipeError for losses, schemes and stages that make no sense in the data's task, one line each."""
    found = task_mistakes(recipe.stages, data.task)
    if found:
        raise RecipeError([f"{dotted(keys)}: {reason}" for keys, reason in found])


def write_int8(recipe: Recipe, module: torch.nn.Module) -> None:
    """Writes the int8 files of the untrained network: ModelError for an operator that only they do not have."""
    quantize: Quantize | None = None
    for stage in recipe.stages:
        if isinstance(stage, Quantize):
            quantize = stage
        elif isinstance(stage, Export) and quantize and not quantize.simulated and "int8" in (stage.kinds or ("int8",)):
            frozen = freeze(prepare(module, quantize.quantization(), recipe.preprocess))
            model = int8_onnx(frozen, recipe.preprocess.size, {}, recipe.preprocess.channels)
            if "tflite" in stage.formats:
                to_tflite(model, {})


def blocks(stage: StageSettings) -> list[Distillation]:
    return [block for block in (stage, getattr(stage, "distill", None)) if isinstance(block, Distillation)]


def outside_teachers(stage: StageSettings) -> list[str]:
    return [folder for block in blocks(stage) for folder in block.teacher.folders()]
