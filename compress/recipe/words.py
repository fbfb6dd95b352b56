"""How a mistake in a recipe is worded: one line, values shown short, the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

Keys = tuple[str | int, ...]
"""Where a value stands in a recipe, such as ("stages", 1, "goal")."""


def plain(text: str) -> str:
    """The text on one line, with what a terminal cannot show escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))


def shown(value: Any) -> str:
    """A value as YAML would have it, in few characters."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return plain(f"'{value}'" if len(value) <= 40 else f"'{value[:39]}…'")
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return repr(value)


def dotted(keys: Keys) -> str:
    return ".".join(plain(str(key)) for key in keys)


def did_you_mean(name: Any, known: Sequence[str], then: str = "") -> str:
    """`; did you mean 'x'?` if one of `known` is near, then `then`; made to be put after a problem."""
    near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    guess = f"; did you mean '{plain(near[0])}'?" if near else ""
    return guess + (f"{' ' if near else '; '}{then}" if then else "")
