"""Classifiers of Hugging Face transformers, from a folder that `save_pretrained` wrote or from the hub.

Only safetensors are read, and no code of a repository is ever run.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.errors import ModelError
from compress.extras import need
from compress.models.downloads import from_hub, said
from compress.models.grey import read_grey
from compress.models.torchvision_models import import_torchvision
from compress.progress import Progress
from compress.settings import Settings

PUBLISHED = "pretrained"
CONFIG, PROCESSOR, SAFE, INDEX = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
OF_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "architectures")
"""Fields of a config that the recipe's data decide here."""
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


class HuggingFace(Settings):
    """An image classifier of transformers: a folder, or a repository of the hub; needs `compress[huggingface]`."""

    use: Literal["huggingface"]
    name: str
    """A folder with config.json and model.safetensors, or a repository such as google/mobilenet_v2_1.0_224."""
    revision: str | None = None
    """Branch, tag or commit of the repository; a commit's hash cannot change later."""
    weights: str | None = PUBLISHED
    """`pretrained`: those of the folder or repository; null: random."""
    config: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Instead of the repository's config.json; a saved network holds its own here."""


class HuggingFaceNetwork(nn.Module):
    """Logits (N, num_classes) of images (N, C, H, W), from a model that answers with a ModelOutput."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.network(pixel_values=images_NCHW).logits
        return logits_NK


def build_huggingface(
    settings: HuggingFace, num_classes: int, input_size: int, channels: int, base: Path, progress: Progress
) -> HuggingFaceNetwork:
    """The network with random weights. Raises ModelError for a config that is no image classifier's."""
    place, transformers = _place(settings), _transformers(settings)
    given = copy.deepcopy(settings.config or huggingface_config(settings, base, progress))
    kind = given.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(place, f"transformers {transformers.__version__} has no model_type `{kind}`", _remote(given))
    for key in OF_LABELS:
        given.pop(key, None)
    given |= {"num_labels": num_classes} | ({"image_size": input_size} if "image_size" in given else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.CONFIG_MAPPING[kind].from_dict(given)
            # Attention as matrix products, which integer kernels and both formats know.
            network = transformers.AutoModelForImageClassification.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
        except Exception as error:
            raise ModelError(place, f"is no image classifier ({said(error)})", "name another") from error
    module = HuggingFaceNetwork(network)
    if channels != getattr(config, "num_channels", 3):
        read_grey(module, place)
        for part in module.modules():  # each compares it with the image
            if getattr(part, "num_channels", channels) != channels:
                part.num_channels = channels  # type: ignore[assignment]
    return module


def huggingface_weights(settings: HuggingFace, base: Path, progress: Progress) -> list[Path]:
    """The safetensors of the folder or repository, downloaded where they are in no cache; none for random weights."""
    if settings.weights is None:
        return []
    if settings.weights != PUBLISHED:
        return [base / Path(settings.weights).expanduser()]
    try:
        return [_file(settings, SAFE, base, progress)]
    except ModelError as error:
        try:
            index = json.loads(_file(settings, INDEX, base, progress).read_text(encoding="utf-8"))
            return [_file(settings, name, base, progress) for name in sorted(set(index["weight_map"].values()))]
        except (ModelError, ValueError, KeyError, AttributeError):
            raise error from None


def huggingface_state(settings: HuggingFace, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of the files under the names that they have in the network here.

    transformers reads them, which knows the names of its earlier versions. Raises ModelError for files that do not fit
    the config beside them.
    """
    place, transformers = _place(settings), _transformers(settings)
    folder = files[0].parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, facts = transformers.AutoModelForImageClassification.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                dtype="float32",
            )
        except Exception as error:
            raise ModelError(
                place, f"cannot be loaded ({said(error)})", "save it again with save_pretrained"
            ) from error
    missing = sorted(facts["missing_keys"])
    if missing:
        problem = f"{len(missing)} weights are missing: {', '.join(missing[:3])}"
        raise ModelError(place, problem, "name a repository of a trained image classifier")
    return {f"network.{name}": tensor for name, tensor in model.state_dict().items()}


def huggingface_config(settings: HuggingFace, base: Path, progress: Progress) -> dict[str, Any]:
    """config.json of the folder or repository."""
    return _json(config_file(settings, base, progress))


def config_file(settings: HuggingFace, base: Path, progress: Progress) -> Path:
    """config.json of the folder or repository, downloaded where it is in no cache."""
    return _file(settings, CONFIG, base, progress)


def huggingface_labels(config: Mapping[str, Any]) -> list[str]:
    """What the config calls its outputs, in their order; empty where it names none."""
    named = config.get("id2label") or {}
    try:
        return [str(named[key]) for key in sorted(named, key=int)]
    except (TypeError, ValueError):
        return []


def huggingface_preprocess(settings: HuggingFace, base: Path, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """Fields of Preprocess from preprocessor_config.json, and a sentence for what cannot be said with them."""
    config = settings.config or huggingface_config(settings, base, progress)
    channels = config.get("num_channels", 3)
    if channels not in (1, 3):
        raise ModelError(_place(settings), f"reads images of {channels} channels", "1 and 3 are known here")
    size = config.get("image_size")
    fields: dict[str, Any] = {"channels": channels} | ({"size": size} if isinstance(size, int) else {})
    try:
        said_there = _json(_file(settings, PROCESSOR, base, progress))
    except ModelError:
        return fields, [f"{settings.name} has no {PROCESSOR}: preprocess is this recipe's, or the defaults"]
    return _fields(said_there, fields, settings.name)


def _fields(processor: dict[str, Any], fields: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    notes = []
    resized, cropped = processor.get("size"), processor.get("crop_size")
    shortest = resized.get("shortest_edge") if isinstance(resized, dict) else resized
    whole = resized.get("height") if isinstance(resized, dict) else None
    cut = cropped.get("height") if isinstance(cropped, dict) else cropped
    if processor.get("do_center_crop") and isinstance(cut, int):
        fields["size"] = cut
        fields["crop"] = min(1.0, cut / (shortest or whole or cut))
    elif isinstance(whole, int):
        fields |= {"size": whole, "crop": 1.0}
        notes.append(f"{name} was trained on images squashed to a square; here the centre is cut out")
    elif isinstance(shortest, int):
        fields["size"] = shortest
        fields["crop"] = min(1.0, float(processor.get("crop_pct") or 1.0)) if shortest < 384 else 1.0
    if processor.get("do_normalize", True):
        for key, field in (("image_mean", "mean"), ("image_std", "std")):
            values = processor.get(key)
            if isinstance(values, list) and len(values) == fields["channels"]:
                fields[field] = tuple(values)
    else:
        fields |= {"mean": (0.0,) * fields["channels"], "std": (1.0,) * fields["channels"]}
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-3 and "mean" in fields:
        # (pixel * scale - mean) / std, said of pixels over 255
        fields["mean"] = tuple(value / (scale * 255) for value in fields["mean"])
        fields["std"] = tuple(value / (scale * 255) for value in fields["std"])
    resampling = processor.get("resample", 2)
    fields["interpolation"] = RESAMPLING.get(resampling, "bilinear")
    if resampling not in RESAMPLING:
        notes.append(f"{name} was trained on images resized in another way (Pillow's {resampling}); here bilinear")
    return fields, notes


def _file(settings: HuggingFace, name: str, base: Path, progress: Progress) -> Path:
    """A file of the folder, or of the repository."""
    folder, place = base / Path(settings.name).expanduser(), _place(settings)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ModelError(place, f"the folder has no {name}", "expected what save_pretrained writes")
        return folder / name
    if settings.name.startswith(("/", ".", "~")) or settings.name.count("/") > 1:
        raise ModelError("model.name", f"no folder `{settings.name}`", f"a relative path starts at {base}")
    return from_hub(settings.name, name, progress, place=place, revision=settings.revision)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(path, f"is not readable ({said(error)})", "save the model again") from error
    if not isinstance(value, dict):
        raise ModelError(path, "is no mapping", "save the model again")
    return value


def _remote(config: Mapping[str, Any]) -> str:
    if "auto_map" in config:
        return "its repository brings code of its own, which is never run here; write a factory for it"
    return "name another, or install a version that has it"


def _transformers(settings: HuggingFace) -> ModuleType:
    place = _place(settings)
    if importlib.util.find_spec("torchvision") is not None:  # transformers imports it where it is installed
        import_torchvision(place, "huggingface")
    return need("transformers", "huggingface", place)


def _place(settings: HuggingFace) -> str:
    return f"model huggingface {settings.name}"
