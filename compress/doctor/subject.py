"""What is to be examined: a recipe's network as its stages find it, or the network of a factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import recipe as recipes
from compress.data import open_data
from compress.doctor.diagnosis import PTQ, Diagnosis, examine
from compress.errors import DataError, ModelError
from compress.models import build, started
from compress.models.factory import Factory, find, importable
from compress.models.head import output_classes
from compress.product import Batch, Preprocess
from compress.progress import Progress
from compress.stages.export import Export
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.training import reestimated_batchnorm

MOST_IMAGES, LEAST_IMAGES = 16, 4
PIXELS = 16 * 96**2
"""Of a batch: damage runs the network once per layer on it, which is to take seconds."""
CLASSES = 10
"""Of a recipe's network whose data cannot be read."""
NO_CLASSES = "outputs are no classes here: go by SQNR; divergence and changed classes say nothing"
SYNTHETIC = "what is said of activations and damage holds for seeded noise, not for photographs"
RANDOM = "the weights are random: what is said of weights, activations and damage says little of a trained network"
OWN_WEIGHTS = (
    "the weights are those the factory gives: if they are random, their figures say little of a trained network"
)
NEW_STATISTICS = "BatchNorm has seen no image yet: its statistics are those of this batch"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What `examine` needs, and what must be said of it."""

    name: str
    module: nn.Module
    preprocess: Preprocess
    images_NCHW: Tensor
    images: str
    stage: Quantize
    formats: tuple[str, ...]
    measure: bool
    """The recipe's target is this machine."""
    notes: tuple[str, ...]


def examine_subject(subject: Subject, progress: Progress, *, measure: bool = True) -> Diagnosis:
    """The diagnosis of a recipe's or a factory's network; nothing is timed where its target is another machine."""
    return examine(
        subject.module,
        subject.preprocess,
        subject.images_NCHW,
        progress,
        name=subject.name,
        images=subject.images,
        stage=subject.stage,
        formats=subject.formats,
        measure=measure and subject.measure,
        notes=subject.notes,
    )


def from_recipe(path: Path, overrides: Sequence[str], progress: Progress, *, base: Path) -> Subject:
    """The network of a recipe before its first stage, with one batch of its training data if that can be read.

    Raises CompressError for a recipe with mistakes and for a network that cannot be built.
    """
    recipe = recipes.load(path, overrides)
    preprocess, notes = recipe.preprocess, []
    try:
        data = open_data(recipe.data, preprocess, progress, base)
        count = min(batch_of(preprocess.size), data.count("train"))
        batch = next(iter(data.batches("train", batch_size=count, shuffle=True, limit=count, seed=recipe.seed)))
        images_NCHW, classes = batch.images_NCHW.contiguous(), len(data.labels)
        images = f"{len(images_NCHW)} training images"
        if data.task != "classification":
            notes.append(NO_CLASSES)
    except DataError as error:
        notes.append(f"the recipe's data cannot be read ({error}); {CLASSES} classes assumed")
        notes.append(SYNTHETIC)
        images_NCHW, classes = synthetic(preprocess, recipe.seed), CLASSES
        images = f"{len(images_NCHW)} synthetic images"
    torch.manual_seed(recipe.seed)
    module = started(recipe.model, classes, preprocess, progress, base)
    if not recipe.model.weights:
        notes.append(OWN_WEIGHTS if isinstance(recipe.model, Factory) else RANDOM)
    module, news = _with_statistics(module, images_NCHW)
    notes += news
    stage = next((stage for stage in recipe.stages if isinstance(stage, Quantize)), None)
    if stage is None:
        notes.append("the recipe has no `quantize` stage; this is what one would do")
    if any(isinstance(stage, Prune) for stage in recipe.stages):
        notes.append("the recipe prunes: this is the network before that, and its channel counts will be others")
    exports = [stage for stage in recipe.stages if isinstance(stage, Export)]
    return Subject(
        name=recipe.name,
        module=module,
        preprocess=preprocess,
        images_NCHW=images_NCHW,
        images=images,
        stage=stage or PTQ,
        formats=tuple(dict.fromkeys(f for export in exports for f in export.formats if f != "ncnn"))
        or ("onnx", "tflite"),
        measure=recipe.target == "local",
        notes=tuple(notes),
    )


def from_factory(use: str, progress: Progress, *, size: int, classes: int | None = None, seed: int = 0) -> Subject:
    """The network that `package.module:factory` returns, on synthetic images.

    Without `classes` it keeps the outputs its factory gives it. Raises ModelError for whatever goes wrong in it.
    """
    torch.manual_seed(seed)
    preprocess = Preprocess(size=size)
    module = build(Factory(use=use), classes or _own_classes(use, size), size, progress)
    images_NCHW = synthetic(preprocess, seed)
    module, news = _with_statistics(module, images_NCHW)
    return Subject(
        name=use,
        module=module,
        preprocess=preprocess,
        images_NCHW=images_NCHW,
        images=f"{len(images_NCHW)} synthetic images",
        stage=PTQ,
        formats=("onnx", "tflite"),
        measure=True,
        notes=(SYNTHETIC, OWN_WEIGHTS, *news),
    )


def _with_statistics(module: nn.Module, images_NCHW: Tensor) -> tuple[nn.Module, list[str]]:
    """The network, with statistics of the batch if all of its BatchNorms are as new; and a note that says so.

    Through dozens of layers that normalise nothing, a signal fades to 1e-8: all damage would seem total.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None]
    if not norms or not all(_is_new(norm) for norm in norms):
        return module, []
    batch = Batch(images_NCHW, torch.zeros(len(images_NCHW), dtype=torch.long))
    return reestimated_batchnorm(module, [batch], torch.device("cpu")), [NEW_STATISTICS]


def _is_new(norm: nn.BatchNorm2d) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


def _own_classes(use: str, size: int) -> int:
    place = f"model {use}"
    with importable(Path.cwd()):
        try:
            module = find(use, place)()
        except ModelError:
            raise
        except Exception as error:  # the user's own code may raise anything
            said = " ".join(str(error).split())[:300]
            raise ModelError(place, f"raised {type(error).__name__}: {said}", "perhaps it wants --classes") from error
    if not isinstance(module, nn.Module):
        raise ModelError(place, f"returned {type(module).__name__}", "it must return a torch.nn.Module")
    return output_classes(module, size, place)


def batch_of(size: int) -> int:
    """How many images of `size` pixels a side make a batch."""
    return max(LEAST_IMAGES, min(MOST_IMAGES, PIXELS // size**2))


def synthetic(preprocess: Preprocess, seed: int = 0) -> Tensor:
    """Images of soft blots and fine noise over the whole range of pixels, normalised; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size, channels, count = preprocess.size, preprocess.channels, batch_of(preprocess.size)
    blots = F.interpolate(torch.rand(count, channels, 6, 6, generator=generator), (size, size), mode="bicubic")
    pixels = (blots + 0.1 * torch.randn(count, channels, size, size, generator=generator)).clamp(0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (pixels - mean) / std
