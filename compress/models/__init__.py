"""The networks a recipe can name: one file each, and `package.module:factory` for all others.

To add a network: its file with a settings class and a function that builds it, its line in `ModelSettings` and in
`build`, one test.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag
from torch import nn

from compress.models.factory import Factory, build_factory, source
from compress.models.head import check
from compress.models.mobilenet_v2 import MobileNetV2Settings, build_mobilenet_v2
from compress.models.weights import file_sha256, load_weights
from compress.progress import Progress

__all__ = ["ModelSettings", "build", "check", "file_sha256", "inputs", "load_weights"]


def _kind(section: Any) -> str | None:
    use = section.get("use") if isinstance(section, dict) else getattr(section, "use", None)
    if isinstance(use, str) and ":" in use:
        return "factory"
    return "mobilenet_v2" if use == "mobilenet_v2" else None


ModelSettings = Annotated[
    Annotated[MobileNetV2Settings, Tag("mobilenet_v2")] | Annotated[Factory, Tag("factory")],
    Discriminator(
        _kind,
        custom_error_type="no_such_model",
        custom_error_message="`use` must be mobilenet_v2, or package.module:factory for a network of your own",
    ),
]


def inputs(settings: MobileNetV2Settings | Factory, base: Path) -> list[Path]:
    """Files outside our code whose change makes another network: weights, and the source of a factory already called.

    Of one's own code only the file that holds the factory counts, not what it imports.
    """
    code = source(settings) if isinstance(settings, Factory) else None
    return [path for path in (base / settings.weights if settings.weights else None, code) if path is not None]


def build(
    settings: MobileNetV2Settings | Factory,
    num_classes: int,
    input_size: int,
    progress: Progress | None = None,
) -> nn.Module:
    """The network in eval mode, with `num_classes` outputs and fresh weights (or those its factory gives it).

    Fresh weights come from torch's global random state. `settings.weights` is not read here: see `load_weights`.
    Raises ModelError.
    """
    match settings:
        case MobileNetV2Settings():
            return build_mobilenet_v2(settings, num_classes, input_size).eval()
        case Factory():
            note = progress.note if progress is not None else lambda text: None
            return build_factory(settings, num_classes, input_size, note).eval()
