"""Takes whole channels out of a network until it needs no more than a given share of its multiply-adds.

`prune_network` is what stages and training schemes call; `Pruning` says what goes first and what has to stay.

    limits    how narrow each layer may become
    ranking   which channels of coupled layers matter least
    goal      what a network would cost, by the number of channels that stay
    choose    how many channels stay where, and which
    network   all of it in turn, in one step or several
"""

from compress.pruning.goal import MacGoal
from compress.pruning.network import Pruning, prune_network, refuse_unreachable

__all__ = ["MacGoal", "Pruning", "prune_network", "refuse_unreachable"]
