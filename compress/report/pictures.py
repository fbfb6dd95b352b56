"""The pictures of a run, as they stand in a page: in its text, so that the page is one file."""

from __future__ import annotations

import base64
from pathlib import Path

LARGEST = 256 * 1024
"""Bytes of a picture; a page holds some dozens."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def embedded(run_folder: Path, name: str) -> str:
    """A PNG of the run's folder as a data URI; "" where there is none by that name, or it is something else.

    A name that leads out of the folder, by itself or by a link, is none.
    """
    root = run_folder.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file() or path.stat().st_size > LARGEST:
            return ""
        content = path.read_bytes()
    except (OSError, ValueError, RuntimeError):  # a name with a null byte, links in a circle
        return ""
    if not content.startswith(SIGNATURE):
        return ""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
