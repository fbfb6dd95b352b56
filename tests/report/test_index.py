"""One page over many runs, whole, stopped, failed and broken ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_report import NO_FLOAT, TRAIN, VARIANTS, WHOLE, Page, benchmark, verify, write_run

from compress.errors import CompressError
from compress.report import read_report, write_index, write_report


def folders(root: Path) -> list[Path]:
    """A run of every sort, with their reports, below `root`."""
    slower = benchmark()
    for row in slower["rows"]:
        row["p50_ms"] *= 1.5
    stages = {
        "whole": (*WHOLE[:6], ("benchmark", None, slower)),
        "pruned half": WHOLE,
        "no prune": VARIANTS["no prune"],
        "train only": (TRAIN,),
        "failed": (*WHOLE[:5], ("verify", None, verify(verdict="FAIL") | {"reason": "9 LSB apart"}), WHOLE[6]),
    }
    for day, (name, own) in enumerate(stages.items(), start=10):
        write_run(root / "runs" / name, own, name=name, finished=f"2026-11-{day}T10:00:00+00:00")
        write_report(root / "runs" / name)
    write_run(root / "runs" / "stopped", (TRAIN,), name="stopped", finished=None)  # and no report
    (root / "runs" / "broken").mkdir()
    (root / "runs" / "broken" / "run.json").write_text("{")
    return [root / "runs", root / "nothing here"]


def rows_of(html: str) -> dict[str, str]:
    """The text of each row by the run's name."""
    rows = re.findall(r'<tr data-name="([^"]*)".*?</tr>', html, flags=re.S)
    texts = re.findall(r'<tr data-name="[^"]*".*?</tr>', html, flags=re.S)
    return {name: " ".join(re.sub(r"<[^>]*>", " ", text).split()) for name, text in zip(rows, texts, strict=True)}


def test_every_run_has_its_row_and_what_cannot_be_read_its_reason(tmp_path: Path) -> None:
    html = write_index(folders(tmp_path), tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    rows = rows_of(html)
    assert set(rows) == {
        "whole",
        "pruned half",
        "no prune",
        "train only",
        "failed",
        "stopped",
        "broken",
        "nothing here",
    }
    report = read_report(tmp_path / "runs" / "pruned half")
    best = next(file for file in report["files"] if file["file"] == report["headline"]["file"])
    for figure in ("97.2% → 96.7%", f"{best['pair']['speedup']:.2f}×", "1.86 ms", "862 kB", "10.3× smaller", "PASS"):
        assert figure in rows["pruned half"]
    assert "mobilenet_v2" in rows["whole"]
    assert "parity FAIL" in rows["failed"]
    assert "unfinished" in rows["stopped"]
    assert "97.5%" in rows["train only"]
    assert "not JSON" in rows["broken"]
    assert "not a run folder" in rows["nothing here"]
    text = Page(re.sub(r"<script>.*?</script>", "", html, flags=re.S)).text
    assert "5 finished, 1 unfinished, 2 that cannot be read; parity failed in 1" in text
    assert "These are x86 figures" in text


def test_links_are_relative_and_lead_to_reports(tmp_path: Path) -> None:
    out = write_index(folders(tmp_path), tmp_path / "site" / "deep" / "index.html")
    links = re.findall(r'<a href="([^"]*)"', out.read_text(encoding="utf-8"))
    assert len(links) == 5
    for link in links:
        assert link.startswith("../../runs/")
        assert " " not in link
        assert (out.parent / link.replace("%20", " ")).is_file()


def test_the_best_are_those_that_nothing_beats(tmp_path: Path) -> None:
    html = write_index(folders(tmp_path), tmp_path / "index.html").read_text(encoding="utf-8")
    chosen = re.findall(r'<tr data-name="([^"]*)" class="chosen"', html)
    # The same network half as slow is beaten; a run whose parity failed is not compared at all.
    assert set(chosen) == {"pruned half", "no prune"}
    assert html.count("<svg") == 1
    assert '<svg role="img" aria-label="Accuracy against latency: 3 runs"' in html


def test_runs_of_two_machines_are_not_drawn_together(tmp_path: Path) -> None:
    for name, cpu in (("a", "AMD EPYC"), ("b", "AMD EPYC"), ("c", "Xeon"), ("d", "Xeon"), ("e", "Core 2")):
        measured = benchmark(NO_FLOAT, machine=cpu)
        write_run(tmp_path / name, (*VARIANTS["no prune"][:4], ("benchmark", None, measured)), name=name)
    html = write_index([tmp_path], tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(set(ids)) == len(ids)


def test_names_stay_texts_and_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "xyzzy-0123456789")
    evil = '"><script>alert(1)</script>'
    write_run(tmp_path / "a", (TRAIN,), name=evil, model={"use": "net xyzzy-0123456789"})
    html = write_index([tmp_path], tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count("<script>") == 1
    assert "xyzzy" not in html
    write_run(tmp_path / "b", (TRAIN,), command="compress run a.yaml data.token=xyzzy-0123456789")
    write_report(tmp_path / "b")
    for path in (tmp_path / "b").glob("report.*"):
        assert "xyzzy" not in path.read_text(encoding="utf-8")


def test_nothing_to_list_and_nowhere_to_write_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no runs"):
        write_index([], tmp_path / "index.html")
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "a", (TRAIN,))
    with pytest.raises(CompressError, match="cannot be written") as error:
        write_index([tmp_path / "a"], tmp_path / "file" / "index.html")
    assert "\n" not in str(error.value)
