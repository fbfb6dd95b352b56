"""What an image can be labelled with. Read also where there is no torch: on boards, and by the gate in a CI job."""

from typing import Literal

Task = Literal["classification", "multi_label", "regression"]
"""One class of several; some of several labels; one or more numbers. `compress.tasks` has the rules of each."""
