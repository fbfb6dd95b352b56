"""What decides which channels go: one file per criterion.

A criterion is a settings class that is called with the `Evidence` of one set of coupled channels and returns one score
per unit, zero or more; the lowest go first. It says what it `needs` of it. Pruning divides the scores by their mean, so
they need be comparable within the set only; a criterion whose scores already compare layers says `across_layers = True`
and is left as it is. To add a criterion: its file, its name in `CriterionSettings`, one test.
"""

from typing import Annotated

from pydantic import Field

from compress.criteria.activation import Activation
from compress.criteria.bn_scale import BNScale
from compress.criteria.evidence import Evidence
from compress.criteria.fisher import Fisher
from compress.criteria.fpgm import FPGM
from compress.criteria.lamp import LAMP
from compress.criteria.magnitude import Magnitude
from compress.criteria.obd import OBD
from compress.criteria.random import Random
from compress.criteria.taylor import Taylor

__all__ = ["CriterionSettings", "Evidence"]

CriterionSettings = Annotated[
    Magnitude | Taylor | BNScale | LAMP | FPGM | Fisher | OBD | Activation | Random, Field(discriminator="use")
]
