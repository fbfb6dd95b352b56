"""Any network: a function `package.module:factory` that returns it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from compress.errors import ModelError
from compress.models.head import check, output_classes, replace_head
from compress.models.torchvision_models import import_torchvision
from compress.settings import Settings


class Factory(Settings):
    """A network of your own, or of another package: `torchvision.models:resnet18`, `my_net:small` for ./my_net.py."""

    use: str = Field(pattern=r"^[^\s:]+:[^\s:]+$")
    """`package.module:name` of a function that returns the network. The current directory is searched first."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What the function is called with, besides `num_classes`."""
    weights: str | None = None
    """A .safetensors, .pth or .pt file to start from; null keeps the factory's own weights."""


def build_factory(
    settings: Factory, num_classes: int, input_size: int, note: Callable[[str], None], channels: int = 3
) -> nn.Module:
    """The factory's network with one output per class.

    `num_classes` is passed to a factory that takes it. If the network still has another number of outputs, its last
    linear layer is replaced and `note` says so. Raises ModelError for whatever goes wrong in the user's code.
    """
    place = f"model {settings.use}"
    if "num_classes" in settings.args:
        raise ModelError(place, "`args` has num_classes", "leave it out: the data says how many classes there are")
    with importable(Path.cwd()):
        factory = find(settings.use, place)
        extra = {"num_classes": num_classes} if takes(factory, "num_classes") else {}
        try:
            module = factory(**settings.args, **extra)
        except (Exception, SystemExit) as error:
            raise ModelError(place, f"raised {_said(error)}") from error
        if not isinstance(module, nn.Module):
            raise ModelError(place, f"returned {type(module).__name__}", "it must return a torch.nn.Module")
        if output_classes(module, input_size, place, channels) != num_classes:
            note(replace_head(module, num_classes, place))
            check(module, num_classes=num_classes, input_size=input_size, place=place, channels=channels)
    return module


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` can be called with a keyword argument `name`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C do not say
        return False
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.kind is p.VAR_KEYWORD or (p.name == name and p.kind in keyword) for p in parameters)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` first on the import path: unlike `python -m`, a console script does not search where it is called."""
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def find(use: str, place: str) -> Callable[..., Any]:
    path, _, name = use.partition(":")
    if path.partition(".")[0] in ("torchvision", "timm", "transformers") and importlib.util.find_spec("torchvision"):
        import_torchvision(place)
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            raise ModelError(
                place, f"no module `{error.name}`", f"searched in {Path.cwd()} and the installed packages"
            ) from None
        raise ModelError(place, f"importing `{path}` raised {_said(error)}") from error
    except (Exception, SystemExit) as error:  # of a script that reads its command line
        raise ModelError(place, f"importing `{path}` raised {_said(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), 3)
            hint = f"did you mean {', '.join(near)}?" if near else ""
            raise ModelError(place, f"`{path}` has no `{name}`", hint)
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(place, f"`{name}` is {type(found).__name__}, not a function")
    return found


def _said(error: BaseException) -> str:
    """Kind and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
