"""Pages opened from the disk in a headless Chromium, as a reader does: at a desk, on a phone, in the dark, on paper."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index import folders
from test_report import TRAIN, WHOLE, benchmark, history, verify, write_run
from test_report_board import emulated, measured, on_board, run_of, throttling
from test_report_pictures import mistaken, write_pictures

from compress.report import write_index, write_report

pytestmark = pytest.mark.extras

PHONE, DESK = 360, 1100
LEAST_TEXT_PX, LEAST_DRAWN_PX = 14, 12
CONTRAST = 4.5
"""WCAG 2.2, level AA, for text of any size."""

TEXTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
  const backdrop = element => {
    const own = [];
    for (let e = element; e; e = e.parentElement) own.unshift(rgba(getComputedStyle(e).backgroundColor));
    return own.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || ['STYLE', 'SCRIPT'].includes(element.tagName)) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (!box.width || style.visibility !== 'visible' || !element.checkVisibility()) continue;
    const drawn = element.closest('svg');
    let colour = rgba(drawn ? style.fill : style.color), below = backdrop(drawn || element);
    let opacity = 1;
    for (let e = element; e; e = e.parentElement) opacity *= parseFloat(getComputedStyle(e).opacity);
    colour[3] *= opacity;
    const [a, b] = [light(over(colour, below)), light(below)].sort((x, y) => y - x);
    const scale = drawn ? drawn.getBoundingClientRect().width / drawn.viewBox.baseVal.width : 1;
    found.push({text: node.textContent.trim().slice(0, 60), px: parseFloat(style.fontSize) * scale, drawn: !!drawn,
                contrast: (a + .05) / (b + .05), left: box.left, right: box.right,
                held: !!element.closest('.scroll, pre')});
  }
  return found;
}"""

STRUCTURE = """() => ({
  lang: document.documentElement.lang, title: document.title, mode: document.compatMode,
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  targets: [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute('href').slice(1)),
  headings: [...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1]),
  images: [...document.querySelectorAll('img')].map(e => [e.alt, e.naturalWidth]),
  drawings: [...document.querySelectorAll('svg')].map(e => [e.getAttribute('role'), e.getAttribute('aria-label')]),
  heads: [...document.querySelectorAll('th')].map(e => e.scope),
  regions: [...document.querySelectorAll('.scroll')].map(e => [e.tabIndex, e.getAttribute('role'), e.ariaLabel]),
  loose: [...document.querySelectorAll('table')].filter(e => !e.closest('.scroll')).length,
})"""

FOCUSED = """() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  window.order ??= new Map();
  if (!window.order.has(e)) window.order.set(e, window.order.size);
  return [window.order.get(e), e.className + ' ' + e.tagName, getComputedStyle(e).outlineStyle];
}"""


@dataclass
class Opened:
    """A page in a browser, and what it asked for and complained of."""

    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert path, "no Chromium: install the packages of .ci/packages, or name one in the environment variable CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, path: Path, width: int = DESK, scheme: str = "light") -> Opened:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(context.new_page())

    def pass_or_stop(route: Any) -> None:
        found.asked.append(route.request.url)
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", pass_or_stop)
    found.page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.goto(path.as_uri())
    return found


CLASSES = 1000


def _many_classes(folder: Path) -> Path:
    """A thousand classes with long names, and some that break lines nowhere."""
    labels = [f"{'long_name_without_a_space_' if k % 3 else 'a name of several words, '}{k}" for k in range(CLASSES)]
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, CLASSES, 5000)
    said_N = np.where(rng.random(5000) < 0.3, rng.integers(0, CLASSES, 5000), labels_N)
    checked = verify() | mistaken(labels_N, labels_N, said_N, CLASSES)
    data = {"use": "folder", "labels": labels, "train": 100_000, "evaluation": 5000, "fingerprint": "0" * 64}
    write_run(folder, (*WHOLE[:5], ("verify", None, checked), WHOLE[6]), data=data)
    write_pictures(folder)
    return write_report(folder)


def _board(folder: Path) -> Path:
    accuracy = [on_board("parent.tflite", 611), on_board("int8.onnx", 3), on_board("int8.tflite")]
    return write_report(write_run(folder, run_of(measured(accuracy=accuracy, sustained=[throttling()]))))


