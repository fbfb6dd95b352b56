"""The student as it entered the stage, as teacher."""

from typing import Literal

from compress.product import Product, Run
from compress.settings import Settings
from compress.teachers.teacher import Frozen, Teacher


class Itself(Settings):
    """A copy of the network as the stages before left it, which stays as it is.

    For `quantize` that is the float network before quantization; after pruning it is as bad as pruning left it.
    """

    use: Literal["itself"]

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return ()

    def open(self, product: Product, run: Run) -> Teacher:
        return Frozen(product.network, run, related=True)
