"""Text that may be shown and kept: without secrets, and without what a terminal obeys.

Names of files and classes, messages of libraries and what a board answers may hold anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that turn the direction of text, halves of characters."""
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH", re.I)
"""Names of environment variables whose values nothing may show."""
NO_SECRET = re.compile(r"SSH_AUTH_SOCK|XAUTHORITY")
"""Names that look so and hold paths."""
SHORTEST_SECRET = 8
"""Characters; shorter values (`1`, `true`, `enabled`) would blot out words that are none."""
IN_ADDRESS = re.compile(r"(?<=://)([^\s/@:]*):[^\s/@]+@")
"""`user:password@` of an address."""
TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_)[A-Za-z0-9_]{16,}")
"""Access tokens that say by their first letters what they are."""


def visible(text: str) -> str:
    """The text with what a terminal would obey written out: an escape character becomes the four letters \\x1b."""
    return OBEYED.sub(lambda found: ascii(found.group())[1:-1], text)


def one_line(text: str) -> str:
    """The text as one line that may be shown."""
    return visible(without_secrets(" ".join(text.split("\n"))))


def without_secrets(value: Any) -> Any:
    """Text or JSON with `***` for passwords in addresses, known kinds of tokens, and the environment's secrets."""
    return _masked(value, _secrets())


def _secrets() -> list[str]:
    """Values of environment variables that are called a secret, the longest first."""
    found = {text for name, text in os.environ.items() if SECRET.search(name) and not NO_SECRET.fullmatch(name)}
    return sorted((text for text in found if len(text.strip()) >= SHORTEST_SECRET), key=len, reverse=True)


def _masked(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return TOKEN.sub(r"\1***", IN_ADDRESS.sub(r"\1:***@", value))
    if isinstance(value, Mapping):
        return {key: _masked(item, secrets) for key, item in value.items()}
    return [_masked(item, secrets) for item in value] if isinstance(value, (list, tuple)) else value
