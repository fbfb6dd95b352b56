"""Takes whole channels and blocks out of a network until it is small enough, or its int8 file fast enough.

`prune_network` (multiply-adds) and `prune_to_time` are what stages and training schemes call; `Pruning` says what goes
first and what has to stay.

    limits      how narrow each layer may become
    ranking     which channels of coupled layers matter least
    goal        what pruning aims at, and what a network would cost, by the number of channels that stay
    choose      how many channels stay where, and which
    network     all of it in turn, in one step or several
    importance  what each set of channels is worth, measured
    timed       widths and blocks as choices with times, for the solver
    solved      all of it in turn, for a goal of speed
"""

from compress.pruning.goal import FpsGoal, Goal, MacGoal, SpeedupGoal, TimeGoal
from compress.pruning.network import Pruning, prune_network, refuse_unreachable
from compress.pruning.solved import prune_to_time, refuse_untimed, sensitivity, units_left

__all__ = [
    "FpsGoal",
    "Goal",
    "MacGoal",
    "Pruning",
    "SpeedupGoal",
    "TimeGoal",
    "prune_network",
    "prune_to_time",
    "refuse_unreachable",
    "refuse_untimed",
    "sensitivity",
    "units_left",
]
