"""`compress report --open` and `compress index`, as commands."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path

import pytest
from test_report import TRAIN, WHOLE, write_run

from compress import cli

DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was given to the browser, on a machine that has a display and a browser."""
    found: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda address: not found.append(address))
    return found


def compress(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_report_is_opened_where_there_is_a_browser(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "a run", WHOLE)
    assert compress(monkeypatch, "report", folder) == 0
    assert opened == []
    assert compress(monkeypatch, "report", folder, "--open") == 0
    assert opened == [(folder / "report.html").as_uri()]


def test_without_a_display_the_path_is_said(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", (TRAIN,))
    for name in DISPLAYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert compress(monkeypatch, "report", folder, "--open") == 0
    assert opened == []  # a text browser would take the terminal over
    said = "".join(capsys.readouterr())
    assert f"no browser can be opened here: open {folder / 'report.html'} where there is one" in said


@pytest.mark.parametrize(
    "fails", [lambda address: False, lambda address: (_ for _ in ()).throw(webbrowser.Error("no"))]
)
def test_a_browser_that_does_not_start_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: object
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", fails)
    assert compress(monkeypatch, "report", write_run(tmp_path / "run", (TRAIN,)), "--open") == 0
    assert "no browser can be opened here" in "".join(capsys.readouterr())


def test_an_index_is_written_and_opened(tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "a", (TRAIN,), name="first")
    write_run(tmp_path / "runs" / "b", (TRAIN,), name="second")
    monkeypatch.chdir(tmp_path)
    assert compress(monkeypatch, "index", "runs") == 0
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>2 runs</h1>" in html
    assert "first" in html
    out = tmp_path / "site" / "all.html"
    assert compress(monkeypatch, "index", "runs/a", "runs/b", "--out", out, "--open") == 0
    assert opened == [out.as_uri()]


def test_an_index_over_nothing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run", (TRAIN,))
    assert compress(monkeypatch, "index", tmp_path / "run", "--out", tmp_path / "file" / "index.html") == 1
    said = "".join(capsys.readouterr())
    assert "cannot be written" in said
    assert "Traceback" not in said
