"""Which network to begin with, how large its input, and which stages it can go through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compress.errors import CompressError, ModelError
from compress.models import ModelSettings, build, check, own_preprocess, refuse_unknown
from compress.product import Preprocess
from compress.progress import Progress
from compress.starting.images import Seen

PACKAGES = ("torchvision", "timm", "huggingface")
SIDES = (32, 64, 96, 128, 160, 192, 224)
"""Of inputs, where the network does not say: multiples of 32, as its strides divide it by 32."""
OTHER_SIDES = (*SIDES, 16, 24, 28, 48, 56, 84, 112, 256, 288, 299, 384)
"""Tried in turn where the network does not take that size."""
SMALL = 64
"""Pixels up to which the stem of mobilenet_v2 keeps the resolution, and images are not cropped."""
PRETRAINED = {"torchvision": "DEFAULT", "timm": "pretrained", "huggingface": "pretrained"}


@dataclass(frozen=True)
class Chosen:
    """A network."""

    settings: dict[str, Any]
    """The recipe's `model` section."""
    reasons: dict[str, str]
    """Why, by setting."""
    preprocess: Preprocess
    written: dict[str, Any]
    """Of it, what the recipe says; the rest is the network's own, or the default."""
    preprocess_reasons: dict[str, str]
    module: Any
    """With random weights, to ask the stages about."""
    pretrained: bool
    notes: list[str] = field(default_factory=list)


def choose(model: str, weights: str | None, images: Seen, base: Path, progress: Progress) -> Chosen:
    """The network that goes by `model`, with an input that suits it and the images. Raises ModelError."""
    settings, reasons = _settings(model, weights)
    small = settings["use"] == "mobilenet_v2" and images.side <= SMALL
    if small:
        settings["stem_stride"] = 1
        reasons["stem_stride"] = "the images are small: their resolution is kept"
    try:
        checked = TypeAdapter[Any](ModelSettings).validate_python(settings)
    except ValidationError as error:
        way_out = "give mobilenet_v2, torchvision:NAME, timm:NAME, huggingface:NAME or package.module:factory"
        raise ModelError(f"--model {model}", error.errors()[0]["msg"].removeprefix("Value error, "), way_out) from None
    try:
        refuse_unknown(checked)
    except ModelError as error:
        raise ModelError(f"--model {model}", error.problem, error.way_out) from error
    own = own_preprocess(checked, base, progress)
    written, said = _input(own, images, settings["use"])
    preprocess = Preprocess.model_validate(own | written)

    def built(preprocess: Preprocess) -> Any:
        outputs, size, channels = len(images.labels), preprocess.size, preprocess.channels
        module = build(checked, outputs, size, progress, channels, base)
        check(module, num_classes=outputs, input_size=size, place=f"--model {model}", channels=channels)
        return module

    try:
        module = built(preprocess)
    except ModelError:
        found = _other_size(preprocess, written, built)
        if found is None:
            raise
        preprocess, module = found
        written["size"], said["size"] = preprocess.size, "what the network takes"
    return Chosen(settings, reasons, preprocess, written, said, module, settings.get("weights") is not None)


def _other_size(
    preprocess: Preprocess, written: dict[str, Any], built: Callable[[Preprocess], Any]
) -> tuple[Preprocess, Any] | None:
    """A network that takes one size alone, at that size, if it is one that many are made for."""
    for side in OTHER_SIDES if "size" in written else ():
        with contextlib.suppress(CompressError):
            other = preprocess.model_copy(update={"size": side})
            return other, built(other)
    return None


def _settings(model: str, weights: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    package, _, name = model.partition(":")
    known = package in PACKAGES and name
    settings: dict[str, Any] = {"use": package, "name": name} if known else {"use": model}
    reasons = {}
    if package in PRETRAINED and known:
        settings["weights"] = weights or ("pretrained" if package == "huggingface" else None)
        if weights is None and package != "huggingface":
            reasons["weights"] = f"random; {PRETRAINED[package]} starts from published ones, and needs far fewer epochs"
    else:
        settings["weights"] = weights
        if weights is None:
            reasons["weights"] = "random; or a .safetensors, .pth or .pt file to start from"
    return settings, reasons


def _input(own: dict[str, Any], images: Seen, use: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What the recipe says of the input, and why."""
    if own:
        why = f"left out: {use} knows what its network was made for (size {own.get('size', 224)})"
        return {}, {"": why}
    size = max([side for side in SIDES if side <= images.side], default=SIDES[0])
    written: dict[str, Any] = {"size": size}
    reasons = {"size": f"the images' shorter sides are about {images.side} pixels"}
    if images.grey and use == "mobilenet_v2":
        written["channels"] = 1
        reasons["channels"] = "all images that were looked at are grey"
    if size <= SMALL:
        written["crop"] = 1.0
        reasons["crop"] = "nothing is cut off such small images"
    return written, reasons
