"""The networks a recipe can name: one file each, and `package.module:factory` for all others.

To add a network: its file with a settings class and a function that builds it, its line in `ModelSettings` and in
`build`, one test. Where it has weights or a preprocessing of its own, also in `started`, `inputs` and `own_preprocess`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag
from torch import nn

from compress.models import huggingface_models as huggingface
from compress.models import timm_models as timm
from compress.models import torchvision_models as torchvision
from compress.models.factory import Factory, build_factory
from compress.models.head import check
from compress.models.huggingface_models import HuggingFace
from compress.models.mobilenet_v2 import MobileNetV2Settings, build_mobilenet_v2
from compress.models.sources import Sources, sources
from compress.models.timm_models import Timm
from compress.models.torchvision_models import Torchvision
from compress.models.weights import file_sha256, fill, load_weights
from compress.product import Preprocess
from compress.progress import Progress, Silent
from compress.settings import named_or_own

__all__ = [
    "ModelSettings",
    "build",
    "check",
    "description",
    "file_sha256",
    "inputs",
    "label_notes",
    "load_weights",
    "own_preprocess",
    "packages",
    "refuse_unknown",
    "started",
]

AnyModel = MobileNetV2Settings | Torchvision | Timm | HuggingFace | Factory
INPUT_SHAPE = "input_shape"
"""Attribute of a built module: (C, H, W) of the images that it is for."""
NAMES = ("mobilenet_v2", "torchvision", "timm", "huggingface")


ModelSettings = Annotated[
    Annotated[MobileNetV2Settings, Tag("mobilenet_v2")]
    | Annotated[Torchvision, Tag("torchvision")]
    | Annotated[Timm, Tag("timm")]
    | Annotated[HuggingFace, Tag("huggingface")]
    | Annotated[Factory, Tag("factory")],
    Discriminator(
        named_or_own(NAMES),
        custom_error_type="no_such_model",
        custom_error_message=f"`use` must be {', '.join(NAMES)}, or package.module:factory for a network of your own",
    ),
]


def inputs(settings: AnyModel, base: Path, progress: Progress | None = None) -> list[Path]:
    """Files outside our code whose change makes another network: weights, and the code of a factory.

    Published weights that are in no cache are downloaded. Of one's own code all counts that the factory's module
    imports: see `compress.models.sources`.
    """
    progress = progress or Silent()
    match settings:
        case Torchvision():
            files = [torchvision.torchvision_weights(settings, base, progress)]
        case Timm():
            files = [timm.timm_weights(settings, base, progress)]
        case HuggingFace():
            files = [*huggingface.huggingface_weights(settings, base, progress)]
            files += [] if settings.config else [huggingface.config_file(settings, base, progress)]
        case Factory():
            files = [_weights_file(settings, base), *code_of(settings).files]
        case _:
            files = [_weights_file(settings, base)]
    return [path for path in files if path is not None]


def _weights_file(settings: AnyModel, base: Path) -> Path | None:
    return base / Path(settings.weights).expanduser() if settings.weights else None


def code_of(settings: Factory) -> Sources:
    """The files and packages that a factory's module imports, and it."""
    return sources(settings.use.partition(":")[0], Path.cwd())


def packages(settings: AnyModel) -> tuple[str, ...]:
    """The packages whose version can change the network."""
    match settings:
        case Factory():
            return tuple(code_of(settings).versions)
        case Torchvision():
            return ("torchvision",)
        case Timm():
            return ("timm",)
        case HuggingFace():
            return ("transformers",)
        case _:
            return ()


def build(
    settings: AnyModel,
    num_classes: int,
    input_size: int,
    progress: Progress | None = None,
    channels: int = 3,
    base: Path | None = None,
) -> nn.Module:
    """The network in eval mode, with `num_classes` outputs and fresh weights (or those its factory gives it).

    Fresh weights come from torch's global random state. `settings.weights` is not read here: see `started`. Raises
    ModelError, and CompressError for a package that is missing.
    """
    progress = progress or Silent()
    module: nn.Module
    match settings:
        case MobileNetV2Settings():
            module = build_mobilenet_v2(settings, num_classes, channels)
        case Torchvision():
            module = torchvision.build_torchvision(settings, num_classes, input_size, channels)
        case Timm():
            module = timm.build_timm(settings, num_classes, input_size, channels)
        case HuggingFace():
            where = base or Path.cwd()
            module = huggingface.build_huggingface(settings, num_classes, input_size, channels, where, progress)
        case Factory():
            module = build_factory(settings, num_classes, input_size, progress.note, channels)
    return _sized(module, input_size, channels)


