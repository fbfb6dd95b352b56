"""Layers by name: what a recipe's patterns mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator

from compress.errors import ModelError

REGEX = "re:"


def _compiles(pattern: str) -> str:
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A layer's name with wildcards (`features.3.*`), or `re:` and a regular expression for the whole name."""


def matching_any(
    patterns: Sequence[str], names: Sequence[str], *, field: str, place: str, kind: str = "layer"
) -> set[str]:
    """The names that one of the patterns means, each of which means at least one. Raises ModelError as `matching`."""
    return {name for pattern in patterns for name in matching(pattern, names, field=field, place=place, kind=kind)}


def matching(pattern: str, names: Sequence[str], *, field: str, place: str, kind: str = "layer") -> list[str]:
    """The names that a pattern means, at least one. Raises ModelError, listing similar names."""
    if pattern.startswith(REGEX):
        found = [name for name in names if re.fullmatch(pattern.removeprefix(REGEX), name)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        close = get_close_matches(pattern.removeprefix(REGEX), names, n=3, cutoff=0.4) or names[:3]
        raise ModelError(place, f"`{field}: {pattern}` matches no {kind}", f"close: {', '.join(close)}")
    return found
