"""Nothing that a run folder says becomes part of the page that shows it: every text in every field, and every name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.report import write_report

sys.path.append(str(Path(__file__).parents[1] / "report"))
from test_report import VARIANTS, write_run

EVIL = (
    "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' {{7*7}}"
    " <svg/onload=alert(4)>"
)


FEW = ("name", "labels", "notes", "reason", "command", "machine", "layer", "KEYS")
"""Fields whose text is a stranger's more often than others'."""


class Page(HTMLParser):
    """What a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.images, self.handlers = 0, 0, list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.images += tag == "img" and dict(attrs).get("src") == "x"
        self.handlers += [name for name, value in attrs if name.startswith("on") and "alert" in (value or "")]


def fields(value: Any) -> Iterator[str]:
    """Names of the fields that hold text, or lists of it."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) or (isinstance(item, list) and any(isinstance(part, str) for part in item)):
                yield key
            yield from fields(item)
    elif isinstance(value, list):
        for item in value:
            yield from fields(item)


def spoiled(value: Any, field: str) -> Any:
    """The value with the evil text at the end of every text in that field; for `KEYS`, of names of files and layers."""
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            if key == field:
                item = (
                    item + EVIL
                    if isinstance(item, str)
                    else [p + EVIL if isinstance(p, str) else p for p in item]
                    if isinstance(item, list)
                    else item
                )
            found[key + EVIL if field == "KEYS" and "." in key else key] = spoiled(item, field)
        return found
    return [spoiled(item, field) for item in value] if isinstance(value, list) else value


def all_fields() -> list[str]:
    stages = next(iter(sorted(VARIANTS.values(), key=lambda stages: -len(json.dumps(stages)))))
    described = {
        "name",
        "command",
        "started",
        "finished",
        "compress",
        "python",
        "platform",
        "cpu",
        "device",
        "labels",
        "notes",
        "fingerprint",
        "recipe_hash",
    }
    return sorted(
        {
            *fields([metrics for _, _, metrics in stages]),
            *fields([f for _, f, _ in stages]),
            *described,
            "KEYS",
            "use",
            "settings",
        }
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with as many stages and figures as there are."""
    stages = max(VARIANTS.values(), key=lambda stages: len(json.dumps(stages)))
    folder = write_run(tmp_path_factory.mktemp("clean") / "run", stages)
    write_report(folder)
    return folder


@pytest.mark.parametrize(
    "chosen", [pytest.param([FEW], id="at once"), pytest.param([], marks=pytest.mark.slow, id="each")]
)
def test_no_text_of_any_field_becomes_markup(chosen: list[tuple[str, ...]], clean: Path, tmp_path: Path) -> None:
    before = Page((clean / "report.html").read_text(encoding="utf-8"))
    assert before.handlers == []
    written = 0
    for number, field in enumerate(chosen or [(field,) for field in all_fields()]):
        folder = tmp_path / str(number)
        shutil.copytree(clean, folder)
        for path in folder.rglob("*.json"):
            if path.name in ("run.json", "manifest.json"):
                value = json.loads(path.read_text())
                for name in field:
                    value = spoiled(value, name)
                path.write_text(json.dumps(value))
        try:
            page = write_report(folder).read_text(encoding="utf-8")
        except CompressError:  # a field whose words are fixed
            continue
        written += 1
        after = Page(page)
        assert (after.scripts, after.images, after.handlers) == (before.scripts, 0, []), field
        lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("    "))  # that is code: the command
        assert "<script>alert(1)" not in text.replace("\\<", ""), field
        json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written >= (1 if chosen else 20)


def test_the_recipe_beside_it_is_shown_as_text(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(clean, folder)
    (folder / "recipe.yaml").write_text(f"name: x # {EVIL}\n", encoding="utf-8")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert (page.images, page.handlers) == (0, [])
    assert page.scripts == Page((clean / "report.html").read_text(encoding="utf-8")).scripts


def test_the_page_asks_for_nothing_outside(clean: Path) -> None:
    """A report can be opened from a stranger's run folder without a word to anyone."""
    page = (clean / "report.html").read_text(encoding="utf-8")
    for word in ("http://", "https://", "//cdn", "@import", "url("):
        for line in page.splitlines():
            if word in line:
                assert "src=" not in line.partition(word)[0][-6:], line[:200]
                assert word not in ("@import", "//cdn"), line[:200]