def _sized(module: nn.Module, input_size: int, channels: int) -> nn.Module:
    """The module in eval mode, knowing its images' size, which a forward may ask for while it is traced."""
    setattr(module, INPUT_SHAPE, (channels, input_size, input_size))
    return module.eval()


def started(settings: AnyModel, num_classes: int, preprocess: Preprocess, progress: Progress, base: Path) -> nn.Module:
    """The network as training finds it: built, asked once, and with the weights that its settings name.

    A relative path starts at `base`. Raises ModelError, and CompressError for a package that is missing.
    """
    size, channels = preprocess.size, preprocess.channels
    own_preprocess(settings, base, progress)  # what it cannot say is a note
    if isinstance(settings, Timm) and settings.weights == timm.PUBLISHED:
        file = timm.timm_weights(settings, base, progress)
        assert file is not None
        module = timm.pretrained_timm(settings, num_classes, preprocess, file, progress)
        check(module, num_classes=num_classes, input_size=size, place=_place(settings), channels=channels)
        return _sized(module, size, channels)
    module = build(settings, num_classes, size, progress, channels, base)
    check(module, num_classes=num_classes, input_size=size, place=_place(settings), channels=channels)
    match settings:
        case HuggingFace():
            files = huggingface.huggingface_weights(settings, base, progress)
            if files and settings.weights == huggingface.PUBLISHED:
                state = huggingface.huggingface_state(settings, files)
                fill(module, state, _place(settings), progress)
            elif files:
                load_weights(module, files[0], progress)
        case Torchvision():
            if file := torchvision.torchvision_weights(settings, base, progress):
                load_weights(module, file, progress)
        case _:
            if file := _weights_file(settings, base):
                load_weights(module, file, progress)
    return module


def description(settings: AnyModel, base: Path, progress: Progress | None = None) -> dict[str, Any]:
    """The `model` section that a saved network is rebuilt from, without any file but its own."""
    if isinstance(settings, HuggingFace) and settings.config is None:
        config = huggingface.huggingface_config(settings, base, progress or Silent())
        config = {key: value for key, value in config.items() if key not in huggingface.OF_LABELS}
        settings = settings.model_copy(update={"config": config})
    return settings.model_dump(mode="json")


def label_notes(settings: AnyModel, labels: Sequence[str], base: Path) -> list[str]:
    """What the network's own names of its classes say against those of the data: one sentence, or nothing."""
    if not isinstance(settings, HuggingFace) or settings.weights is None:
        return []
    config = settings.config or huggingface.huggingface_config(settings, base, Silent())
    own = huggingface.huggingface_labels(config)
    if len(own) != len(labels) or own == list(labels):
        return []
    place, first = next((i, name) for i, name in enumerate(own) if name != labels[i])
    return [f"{settings.name} calls its classes otherwise than the data: {place} is {first}, here {labels[place]}"]


def own_preprocess(settings: AnyModel, base: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Fields of Preprocess that the network was made for; none where it does not say. Notes go to `progress`."""
    progress = progress or Silent()
    notes: list[str] = []
    match settings:
        case Torchvision():
            fields = torchvision.torchvision_preprocess(settings)
        case Timm():
            fields, notes = timm.timm_preprocess(settings)
        case HuggingFace():
            fields, notes = huggingface.huggingface_preprocess(settings, base, progress)
        case _:
            fields = {}
    for note in notes:
        progress.note(note)
    return fields


def refuse_unknown(settings: AnyModel) -> None:
    """Raises ModelError, whose place is a key of the recipe, for a name that its package does not have."""
    match settings:
        case Torchvision():
            torchvision.refuse_unknown(settings)
        case Timm():
            timm.refuse_unknown(settings)
        case _:
            pass


def _place(settings: AnyModel) -> str:
    name = getattr(settings, "name", None)
    return f"model {settings.use} {name}" if name else settings.use
