"""The base of everything a recipe can say."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

SEVERAL = "several_mistakes"
"""Type of a validator's PydanticCustomError whose context holds `mistakes`, a list of (keys, problem)."""


class Settings(BaseModel):
    """Frozen and strict: no unknown field, no silent conversion, no NaN.

    A recipe is validated in pydantic's JSON mode, where a YAML list may fill a tuple and an int may fill a float, but
    the string "3" is no number and `yes` no boolean.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def named_or_own(names: Sequence[str]) -> Callable[[Any], str | None]:
    """The tag of a section whose `use` is one of `names`, or `factory` for package.module:function; None for others.

    The section is a mapping of a recipe, or settings.
    """

    def kind(section: Any) -> str | None:
        use = section.get("use") if isinstance(section, dict) else getattr(section, "use", None)
        if isinstance(use, str) and ":" in use:
            return "factory"
        return use if use in names else None

    return kind
