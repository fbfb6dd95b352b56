"""The network before anything was taken from it, as teacher."""

from typing import Literal

from compress.product import Product, Run
from compress.settings import Settings
from compress.teachers.teacher import Frozen, Teacher


class Parent(Settings):
    """The original network: it shares layers, sizes of maps and the order of channels with a pruned student."""

    use: Literal["parent"]

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return ()

    def open(self, product: Product, run: Run) -> Teacher:
        return Frozen(product.original, run, related=True)
