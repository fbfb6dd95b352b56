"""Words that several parts of a diagnosis need."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """`1 layer at risk`, `2 layers at risk`: the first word is the one that counts."""
    first, space, rest = what.partition(" ")
    return f"{count} {first}{'' if count == 1 else 's'}{space}{rest}"
