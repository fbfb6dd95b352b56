"""Who teaches: one file per kind of teacher.

A settings class with `open(product, run) -> Teacher` and `folders()`, the networks it reads from outside the run. To
add one: its file, its name in `Single` (compress/teachers/single.py), one test.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field

from compress.teachers.earlier_epochs import EarlierEpochs
from compress.teachers.moving_average import MovingAverage
from compress.teachers.several import Several
from compress.teachers.single import Single, spelled_out
from compress.teachers.stage import Stage

_Mapping = Annotated[Single | Several, Field(discriminator="use")]
TeacherSettings = Annotated[_Mapping, BeforeValidator(spelled_out, json_schema_input_type=_Mapping | str)]


def everyone(teacher: Single | Several) -> tuple[Single, ...]:
    """The teacher, or each of several."""
    return teacher.teachers if isinstance(teacher, Several) else (teacher,)


def changes(teacher: Single | Several) -> bool:
    """Whether its answers to an image change during the training, so that they cannot be kept."""
    drawn = isinstance(teacher, Several) and teacher.combine == "random"
    return drawn or any(isinstance(single, MovingAverage | EarlierEpochs) for single in everyone(teacher))


def has_features(teacher: Single | Several) -> bool:
    """Whether it answers losses on what layers return."""
    return not isinstance(teacher, Several) or teacher.features_from is not None


def stages_named(teacher: Single | Several) -> tuple[str, ...]:
    """The folders of this run's earlier stages that it names."""
    return tuple(single.folder for single in everyone(teacher) if isinstance(single, Stage))
