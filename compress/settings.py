"""The base of everything a recipe can say."""

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
