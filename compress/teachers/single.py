"""The teachers that are one network each."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from compress.teachers.earlier_epochs import EarlierEpochs
from compress.teachers.itself import Itself
from compress.teachers.moving_average import MovingAverage
from compress.teachers.parent import Parent
from compress.teachers.saved import Saved
from compress.teachers.stage import Stage

Single = Parent | Saved | Stage | Itself | MovingAverage | EarlierEpochs


def spelled_out(value: Any) -> Any:
    """`parent` and a folder's name are short for the mappings they mean."""
    if isinstance(value, str):
        return {"use": "parent"} if value == "parent" else {"use": "saved", "path": value}
    if isinstance(value, dict):
        # Behind a function pydantic does not know any more that a list is JSON's, where it may fill a tuple.
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    return value


_Mapping = Annotated[Single, Field(discriminator="use")]
SingleTeacher = Annotated[_Mapping, BeforeValidator(spelled_out, json_schema_input_type=_Mapping | str)]
