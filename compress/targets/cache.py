"""Where things are kept that can be had again: userlands, and what an interrupted measurement has found."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/compress`, by default `~/.cache/compress`; not made here."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if Path(named).is_absolute() else Path.home() / ".cache") / "compress"
