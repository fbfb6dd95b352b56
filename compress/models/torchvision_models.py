"""Networks of torchvision by name, with the weights that it publishes and the preprocessing they were trained with."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from compress.errors import CompressError, ModelError
from compress.extras import need
from compress.models.downloads import from_url, said
from compress.models.grey import read_grey
from compress.progress import Progress
from compress.settings import Settings

FILES = (".safetensors", ".pth", ".pt")
"""Endings of weights that are a file of the user's."""
_declared: list[torch.library.Library] = []


class Torchvision(Settings):
    """A network of torchvision, such as resnet18 or mobilenet_v3_small; needs `compress[torchvision]`."""

    use: Literal["torchvision"]
    name: str
    """As torchvision.models.list_models() has it."""
    weights: str | None = None
    """`DEFAULT`, the name of published weights (`IMAGENET1K_V1`), a .safetensors, .pth or .pt file, or null: random."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of published weights whose name does not say it."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What torchvision's function is called with, besides the number of classes."""


def import_torchvision(place: str, extra: str = "torchvision") -> ModuleType:
    """The package. Raises CompressError with the line that installs it.

    As published for another build of torch, it does not import: it describes operators for detection that its compiled
    part failed to bring. They are declared, without an implementation, as no classifier calls them.
    """
    for _ in range(8):
        try:
            return need("torchvision", extra, place)
        except CompressError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error.__cause__))
            if missing is None:
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]  # what was imported before the error
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)  # an operator lives as long as its library
    return need("torchvision", extra, place)


def refuse_unknown(settings: Torchvision) -> None:
    """Raises ModelError for a name of a network or of weights that torchvision does not have."""
    _published(settings)


def build_torchvision(settings: Torchvision, num_classes: int, input_size: int, channels: int) -> nn.Module:
    """The network without weights of its own. Raises ModelError for whatever torchvision refuses."""
    place, models = _place(settings), _models(settings)
    _refuse_name(settings, models)
    for key in ("num_classes", "weights", "progress"):
        if key in settings.args:
            raise ModelError(place, f"`args` has {key}", "leave it out: the recipe says it elsewhere")
    function = models.get_model_builder(settings.name)
    given: dict[str, Any] = {"num_classes": num_classes, "weights": None} | settings.args
    if settings.name.startswith("vit_"):  # its positions are of one image size
        given.setdefault("image_size", input_size)
    if settings.name in ("googlenet", "inception_v3"):
        # Auxiliary heads answer with a tuple in training; published weights expect inputs that it normalises again.
        given = {"aux_logits": False, "init_weights": True, "transform_input": is_published(settings.weights)} | given
    try:
        module: nn.Module = function(**given)
    except Exception as error:
        raise ModelError(place, f"raised {said(error)}") from error
    if channels == 1:
        read_grey(module, place)
    return module


def torchvision_weights(settings: Torchvision, base: Path, progress: Progress) -> Path | None:
    """The file of the initial weights, downloaded where they are published and not in torch's cache."""
    if settings.weights is None:
        return None
    if not is_published(settings.weights):
        return base / Path(settings.weights).expanduser()
    return from_url(_published(settings).url, progress, place=_place(settings), sha256=settings.sha256)


def torchvision_preprocess(settings: Torchvision) -> dict[str, Any]:
    """Fields of Preprocess: those of the named weights, else of the best that are published for this network."""
    preset = _published(settings).transforms()
    size, shorter = int(preset.crop_size[0]), int(preset.resize_size[0])
    interpolation = preset.interpolation.value
    return {
        "size": size,
        "channels": 3,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop": min(1.0, size / shorter),
        "interpolation": interpolation if interpolation == "bicubic" else "bilinear",
    }


def is_published(weights: str | None) -> bool:
    """Whether `weights` is a name, and not a file or nothing."""
    return weights is not None and not weights.endswith(FILES)


def _published(settings: Torchvision) -> Any:
    """The member of torchvision's weights that the settings name, or the best of this network."""
    models = _models(settings)
    _refuse_name(settings, models)
    known = models.get_model_weights(settings.name)
    if not is_published(settings.weights) or settings.weights == "DEFAULT":
        return known.DEFAULT
    if settings.weights not in known.__members__:
        near = get_close_matches(str(settings.weights), known.__members__, 1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        there = f"{guess}there are DEFAULT, {', '.join(member.name for member in known)}"
        raise ModelError("model.weights", f"{settings.name} has no weights `{settings.weights}`", there)
    return known[settings.weights]


def _models(settings: Torchvision) -> ModuleType:
    return import_torchvision(_place(settings)).models


def _refuse_name(settings: Torchvision, models: ModuleType) -> None:
    names = models.list_models(module=models)
    if settings.name not in names:
        near = get_close_matches(settings.name, names, 3)
        way_out = f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else f"it has {', '.join(names)}"
        raise ModelError("model.name", f"torchvision has no classifier `{settings.name}`", way_out)


def _place(settings: Torchvision) -> str:
    return f"model torchvision {settings.name}"
