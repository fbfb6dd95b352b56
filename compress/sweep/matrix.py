"""The cells of a sweep: every combination of the values that some settings of a recipe are to have."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.recipe import Recipe
from compress.recipe.words import plain

SEED = "seed"
MOST = 1000
"""Cells of a sweep: more is a slip of the hand, and each is a run."""
NAME_LENGTH, VALUE_LENGTH = 120, 40


@dataclass(frozen=True)
class Parameter:
    """A setting and the values that it is to have, as the user wrote them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination: a recipe to run."""

    name: str
    """Of its folder: `macs=0.25_seed=1`."""
    values: tuple[tuple[str, str], ...]
    """Key and value of each parameter, the seed among them where it is swept."""
    overrides: tuple[str, ...]
    """What makes its recipe from the file, as `compress run` takes it."""
    recipe: Recipe

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The values without the seed: cells that share them are repetitions of one another."""
        return tuple(pair for pair in self.values if pair[0] != SEED)


def parameter(text: str) -> Parameter:
    """`key=a,b,c` taken apart; a comma within brackets, braces or quotes belongs to its value. Raises RecipeError."""
    key, equals, listed = text.partition("=")
    key, place = key.strip(), f"-p '{plain(text if len(text) <= 60 else text[:59] + '…')}'"
    if not equals or not key:
        raise RecipeError([f"{place}: write key=value,value, such as stages.prune.goal.macs=0.25,0.5"])
    values = tuple(value.strip() for value in _parted(listed))
    mistakes = []
    if not all(values):
        mistakes.append(f"{place}: a value is empty; write '' for an empty text")
    twice = [value for value, count in Counter(values).items() if count > 1 and value]
    mistakes += [f"{place}: {plain(value)} is given twice; leave one out" for value in twice]
    if mistakes:
        raise RecipeError(mistakes)
    return Parameter(key, values)


def _parted(text: str) -> list[str]:
    """The text between the commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and not parts[-1].strip(" [{:,"):
            quote = char  # an apostrophe within a word is none
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def cells(path: Path, parameters: Sequence[str], overrides: Sequence[str] = (), seeds: int | None = None) -> list[Cell]:
    """Every combination, the last parameter varying fastest, each with its validated recipe.

    `seeds` repeats each combination with so many seeds, counted from the recipe's own. Raises RecipeError with all
    mistakes of all combinations, each once.
    """
    mistakes: list[str] = []
    found: list[Parameter] = []
    for text in parameters:
        try:
            found.append(parameter(text))
        except RecipeError as error:
            mistakes += error.lines
    own = {override.partition("=")[0].strip() for override in overrides}
    for key, count in Counter(one.key for one in found).items():
        if count > 1:
            mistakes.append(f"-p {plain(key)}: given {count} times; write all its values after one -p")
        if key in own:
            mistakes.append(f"-p {plain(key)}: also set by the override '{plain(key)}=…'; leave one of them out")
    if seeds is not None and (SEED in own or any(one.key == SEED for one in found)):
        mistakes.append(f"--seeds {seeds}: the seed is given already; leave one of them out")
    if not found and seeds is None:
        mistakes.append("nothing to sweep over: give -p key=value,value or --seeds 3")
    if mistakes:
        raise RecipeError(mistakes)
    if seeds is not None:
        first = recipes.load(path, overrides).seed
        found.append(Parameter(SEED, tuple(str(first + number) for number in range(seeds))))
    count = 1
    for one in found:
        count *= len(one.values)
    if count > MOST:
        raise RecipeError([f"{count:,} combinations, and at most {MOST:,} make a sweep; leave values out"])
    return _loaded(path, found, overrides)


def _loaded(path: Path, parameters: Sequence[Parameter], overrides: Sequence[str]) -> list[Cell]:
    """Raises RecipeError: what is wrong with every combination is said as it is, other lines begin with the first."""
    keys = [one.key for one in parameters]
    combinations = [
        tuple(zip(keys, values, strict=True)) for values in itertools.product(*(one.values for one in parameters))
    ]
    names = cell_names(combinations)
    made: list[Cell] = []
    mistakes: dict[str, list[str]] = {}
    for name, values in zip(names, combinations, strict=True):
        own = (*overrides, *(f"{key}={value}" for key, value in values))
        try:
            made.append(Cell(name, values, own, recipes.load(path, own)))
        except RecipeError as error:
            for line in error.lines:
                mistakes.setdefault(line, []).append(name)
    if mistakes:
        raise RecipeError([_said(line, where, len(names)) for line, where in mistakes.items()])
    return made


def _said(line: str, where: list[str], count: int) -> str:
    if len(where) == count or line.startswith("override '"):  # which names the value itself
        return line
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f"{where[0]}{more}: {line}"


def cell_names(combinations: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """A folder's name for each combination: `macs=0.25_seed=1`, all different."""
    short = short_keys([key for key, _ in combinations[0]])
    names = []
    for values in combinations:
        name = "_".join(f"{short[key]}={_plainly(value)}" for key, value in values)
        if len(name) > NAME_LENGTH:
            name = f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        names.append(name)
    counted = Counter(name.lower() for name in names)  # some file systems do not tell A from a
    return [
        name if counted[name.lower()] == 1 else f"{name}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"
        for name, values in zip(names, combinations, strict=True)
    ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The end of each dotted key that no other of them has: `stages.prune.goal.macs` is `macs`."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        found[key] = _plainly(next(alone, key))
    return found


def _plainly(text: str) -> str:
    """The text without what a shell, a file system or a web page would read otherwise."""
    kept = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "none"
    if kept.startswith(("+", "-")) or text.lstrip().startswith("-"):
        kept = f"-{kept.lstrip('-')}"
    if len(kept) <= VALUE_LENGTH:
        return kept
    return f"{kept[: VALUE_LENGTH - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
