"""How a training goes in which more is trained than the student: one file per scheme.

A settings class with `check(module, preprocess)`, which refuses what cannot work before anything is trained, and
`train(settings, product, run, label) -> (module, metrics)`; `settings` are the stage's own (how long, how fast, who
teaches, what counts). There is one training loop, `fit`: whatever is trained besides the student is its `companion`. To
add one: its file, its name in `SchemeSettings`, one test.
"""

from typing import Annotated

from pydantic import Field

from compress.schemes.assistants import Assistants
from compress.schemes.born_again import BornAgain
from compress.schemes.codistillation import Codistillation
from compress.schemes.data_free import DataFree
from compress.schemes.deeper_to_shallower import DeeperToShallower
from compress.schemes.hard_examples import HardExamples
from compress.schemes.mutual import MutualLearning
from compress.schemes.netaug import NetAug
from compress.schemes.okddip import Okddip
from compress.schemes.one_branches import One

SchemeSettings = Annotated[
    Assistants
    | BornAgain
    | Codistillation
    | DataFree
    | DeeperToShallower
    | HardExamples
    | MutualLearning
    | NetAug
    | Okddip
    | One,
    Field(discriminator="use"),
]
