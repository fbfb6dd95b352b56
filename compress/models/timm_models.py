"""Networks of timm by name, with the weights that it publishes and the preprocessing they were trained with."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field
from torch import nn

from compress.errors import ModelError
from compress.extras import need
from compress.models.downloads import cached_hub, cached_url, from_hub, from_url, said
from compress.models.head import head_replaced
from compress.models.torchvision_models import import_torchvision
from compress.product import Preprocess
from compress.progress import Progress
from compress.settings import Settings

PUBLISHED = "pretrained"
SAFE = "model.safetensors"


class Timm(Settings):
    """A network of timm, such as mobilenetv3_small_100; needs `compress[timm]`."""

    use: Literal["timm"]
    name: str
    """As timm.list_models() has it; `name.tag` chooses among published weights (mobilenetv3_small_100.lamb_in1k)."""
    weights: str | None = None
    """`pretrained`, a .safetensors, .pth or .pt file, or null: random."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of published weights whose name does not say it."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What timm.create_model is called with, besides the number of classes."""


def refuse_unknown(settings: Timm) -> None:
    """Raises ModelError for a name that timm does not have, and for weights that it does not publish."""
    _published(settings)


def build_timm(settings: Timm, num_classes: int, input_size: int, channels: int) -> nn.Module:
    """The network without weights of its own. Raises ModelError for whatever timm refuses."""
    return _created(settings, num_classes, input_size, channels, None)


def pretrained_timm(
    settings: Timm, num_classes: int, preprocess: Preprocess, file: Path, progress: Progress
) -> nn.Module:
    """The network with timm's published weights, which timm itself fits to its classes, channels and image size."""
    module = _created(settings, num_classes, preprocess.size, preprocess.channels, file)
    before = _published(settings).num_classes
    if before != num_classes:
        progress.note(head_replaced(before, num_classes))
    return module


def timm_weights(settings: Timm, base: Path, progress: Progress) -> Path | None:
    """The file of the initial weights, downloaded where they are published and in no cache."""
    if settings.weights is None:
        return None
    if settings.weights != PUBLISHED:
        return base / Path(settings.weights).expanduser()
    published, place = _published(settings), _place(settings)
    repository, _, revision = (published.hf_hub_id or "").partition("@")
    if published.url and (not repository or cached_url(published.url).is_file()):
        in_hub = repository and cached_hub(repository, SAFE, place=place, revision=revision or None)
        if not in_hub:
            return from_url(published.url, progress, place=place, sha256=settings.sha256)
    return from_hub(repository, published.hf_hub_filename or SAFE, progress, place=place, revision=revision or None)


def timm_preprocess(settings: Timm) -> tuple[dict[str, Any], list[str]]:
    """Fields of Preprocess, and a sentence for what cannot be said with them."""
    published = _published(settings)
    found = _timm(settings).data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
    channels, size, _ = found["input_size"]
    size = int(settings.args.get("img_size", size)) if isinstance(settings.args.get("img_size"), int) else int(size)
    shorter = int(size / found["crop_pct"])  # timm cuts off what is no whole pixel
    notes = []
    if found["crop_mode"] != "center":
        notes.append(f"timm evaluates {settings.name} with crop_mode {found['crop_mode']}; here the centre is cut out")
    if found["interpolation"] not in ("bilinear", "bicubic"):
        notes.append(f"timm resizes for {settings.name} with {found['interpolation']}; here it is bilinear")
    return {
        "size": size,
        "channels": int(channels),
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        "crop": min(1.0, size / shorter),
        "interpolation": "bicubic" if found["interpolation"] == "bicubic" else "bilinear",
    }, notes


def _created(settings: Timm, num_classes: int, input_size: int, channels: int, file: Path | None) -> nn.Module:
    place, published = _place(settings), _published(settings)
    for key in ("num_classes", "in_chans", "pretrained", "checkpoint_path"):
        if key in settings.args:
            raise ModelError(place, f"`args` has {key}", "leave it out: the recipe says it elsewhere")
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels} | settings.args
    if published is not None and published.fixed_input_size:
        given.setdefault("img_size", input_size)
    if file is not None:
        overlay = {"file": str(file), "custom_load": False, "hf_hub_id": None, "url": None}
        given |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that timm has renamed, and of torch's deprecations
            module: nn.Module = _timm(settings).create_model(settings.name, **given)
    except Exception as error:
        raise ModelError(place, f"raised {said(error)}") from error
    return module


def _published(settings: Timm) -> Any:
    """timm's description of the network and of its published weights."""
    timm = _timm(settings)
    architecture, _, tag = settings.name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), 3)
        way_out = f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "see timm.list_models()"
        raise ModelError("model.name", f"timm has no network `{architecture}`", way_out)
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = get_close_matches(tag, tags, 1)
        there = f"did you mean `{architecture}.{near[0]}`?" if near else f"there are {', '.join(tags) or 'none'}"
        raise ModelError("model.name", f"{architecture} has no weights `{tag}`", there)
    published = timm.get_pretrained_cfg(settings.name, allow_unregistered=True)
    if settings.weights == PUBLISHED and (published is None or not published.has_weights):
        raise ModelError("model.weights", f"timm publishes no weights of {settings.name}", "leave `weights` out")
    return published


def _timm(settings: Timm) -> ModuleType:
    place = _place(settings)
    import_torchvision(place, "timm")
    return need("timm", "timm", place)


def _place(settings: Timm) -> str:
    return f"model timm {settings.name}"