def _failed(folder: Path) -> Path:
    noisy = benchmark()
    for pair in noisy["pairs"]:
        pair |= {"verdict": "NOISY", "reasons": ["the baseline against itself gave 1.21, allowed 1.05"]}
    failed = verify(verdict="FAIL") | {"reason": "int8.onnx and int8.tflite differ by 9 LSB, allowed 1"}
    failed["agreement"][1] |= {"max_lsb": 9, "histogram": {"0": 3000, "1": 500, "2": 99, "9": 1}}
    return write_report(write_run(folder, (*WHOLE[:5], ("verify", None, failed), ("benchmark", None, noisy))))


def _stopped(folder: Path) -> Path:
    """Killed in its second stage, with a log."""
    write_run(folder, (TRAIN,), finished=None, seconds=None)
    recipe = "name: digits\nstages:\n- use: train\n- use: prune\n- use: distill\n- use: export\n"
    (folder / "recipe.yaml").write_text(recipe)
    lines: list[dict[str, Any]] = [{"event": "stage_started", "stage": "02-prune", "facts": {"key": "a"}}]
    lines += [{"event": "epoch", "stage": "02-prune", "facts": epoch} for epoch in history(3, 1.0)]
    lines.append({"event": "signal", "facts": {"name": "SIGTERM"}, "time": "2026-11-21T10:04:00Z"})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report(folder)


def _pictured(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    labels_N = rng.integers(0, 10, 360)
    said_N = np.where(rng.random(360) < 0.1, rng.integers(0, 10, 360), labels_N)
    checked = verify() | mistaken(labels_N, labels_N, said_N, 10)
    write_run(folder, (*WHOLE[:5], ("verify", None, checked), WHOLE[6]))
    write_pictures(folder)
    return write_report(folder)


PAGES = {
    "pictured": _pictured,
    "many classes": _many_classes,
    "board": _board,
    "emulated": lambda folder: write_report(write_run(folder, run_of(emulated()))),
    "failed and noisy": _failed,
    "stopped": _stopped,
    "index": lambda folder: write_index(folders(folder), folder / "index.html"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("run")) for name, write in PAGES.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(chromium: Any, paths: dict[str, Path], name: str, width: int, scheme: str) -> None:
    found = opened(chromium, paths[name], width, scheme)
    assert found.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    texts = found.page.evaluate(TEXTS)
    assert len(texts) > 40
    assert found.page.evaluate("document.scrollingElement.scrollWidth") <= width
    beyond = [one for one in texts if not one["held"] and not one["drawn"] and one["right"] > width + 0.5]
    assert beyond == []
    faint = [one for one in texts if one["contrast"] < CONTRAST]
    assert faint == []
    small = [one for one in texts if one["px"] < (LEAST_DRAWN_PX if one["drawn"] else LEAST_TEXT_PX) - 0.01]
    assert small == []
    # A page that forgot its dark colours would be as readable, and hurt.
    page = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, page.strip("rgb()").split(","))) < 200) == (scheme == "dark")
    assert found.asked == [paths[name].as_uri()]
    assert found.complaints == []
    found.page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well_made(chromium: Any, paths: dict[str, Path], name: str) -> None:
    found = opened(chromium, paths[name])
    made = found.page.evaluate(STRUCTURE)
    assert made["lang"] == "en"
    assert made["mode"] == "CSS1Compat"
    assert made["title"].strip()
    assert len(set(made["ids"])) == len(made["ids"])
    assert set(made["targets"]) <= set(made["ids"])
    assert made["headings"].count(1) == 1
    assert made["headings"][0] == 1
    assert all(later <= earlier + 1 for earlier, later in zip(made["headings"], made["headings"][1:], strict=False))
    assert all(alt.strip() and width for alt, width in made["images"])
    assert all(role == "img" and len(label or "") > 8 for role, label in made["drawings"])
    assert all(scope in ("col", "row") for scope in made["heads"])
    assert made["loose"] == 0
    assert all(tab == 0 and role == "region" and label for tab, role, label in made["regions"])
    found.page.context.close()


