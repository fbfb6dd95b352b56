"""A first recipe for a network and images that nobody here has seen: `compress init`."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from compress import recipe as recipes
from compress.errors import CompressError
from compress.progress import Progress
from compress.starting.images import Seen, look
from compress.starting.network import Chosen, choose
from compress.starting.plan import planned
from compress.starting.text import recipe_text

__all__ = ["Started", "start"]


@dataclass(frozen=True)
class Started:
    """A recipe that was written, and what is to be known of it."""

    path: Path
    text: str
    notes: list[str] = field(default_factory=list)


def start(
    *, model: str, data: str, weights: str | None, target: str, path: Path | None, progress: Progress, base: Path
) -> Started:
    """Looks at the images and the network, and writes a recipe with reasons beside its settings.

    `model` is `mobilenet_v2`, `torchvision:NAME`, `timm:NAME`, `huggingface:NAME` or `package.module:factory`; `data` a
    folder, a zip archive, a table (.csv) or `digits`. Raises CompressError for what cannot be used, and for a file that
    is there already: nothing is overwritten.
    """
    images: Seen = look(data, base, progress)
    network: Chosen = choose(model, weights, images, base, progress)
    name = _name(model, data)
    place = path or Path(f"{name}.yaml")
    refused = CompressError(place, "is there already", "choose another name with -o, or remove it")
    if os.path.lexists(place):
        raise refused
    called = place.stem if _fits(place.stem) else name
    text = recipe_text(called, place, images, network, planned(images, network), target)
    with tempfile.TemporaryDirectory() as folder:  # what is written is known to be a recipe
        draft = Path(folder) / "recipe.yaml"
        draft.write_text(text, encoding="utf-8")
        recipes.load(draft, [])
    try:
        with place.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise refused from None
    except OSError as error:
        raise CompressError(place, f"cannot be written ({error.strerror})", "choose another place with -o") from None
    return Started(place, text, [*images.notes, *network.notes])


def _name(model: str, data: str) -> str:
    """`resnet18_photos` for torchvision:resnet18 and ../photos.zip."""
    parts = [model.rpartition(":")[2] if ":" in model else model, Path(data).name.partition(".")[0]]
    words = [re.sub(r"[^a-z0-9]+", "_", part.rpartition("/")[2].lower()).strip("_") for part in parts]
    return "_".join(word for word in words if word)[:60].strip("_") or "first"


def _fits(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) is not None
