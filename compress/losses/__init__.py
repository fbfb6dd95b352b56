"""What a student is taught with: one file per loss.

Each is a settings class with a `weight`, called with the logits (N, K) of student and teacher, that returns a scalar.
To add one: its file, its name in `LossSettings`, one test.
"""

from typing import Annotated

from pydantic import Field

from compress.losses.kd import SoftTargets
from compress.losses.l2 import LogitsL2

LossSettings = Annotated[SoftTargets | LogitsL2, Field(discriminator="use")]
