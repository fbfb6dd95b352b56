"""A network that was saved before, as teacher."""

from pathlib import Path
from typing import Literal

from compress import checkpoint
from compress.product import Product, Run
from compress.settings import Settings
from compress.teachers.teacher import Frozen, Teacher, refuse_other_task


class Saved(Settings):
    """A network in a folder, such as `runs/other/stages/01-train/network`."""

    use: Literal["saved"]
    path: str

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return (self.path,)

    def open(self, product: Product, run: Run) -> Teacher:
        """Raises ModelError for a folder without a network, or one for another task."""
        network = checkpoint.load(Path(self.path))
        refuse_other_task(network, run.data, self.path)
        return Frozen(network, run, related=False)
