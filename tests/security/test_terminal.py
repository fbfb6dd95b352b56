"""Names of files and classes, and what libraries say, cannot act as a terminal's commands."""

import io

import pytest

from compress.cli import console as consoles
from compress.cli.console import Shown
from compress.progress import RichProgress

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31mname\u202e"


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def shown(request, monkeypatch) -> io.StringIO:
    stream = io.StringIO()
    console = Shown(file=stream, force_terminal=request.param, width=200, color_system=None)
    monkeypatch.setattr(consoles, "output", console)
    monkeypatch.setattr(consoles, "messages", console)
    return stream


def refused(text: str) -> None:
    for part in ("\x1b]0", "\x07", "\x9b", "\u202e", "\x1b[2J"):
        assert part not in text
    assert "name" in text


def test_lines_warnings_and_tables(shown):
    consoles.say(EVIL)
    consoles.warn("note", EVIL)
    consoles.show_rows([{"file": EVIL, EVIL: "x"}], EVIL)
    refused(shown.getvalue())


def test_bars_and_notes(shown):
    progress = RichProgress(consoles.output)
    with progress.steps(EVIL, 2) as advance:
        advance(EVIL)
    progress.note(EVIL)
    refused(shown.getvalue())


def test_names_that_are_no_text_can_be_shown(shown):
    consoles.say("caf\udce9.png")
    shown.getvalue().encode()