@pytest.mark.parametrize("name", ["pictured", "index"])
def test_every_part_can_be_reached_by_keyboard(chromium: Any, paths: dict[str, Path], name: str) -> None:
    found = opened(chromium, paths[name], PHONE)
    wanted = "a[href], summary, button, input, select, .scroll, pre"
    count = found.page.evaluate(f"[...document.querySelectorAll('{wanted}')].filter(e => e.checkVisibility()).length")
    seen: dict[int, tuple[str, str]] = {}
    for _ in range(count + 5):
        found.page.keyboard.press("Tab")
        at = found.page.evaluate(FOCUSED)
        if at:
            seen[at[0]] = (at[1], at[2])
    assert len(seen) == count
    assert {outline for _, outline in seen.values()} == {"solid"}  # and the reader sees where
    found.page.context.close()


@pytest.mark.parametrize("name", ["pictured", "index"])
def test_nothing_from_outside_gets_into_a_page(chromium: Any, paths: dict[str, Path], name: str) -> None:
    """Even where somebody writes an element into it that asks."""
    found = opened(chromium, paths[name])
    blocked = found.page.evaluate(
        """async () => {
          const blocked = [];
          document.addEventListener('securitypolicyviolation', e => blocked.push(e.effectiveDirective));
          const add = (tag, what) => document.body.append(Object.assign(document.createElement(tag), what));
          add('img', {src: 'https://example.com/a.png'});
          add('script', {textContent: 'window.ran = true'});
          add('script', {src: 'https://example.com/a.js'});
          add('link', {rel: 'stylesheet', href: 'https://example.com/a.css'});
          add('iframe', {src: 'https://example.com/'});
          await fetch('https://example.com/').catch(() => 0);
          await new Promise(done => setTimeout(done, 300));
          return blocked.concat(window.ran ? ['RAN'] : []);
        }"""
    )
    kinds = {directive.removesuffix("-elem") for directive in blocked}
    assert kinds == {"img-src", "script-src", "style-src", "frame-src", "connect-src"}
    assert found.asked == [paths[name].as_uri()]
    found.page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints(chromium: Any, paths: dict[str, Path], name: str) -> None:
    """Dark ink on white whatever the screen shows, nothing hidden to the right, everything unfolded."""
    found = opened(chromium, paths[name], 720, "dark")
    found.page.emulate_media(media="print", color_scheme="dark")
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [one for one in found.page.evaluate(TEXTS) if one["contrast"] < CONTRAST] == []
    folded = "[...document.querySelectorAll('details > :not(summary)')].filter(e => !e.checkVisibility()).length"
    assert found.page.evaluate(folded) == 0
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert found.page.evaluate(cut) == 0
    assert found.page.pdf(format="A4").startswith(b"%PDF")
    found.page.context.close()


def test_the_index_sorts_and_filters(chromium: Any, paths: dict[str, Path]) -> None:
    found = opened(chromium, paths["index"])
    rows = "[...document.querySelectorAll('tbody tr')].filter(e => e.checkVisibility()).map(e => e.dataset.name)"
    before = found.page.evaluate(rows)
    speeds = "[...document.querySelectorAll('tbody tr')].map(e => e.querySelector('[data-column=speed]').dataset.value)"
    found.page.get_by_role("button", name="Speed-up").click()
    values = [float(value) for value in found.page.evaluate(speeds) if value]
    assert values == sorted(values)
    assert len(values) > 1
    found.page.get_by_role("button", name="Speed-up").click()
    values = [float(value) for value in found.page.evaluate(speeds) if value]
    assert values == sorted(values, reverse=True)
    assert found.page.evaluate("document.querySelector('th[aria-sort=descending]').textContent.trim()") == "Speed-up"
    found.page.get_by_label("Show only").fill("pruned")
    left = found.page.evaluate(rows)
    assert 0 < len(left) < len(before)
    assert all("pruned" in name for name in left)
    assert found.page.locator("output").inner_text() == f"{len(left)} of {len(before)} runs"
    found.page.get_by_label("Show only").fill("")
    assert sorted(found.page.evaluate(rows)) == sorted(before)
    found.page.get_by_role("link", name="pruned half").click()
    found.page.wait_for_load_state()
    assert found.page.locator("h1").inner_text().strip()
    assert found.page.url.endswith("/report.html")
    assert found.complaints == []
    found.page.context.close()
