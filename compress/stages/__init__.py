"""What a recipe can do to a network, one file per stage.

A stage is a settings class with `apply(product, run) -> Product`. It never saves, times or logs its own result; the
pipeline does that once. A stage may have `check(module, preprocess)`, which is asked before anything is trained.
To add one: its file, its name in `StageSettings`, one test.
"""

from typing import Annotated

from pydantic import Field

from compress.stages.benchmark import Benchmark
from compress.stages.cluster import Cluster
from compress.stages.distill import Distill
from compress.stages.export import Export
from compress.stages.factorize import Factorize
from compress.stages.knowledge import Knowledge
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.stages.sparsify import Sparsify
from compress.stages.train import Train
from compress.stages.verify import Verify

StageSettings = Annotated[
    Train | Prune | Factorize | Sparsify | Cluster | Distill | Quantize | Knowledge | Export | Verify | Benchmark,
    Field(discriminator="use"),
]
