"""What decides which channels go: one file per criterion.

A criterion is a settings class that is called with the weights of one set of coupled channels and returns one score per
channel, zero or more; the lowest go first. Pruning divides the scores by their mean, so they need be comparable
within the set only. To add a criterion: its file, its name in `CriterionSettings`, one test.

    weights     one (C, elements) tensor for every layer that loses something with these channels, row c with channel c:
                the filters that make the channel, its BatchNorm scale, the slices of the filters that read it
    gradients   the same for the loss's gradients, as root mean squares over mini-batches of training images;
                empty unless the class says `needs_gradients = True`
    generator   the only source of randomness
"""

from typing import Annotated

from pydantic import Field

from compress.criteria.magnitude import Magnitude
from compress.criteria.random import Random
from compress.criteria.taylor import Taylor

CriterionSettings = Annotated[Magnitude | Taylor | Random, Field(discriminator="use")]
