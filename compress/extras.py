"""Packages that only some need: named in pyproject's extras, imported by the one file that uses them."""

from __future__ import annotations

import importlib
from types import ModuleType

from compress.errors import CompressError


def need(module: str, extra: str, place: str) -> ModuleType:
    """The imported module. Raises CompressError at `place` with the line that installs it where it is missing.

    A package that is installed but does not import is named with its reason, and not called missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or (module != error.name and not module.startswith(f"{error.name}.")):
            raise CompressError(place, f"importing `{module}` raised {error}") from error
        way_out = f"pip install 'compress[{extra}]'"
        raise CompressError(place, f"needs the package `{module.partition('.')[0]}`", way_out) from None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise CompressError(place, f"importing `{module}` raised {type(error).__name__}: {said}") from error
