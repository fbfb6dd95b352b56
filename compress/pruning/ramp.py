"""How much may be left on the way to a goal."""

from __future__ import annotations

from typing import Literal

Ramp = Literal["geometric", "cubic"]


def share_left(part: float, goal: float, ramp: Ramp) -> float:
    """Which share of the multiply-adds may be left after that part, in [0, 1], of the way to `goal`.

    `geometric`: each round takes the same share of what is left. `cubic`: 1 - (1 - goal) * (1 - (1 - part)**3), most of
    it early, when the network can still recover: Zhu & Gupta, 2017 (arXiv:1710.01878), equation 1 (AGP), with the share
    of multiply-adds that goes in the place of the share of weights.
    """
    if ramp == "geometric":
        return float(goal**part)
    return 1 - (1 - goal) * (1 - (1 - part) ** 3)
