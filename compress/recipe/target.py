"""What a recipe may name as its target; which names there are, `compress.targets` knows."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from compress.errors import TargetError
from compress.recipe.words import did_you_mean, shown
from compress.targets import NAMES, check_name


def _known(name: str) -> str:
    try:
        return check_name(name)
    except TargetError as error:
        guess = did_you_mean(name, NAMES, error.way_out)
        raise ValueError(f"{shown(name)}: {error.problem}{guess}") from error


TargetName = Annotated[str, AfterValidator(_known)]
