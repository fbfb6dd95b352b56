"""The network that an earlier stage of the same run left, as teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from compress import checkpoint, manifest
from compress.errors import ModelError
from compress.product import Product, Run
from compress.settings import Settings
from compress.teachers.teacher import Frozen, Teacher, refuse_other_task
from compress.written import read_json

LOADED = "00-load"
"""The folder of the network as it came, before the first stage."""


class Stage(Settings):
    """The network after a stage of this run, by the stage's folder: `04-distill`, or `00-load` for how it came."""

    use: Literal["stage"]
    folder: str
    """The stage's number and name, as in `runs/x/stages`; it comes before the stage that learns."""

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return ()

    def open(self, product: Product, run: Run) -> Teacher:
        """Raises ModelError where the run has no such stage before this one."""
        place = f"stage {run.stage or 'distill'}: teacher"
        stages = run.folder.parent
        earlier = sorted(path.name for path in stages.glob("[0-9][0-9]-*") if (path / manifest.NAME).is_file())
        # Folders of a longer run that was in this place before may still lie here.
        earlier = [name for name in earlier if name[:2] < run.folder.name[:2]]
        if self.folder not in earlier:
            known = f"they are {', '.join(earlier)}" if earlier else "this one is the first"
            raise ModelError(place, f"no stage `{self.folder}` comes before this one", known)
        network = checkpoint.load(_left_by(stages / self.folder))
        refuse_other_task(network, run.data, place)
        return Frozen(network, run, related=True)


def _left_by(stage: Path) -> Path:
    """The folder of the network after a stage, which is an earlier one's where the stage changed no weights."""
    reference = read_json(stage / manifest.NAME).get("product", {}).get("network")
    return stage.parent.parent / reference if reference else stage / "network"


def mistake(folder: str, before: Sequence[str]) -> str | None:
    """What is wrong with `Stage.folder` in a recipe whose stages `before` have these names; None for nothing."""
    known = [LOADED, *(f"{number:02d}-{use}" for number, use in enumerate(before, 1))]
    if folder in known:
        return None
    return f"no stage `{folder}` comes before this one; they are {', '.join(known)}"
