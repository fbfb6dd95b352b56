"""Machines that measure: the one `compress` runs on, a board over ssh, an emulated ARM userland.

`agent.py` does the measuring on each of them, a `Machine` carries it there, `asking` says what to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import TargetError
from compress.targets.asking import RUNTIMES, Comparison, Measuring, Runtime
from compress.targets.local import Local, open_model
from compress.targets.machine import Machine

if TYPE_CHECKING:  # the image for boards, and its kin, may do without what shows progress
    from compress.progress import Progress

__all__ = [
    "NAMES",
    "RUNTIMES",
    "Comparison",
    "Machine",
    "Measuring",
    "Runtime",
    "check_name",
    "is_emulated",
    "open_model",
    "open_target",
]

NAMES = ("local", "emulated", "emulated:cortex-a53", "emulated:cortex-a72", "emulated:cortex-a76")
"""Targets without a host; a board is `ssh://user@host[:port]`."""


def is_emulated(name: str) -> bool:
    """Whether the target computes what an ARM core would and takes its own time for it."""
    return name.partition(":")[0] == "emulated"


def open_target(
    name: str, progress: Progress, *, setup: bool = False, runtimes: Sequence[Runtime] = RUNTIMES
) -> Machine:
    """The machine that a recipe or a command names, not yet entered: it connects when it is.

    With `setup` a board gets an environment of its own with numpy and `runtimes`. Raises TargetError for a name that is
    none.
    """
    check_name(name)
    if name.startswith("ssh://"):
        from compress.targets.ssh import Ssh

        return Ssh(name, setup=setup, runtimes=tuple(runtimes), progress=progress)
    if setup:
        raise TargetError(f"target {name}", "there is nothing to set up", "leave out --setup")
    if is_emulated(name):
        from compress.targets.emulated import Emulated

        return Emulated(name, progress=progress)
    return Local()


def check_name(name: str) -> str:
    """The name of a target. Raises TargetError for one that no machine goes by; nothing is connected."""
    if name == "local":
        return name
    if name.startswith("ssh://"):
        from compress.targets.ssh import parse

        parse(name)
        return name
    if is_emulated(name):
        from compress.targets.emulated import parse as parse_emulated

        parse_emulated(name)
        return name
    raise TargetError(f"target {name}", "no such target", f"known: {', '.join(NAMES)}, ssh://user@host[:port]")
