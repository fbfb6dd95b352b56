"""What can go wrong through no fault of the code, each said in one line: the place, the problem, the way out.

CompressError
├── RecipeError      the recipe: every mistake of the file at once, one line each
├── DataError        images, classes, splits
├── ModelError       factories, weights, structures, operators that a stage cannot handle
├── TrainingError    a loss that is not finite
├── TargetError      a machine that cannot measure
├── RunFolderError   a run's folder that the report cannot read (in compress.report)
├── BaselineError    a file or folder that cannot be judged against or judged (in compress.gate)
├── LostError        one of torchrun's processes that is not there any more
└── GateError        a bound of the recipe that the result does not hold (parity)
"""

from compress.shown import one_line


class CompressError(Exception):
    """A mistake the user can mend. `place` is a file, a recipe key, a stage or a layer."""

    def __init__(self, place: object, problem: str, way_out: str = "") -> None:
        self.place = str(place)
        self.problem = problem
        self.way_out = way_out
        super().__init__(str(place), problem, way_out)  # as given, so that the error survives a trip between processes

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.problem}" + (f"; {self.way_out}" if self.way_out else ""))


class RecipeError(CompressError):
    """All mistakes of one recipe; `lines` holds one sentence each."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.place, self.problem, self.way_out = "recipe", f"{len(lines)} mistakes", ""
        Exception.__init__(self, lines)

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.lines))


class DataError(CompressError):
    pass


class ModelError(CompressError):
    pass


class TrainingError(CompressError):
    pass


class TargetError(CompressError):
    pass


class GateError(CompressError):
    pass


class LostError(CompressError):
    """Another process has ended; `first` in one of those that are left, which says so for all."""

    def __init__(self, first: bool) -> None:
        self.first = first
        way_out = "the same command goes on from the last finished epoch, with as many processes as you like"
        super().__init__("torchrun", "another process of this run has ended, so this one ends too", way_out)

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return LostError, (self.first,)
