"""Run folders as the pipeline writes them, whole and in parts, against what the report says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress.errors import CompressError
from compress.report import read_report, summary_rows, wording, write_report
from compress.report.stages import key_settings

Reported = Callable[[str], tuple[dict[str, Any], str, str]]

CPU = "AMD EPYC 9B14"
FILES = ("parent.onnx", "parent.tflite", "float.onnx", "float.tflite", "int8.onnx", "int8.tflite")
SIZES = dict(zip(FILES, (8_871_234, 8_902_116, 3_104_552, 3_098_771, 902_113, 861_504), strict=True))
ACCURACY = dict(zip(FILES, (0.9722, 0.9722, 0.9694, 0.9694, 0.9667, 0.9667), strict=True))
P50_MS = dict(zip(FILES, (6.64, 6.32, 3.41, 3.12, 2.05, 1.86), strict=True))
WEIGHT_ONLY = ("float16.onnx", "float16.tflite", "int8_weights.onnx", "int8_weights.tflite")
SIZES |= dict(zip(WEIGHT_ONLY, (1_560_001, 1_553_333, 801_220, 797_004), strict=True))
ACCURACY |= dict(zip(WEIGHT_ONLY, (0.9694, 0.9694, 0.9639, 0.9639), strict=True))
P50_MS |= dict(zip(WEIGHT_ONLY, (3.42, 3.15, 3.39, 3.11), strict=True))
SPEEDUPS = {"float.onnx": 1.947, "float.tflite": 2.026, "int8.onnx": 3.239, "int8.tflite": 3.398}


def layers(share: float) -> list[dict[str, Any]]:
    """A short MobileNetV2's layers with that share of its channels, in multiples of 8."""

    def kept(channels: int) -> int:
        return max(8, int(channels * share / 8 + 0.5) * 8)

    found: list[dict[str, Any]] = []

    def add(name: str, inputs: int, outputs: int, groups: int, kernel: int, side: int) -> None:
        weights = outputs * inputs // groups * kernel * kernel
        entry = {"name": name, "kind": "Conv2d" if side > 1 else "Linear", "inputs": inputs, "outputs": outputs}
        found.append(entry | {"groups": groups, "kernel": [kernel] * 2, "macs": weights * side**2, "params": weights})

    inputs, side, number, original = kept(32), 48, 1, 32
    add("features.0.0", 3, inputs, 1, 3, side)
    for expand, channels, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 2), (6, 320, 1, 2),
    ):  # fmt: skip
        for block in range(blocks):
            hidden, outputs = kept(original * expand), kept(channels)
            place = 0
            if expand > 1:
                add(f"features.{number}.conv.0.0", inputs, hidden, 1, 1, side)
                place = 1
            side = side // stride if block == 0 else side
            add(f"features.{number}.conv.{place}.0", hidden, hidden, hidden, 3, side)
            add(f"features.{number}.conv.{place + 1}", hidden, outputs, 1, 1, side)
            inputs, number, original = outputs, number + 1, channels
    add(f"features.{number}.0", inputs, kept(1280), 1, 1, side)
    add("classifier.1", kept(1280), 10, 1, 1, 1)
    return found


def network(accuracy: float, share: float = 1.0, precision: str = "float32") -> dict[str, Any]:
    own = layers(share)
    return {
        "accuracy": accuracy,
        "images": 360,
        "params": sum(layer["params"] for layer in own),
        "macs": sum(layer["macs"] for layer in own),
        "precision": precision,
        "layers": own,
    }


def history(epochs: int, loss: float) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch + 1, "loss": loss * 0.8**epoch + 0.07, "lr": 0.05 / (epoch + 1), "seconds": 3.1}
        for epoch in range(epochs)
    ]


def export(names: tuple[str, ...] = FILES) -> dict[str, Any]:
    files = {}
    for number, name in enumerate(names):
        kind, suffix = name.split(".")
        assert kind in ("parent", "float", "float16", "int8_weights", "int8")
        files[name] = {"format": suffix, "kind": kind, "size_bytes": SIZES[name], "sha256": f"{number:064x}"}
    return {"files": files}


def verify(names: tuple[str, ...] = FILES, verdict: str = "PASS") -> dict[str, Any]:
    runtimes = {"onnx": "onnxruntime", "tflite": "litert"}
    return {
        "tolerance_lsb": 1,
        "images": 360,
        "verdict": verdict,
        "files": {
            name: {"runtime": runtimes[name.split(".")[1]], "accuracy": ACCURACY[name], "images": 360} for name in names
        },
        "agreement": [
            {"a": "frozen torch int8", "b": "int8.onnx", "kind": "int8", "logits": 3600, "differing": 1, "max_lsb": 1,
             "top1_agreement": 1.0, "histogram": {"0": 3599, "1": 1}},
            {"a": "int8.onnx", "b": "int8.tflite", "kind": "int8", "logits": 3600, "differing": 7, "max_lsb": 1,
             "top1_agreement": 0.9972, "histogram": {"0": 3593, "1": 7}},
            {"a": "parent.onnx", "b": "parent.tflite", "kind": "float", "max_abs": 1.05e-05, "top1_agreement": 1.0},
        ],
        "static": {"witnesses": ["frozen torch int8", "int8.onnx", "int8.tflite"], "grids": 31, "layers": 29,
                   "unmatched": 0, "differing": 0, "differences": []},
        "sqnr": {"exact": "torch float", "rounded": "frozen torch int8", "images": 4, "output_db": 24.51, "tensors": 31,
                 "matched": 3, "worst": ["features.3.conv.1.0", "features.0.0"],
                 "layers": [{"layer": "features.0.0", "sqnr_db": 38.04, "own_db": 38.04, "output_db": 31.26},
                            {"layer": "features.3.conv.1.0", "sqnr_db": 25.32, "own_db": 29.15, "output_db": 27.93},
                            {"layer": "max", "sqnr_db": 25.32, "own_db": None, "output_db": None}]},
        "notes": ["this x86 CPU has no VNNI: onnxruntime ran its exact kernels"],
    }  # fmt: skip


def benchmark(names: tuple[str, ...] = FILES, **conditions: Any) -> dict[str, Any]:
    rows, pairs = [], []
    for name in names:
        kind, suffix = name.split(".")
        runtime = "onnxruntime" if suffix == "onnx" else "litert"
        p50 = P50_MS[name]
        rows.append(
            {"file": name, "kind": kind, "runtime": runtime, "threads": 1, "p50_ms": p50, "p90_ms": p50 * 1.06,
             "p99_ms": p50 * 1.31, "min_ms": p50 * 0.97, "max_ms": p50 * 1.9, "spread": 0.06, "fps": 1000 / p50,
             "startup_ms": 41.2, "first_ms": p50 * 1.8, "peak_rss_mb": 74.3, "samples": 1024, "size_bytes": SIZES[name]}
        )  # fmt: skip
        if name in SPEEDUPS and f"parent.{suffix}" in names:
            ratio = SPEEDUPS[name]
            pairs.append(
                {"runtime": runtime, "baseline": f"parent.{suffix}", "candidate": name, "speedup": ratio,
                 "interval": [ratio * 0.97, ratio * 1.03], "aa_ratio": 1.004, "verdict": "OK"}
            )  # fmt: skip
    return {
        "conditions": {
            "target": "local", "machine": CPU, "arch": "x86_64", "is_arm": False, "cores": 2, "ram_gb": 7.8,
            "os": "Debian GNU/Linux 12", "kernel": "Linux 6.1", "governor": "unavailable",
            "temperature_c": "unavailable",
            "runtimes": {"onnxruntime": "1.31.1", "litert": "2.3.0"}, "threads": 1, "rounds": 4, "warmup": 10,
            "runs": 64, "batch": 1, "settings": "allow_spinning 1",
        }
        | conditions,
        "rows": rows,
        "pairs": pairs,
    }  # fmt: skip


TRAIN = ("train", network(0.975), {"history": history(8, 2.2)})
PRUNE = (
    "prune",
    network(0.6139, 0.6),
    {"goal_macs": 0.4, "macs_before": network(0.975)["macs"], "macs_after": network(0, 0.6)["macs"], "reached": 0.3985,
     "criterion": "magnitude", "round_to": 8, "steps": 3},
)  # fmt: skip
DISTILL = ("distill", network(0.9694, 0.6), {"history": history(12, 5.4), "teacher": "parent"})
QUANTIZE = ("quantize", network(0.9667, 0.6, "int8 (fake quant)"), {"history": history(3, 0.9)})
EXPORT = ("export", None, export())
VERIFY = ("verify", None, verify())
BENCHMARK = ("benchmark", None, benchmark())
WHOLE = (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY, BENCHMARK)
NO_FLOAT = tuple(name for name in FILES if not name.startswith("float"))
PLAIN = ("parent.onnx", "parent.tflite")

ALL_KINDS = (*FILES[:4], *WEIGHT_ONLY, *FILES[4:])
MIXED = ("quantize", network(0.9667, 0.6, "int8 + 2 layers float32 (fake quant)"), {"history": history(3, 0.9)})
W4A8 = ("quantize", network(0.9611, 0.6, "W4A8 (simulated)"), {"history": history(3, 0.9)})

VARIANTS: dict[str, tuple[Any, ...]] = {
    "whole": WHOLE,
    "train only": (TRAIN,),
    "no prune": (
        TRAIN,
        ("quantize", network(0.9667, precision="int8 (fake quant)"), {"history": history(3, 0.9)}),
        ("export", None, export(NO_FLOAT)),
        ("verify", None, verify(NO_FLOAT)),
        ("benchmark", None, benchmark(NO_FLOAT)),
    ),
    "every kind": (
        *(TRAIN, PRUNE, DISTILL, MIXED),
        ("export", None, export(ALL_KINDS)),
        ("verify", None, verify(ALL_KINDS)),
        ("benchmark", None, benchmark(ALL_KINDS)),
    ),
    "weights alone": (
        TRAIN,
        ("export", None, export((*PLAIN, *WEIGHT_ONLY))),
        ("verify", None, verify((*PLAIN, *WEIGHT_ONLY))),
        ("benchmark", None, benchmark((*PLAIN, *WEIGHT_ONLY))),
    ),
    "simulated": (
        TRAIN,
        W4A8,
        ("export", None, export(PLAIN)),
        ("verify", None, verify(PLAIN)),
        ("benchmark", None, benchmark(PLAIN)),
    ),
    "pruned and simulated": (
        *(TRAIN, PRUNE, DISTILL, W4A8),
        ("export", None, export(FILES[:4])),
        ("verify", None, verify(FILES[:4])),
        ("benchmark", None, benchmark(FILES[:4])),
    ),
    "simulated, no export": (TRAIN, PRUNE, W4A8),
    "no verify": (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, BENCHMARK),
    "no benchmark": (TRAIN, PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY),
    "no export": (TRAIN, PRUNE, DISTILL, QUANTIZE),
    "nothing compressed": (TRAIN, ("export", None, export(PLAIN)), ("benchmark", None, benchmark(PLAIN))),
    "float only": (
        TRAIN,
        PRUNE,
        DISTILL,
        ("export", None, export(FILES[:4])),
        ("verify", None, verify(FILES[:4]) | {"agreement": [verify()["agreement"][2]]}),
        ("benchmark", None, benchmark(FILES[:4])),
    ),
    "prune first": (PRUNE, DISTILL, QUANTIZE, EXPORT, VERIFY, BENCHMARK),
    "int8 file alone": (
        TRAIN,
        QUANTIZE,
        ("export", None, export(FILES[5:])),
        ("benchmark", None, benchmark(FILES[5:])),
    ),
    "only the parent exported": (TRAIN, ("export", None, export(PLAIN)), ("benchmark", None, benchmark(PLAIN)), PRUNE),
    "benchmark alone": (("benchmark", None, benchmark()),),
    "empty stages": (("train", None, {}), ("export", None, {}), ("verify", None, {"verdict": "PASS"})),
}


def write_run(folder: Path, stages: tuple[Any, ...], notes: tuple[str, ...] = (), /, **run: Any) -> Path:
    names = [f"{number:02d}-{stage}" for number, (stage, _, _) in enumerate(stages, 1)]
    for number, (name, (stage, figures, metrics)) in enumerate(zip(names, stages, strict=True), 1):
        manifest = {
            "stage": stage, "index": number, "folder": name, "key": "f" * 64, "settings": {"use": stage},
            "seconds": 12.34 * number, "finished": "2026-11-21T10:02:11+00:00", "resumed": False,
            "notes": list(notes) or ([f"{stage}: head replaced, 1000 -> 10 classes"] if stage == "train" else []),
            "files": {}, "network": figures, "metrics": metrics,
        }  # fmt: skip
        path = folder / "stages" / name / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(manifest))
    described = {
        "name": "digits-mobilenet", "command": "compress run recipes/digits.yaml",
        "started": "2026-11-21T10:00:00+00:00",
        "finished": "2026-11-21T10:09:31+00:00", "seconds": 571.4, "recipe_hash": "9b1c" * 16, "compress": "0.1.0",
        "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1", "ai-edge-litert": "2.3.0"}, "python": "3.11.7",
        "platform": "Linux-6.1-x86_64", "cpu": CPU, "threads": 2, "device": "cpu", "seed": 7,
        "data": {"use": "digits", "labels": [str(digit) for digit in range(10)], "train": 1437, "evaluation": 360,
                 "fingerprint": "77ae" * 16, "notes": ["scikit-learn digits, resized from 8 px"]},
        "preprocess": {"size": 96, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop": 1.0},
        "model": {"use": "mobilenet_v2", "width": 1.0}, "stages": names,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(described | run))
    (folder / "recipe.yaml").write_text("name: digits-mobilenet\nseed: 7\n")
    return folder


def reported(folder: Path, stages: tuple[Any, ...], **run: Any) -> tuple[dict[str, Any], str, str]:
    """report.json, report.html and report.md of a run with those stages."""
    page = write_report(write_run(folder, stages, **run))
    assert page == folder / "report.html"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("report.json", "report.html", "report.md")]
    return json.loads(texts[0], parse_constant=pytest.fail), texts[1], texts[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The reports of a variant, written once."""
    return cache(lambda variant: reported(tmp_path_factory.mktemp("run"), VARIANTS[variant]))


class Page(HTMLParser):
    """What a reader sees of a page, what it refers to, and whether its elements close."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "nav"} & set(self.open):
            self.words.append(data)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_a_whole_page(written: Reported, variant: str) -> None:
    report, html, markdown = written(variant)
    page = Page(html)

    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    drawings = re.findall(r"<svg .*?</svg>", html, flags=re.S)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--" in drawing
        assert not re.search(r"#0a000\d|#0a0010|<metadata|#000000", drawing)
    for text in (page.text, markdown):
        assert report["headline"]["sentence"].split(",")[0] in text
        for leak in ("None", "nan", "Undefined", "{{", "{%", "dict(", "&lt;"):
            assert leak not in text
    assert summary_rows(report) or variant in ("benchmark alone", "empty stages")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_x86_machine_is_never_called_arm(written: Reported, variant: str) -> None:
    report, html, markdown = written(variant)
    for text in (Page(html).text, markdown, json.dumps(report)):
        assert not re.search(r"\barm\b|aarch64|cortex", re.sub(r"not ARM fps|is_arm", "", text), flags=re.IGNORECASE)
    if report["benchmark"]:
        assert f"These are x86 figures on {CPU}, not ARM fps." in Page(html).text
        assert f"These are x86 figures on {CPU}, not ARM fps." in markdown


def test_figures_are_those_of_the_manifests(written: Reported) -> None:
    report, html, markdown = written("whole")
    text = Page(html).text
    files = {file["file"]: file for file in report["files"]}
    assert set(files) == set(FILES)
    for name, file in files.items():
        assert (file["accuracy"], file["accuracy_of"], file["images"]) == (ACCURACY[name], "file", 360)
        assert file["size_bytes"] == SIZES[name]
        assert file["timing"]["p50_ms"] == P50_MS[name]
        assert file["timing"]["fps"] == pytest.approx(1000 / P50_MS[name])
        assert file["timing"]["spread"] == pytest.approx(0.06)
        row = f"{100 * ACCURACY[name]:.1f}%", f"{P50_MS[name]:.2f} ms", f"{1000 / P50_MS[name]:.0f}"
        assert re.search(rf"\| {re.escape(name)} .*{row[0]}.*{row[1]}.*{row[2]}", markdown)
        assert re.search(rf"{re.escape(name)} \S+( Runtime)? {row[0]} .{{0,30}}{row[1]} {row[2]} ", text)
    for name, speedup in SPEEDUPS.items():
        assert files[name]["pair"]["speedup"] == speedup
        assert files[name]["difference"] == pytest.approx(ACCURACY[name] - ACCURACY["parent.onnx"])
        assert files[name]["times_smaller"] == SIZES[f"parent.{name.split('.')[1]}"] / SIZES[name]
        assert f"{speedup:.2f}×" in text

    stages = {stage["folder"]: stage for stage in report["stages"]}
    assert [stage["seconds"] for stage in report["stages"]] == [12.34 * number for number in range(1, 8)]
    assert stages["02-prune"]["network"]["accuracy"] == 0.6139
    assert stages["02-prune"]["network"]["macs"] == PRUNE[1]["macs"]
    assert stages["02-prune"]["before"]["accuracy"] == 0.975
    assert stages["02-prune"]["points"] == pytest.approx(0.6139 - 0.975)
    assert stages["03-distill"]["training"] == DISTILL[2]["history"]
    assert [(stages[name]["network"] or {}).get("fps") for name in list(stages)[:5]] == [
        1000 / P50_MS["parent.tflite"],
        1000 / P50_MS["float.tflite"],  # pruned: the shape of what was distilled and exported
        1000 / P50_MS["float.tflite"],
        1000 / P50_MS["int8.tflite"],
        None,
    ]
    before, after = layers(1.0), layers(0.6)
    assert [layer["channels"] for layer in report["layers"]] == [
        [one["outputs"], other["outputs"]] for one, other in zip(before, after, strict=True)
    ]
    assert report["verify"]["agreement"][1]["histogram"] == {"0": 3593, "1": 7}
    for figure in (
        "3.4× faster, 0.5 points lost, 10.3× smaller",
        "interval 3.30 to 3.50×",
        "7 of 3,600",
        "99.72%",
        "9b1c" * 16,
        "77ae" * 16,
        "compress run recipes/digits.yaml",
        "Seed 7",
        "head replaced, 1000 -> 10 classes",
    ):
        assert figure in text
    assert "−0.5 points" in text
    assert report["headline"]["baseline"] == "parent.tflite"


def test_summary_has_a_row_per_network_and_file(written: Reported) -> None:
    rows = summary_rows(written("whole")[0])
    assert len({tuple(row) for row in rows}) == 1
    by_name = {row["network"]: row for row in rows}
    assert list(by_name)[:3] == ["01-train parent.tflite", "01-train parent.onnx", "02-prune"]
    assert by_name["02-prune"]["accuracy"] == "61.4% (torch)"
    assert by_name["02-prune"]["fps"] == by_name["02-prune"]["p50"] == by_name["02-prune"]["size"] == "not measured"
    int8 = by_name["04-quantize int8.onnx"]
    assert (int8["accuracy"], int8["vs parent"], int8["p50"]) == ("96.7%", "−0.5 points", "2.05 ms")
    assert (int8["fps"], int8["speed-up"], int8["size"]) == ("488", "3.24×", "902 kB")
    assert all(isinstance(value, str) for row in rows for value in row.values())


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ("train only", "Nothing compressed: 97.5% accuracy"),
        ("no prune", "3.4× faster, 0.5 points lost, 10.3× smaller"),
        ("no benchmark", "0.5 points lost, 10.3× smaller; speed not measured"),
        ("no export", "0.8 points lost; speed and size not measured"),
        ("float only", "2.0× faster, 0.3 points lost, 2.9× smaller"),
        ("only the parent exported", "36.1 points lost; speed and size not measured"),
        ("benchmark alone", "3.4× faster, 10.3× smaller; accuracy not measured"),
        ("empty stages", "Nothing compressed: nothing measured"),
        ("every kind", "3.4× faster, 0.5 points lost, 10.3× smaller"),
        ("weights alone", "2.0× faster, 0.8 points lost, 11.2× smaller"),
        ("simulated", "W4A8 simulated: 1.4 points lost; no file, size or speed"),
        ("simulated, no export", "W4A8 simulated: 1.4 points lost; no file, size or speed"),
        (
            "pruned and simulated",
            "2.0× faster, 0.3 points lost, 2.9× smaller; W4A8 simulated: 1.4 points lost",
        ),
    ],
)
def test_headline_says_what_was_measured_and_what_was_not(written: Reported, variant: str, sentence: str) -> None:
    assert written(variant)[0]["headline"]["sentence"] == sentence


def test_files_of_smaller_weights_stand_between_float_and_int8(written: Reported) -> None:
    report, html, markdown = written("every kind")
    kinds = [file["kind"] for file in report["files"]]
    assert kinds == [kind for kind in ("parent", "float", "float16", "int8_weights", "int8") for _ in (0, 1)]
    assert report["headline"]["file"] == "int8.tflite"
    numbers = {file["kind"]: file["numbers"] for file in report["files"]}
    assert numbers == {
        "parent": None,
        "float": None,
        "float16": "float16 weights, computes in float32",
        "int8_weights": "int8 weights, computes in float32",
        "int8": "int8 + 2 layers float32",
    }
    for text in filter(None, numbers.values()):
        assert text in Page(html).text
        assert text in markdown
    # Made from the float network that was exported, whatever `quantize` left.
    assert {file["stage"] for file in report["files"] if file["kind"] == "int8_weights"} == {"03-distill"}
    for kind in ("float16", "int8_weights"):
        assert f'class="dot {kind}"' in html
        assert f"var(--{kind})" in html.partition("Accuracy against latency</h3>")[2].partition("</svg>")[0]
    assert "float16 weights" in html.partition("Accuracy against latency</h3>")[2].partition("</svg>")[0]
    assert "04-quantize int8.onnx, int8 + 2 layers float32" in [row["network"] for row in summary_rows(report)]


@pytest.mark.parametrize("variant", ["simulated", "pruned and simulated", "simulated, no export"])
def test_what_no_runtime_executes_has_no_file_size_or_latency(written: Reported, variant: str) -> None:
    report, html, markdown = written(variant)
    folder = next(stage["folder"] for stage in report["stages"] if stage["stage"] == "quantize")
    (row,) = (row for row in summary_rows(report) if row["network"].startswith(folder))
    assert row["network"] == f"{folder}, W4A8 (simulated)"
    assert row["accuracy"] == "96.1% (torch)"
    assert {row[figure] for figure in ("size", "p50", "fps", "speed-up")} == {"simulated"}
    assert not any(file["stage"] == folder for file in report["files"])
    assert next(stage for stage in report["stages"] if stage["folder"] == folder)["network"]["fps"] is None
    warning = f"What {folder} left is W4A8, simulated in training: no runtime here executes it."
    assert any(sentence.startswith(warning) for sentence in report["warnings"])
    assert warning in Page(html).text
    assert re.search(rf"\| {folder}, W4A8 \(simulated\) .*\| simulated \|", markdown)
    facts = report["headline"]["facts"]
    if variant != "pruned and simulated":
        assert (facts["speed"]["value"], facts["size"]["value"]) == ("simulated", "simulated")
    else:  # those of the pruned float file, as the headline says
        assert report["headline"]["file"] == "float.tflite"


def test_the_layers_that_cost_most_and_the_stored_numbers_are_told(written: Reported, tmp_path: Path) -> None:
    _, html, markdown = written("whole")
    for text in (Page(html).text, markdown):
        assert "equal to the last bit (31 grids, weights of 29 layers)" in text
        assert text.index("27.9 dB") < text.index("31.3 dB")  # the worst first
        assert "the whole network: 24.5 dB" in text
    differs = verify(verdict="FAIL")
    differs["static"] |= {"differing": 2}
    _, html, markdown = reported(tmp_path, (*WHOLE[:5], ("verify", None, differs)))
    assert "2 layers hold different numbers" in Page(html).text
    assert "**2 layers hold different numbers**" in markdown


def test_accuracy_without_verification_is_called_torch(written: Reported) -> None:
    report, html, markdown = written("no verify")
    assert {file["accuracy_of"] for file in report["files"]} == {"torch"}
    assert report["headline"]["facts"]["accuracy"]["condition"].startswith(
        "of the torch networks, not of exported files"
    )
    assert "The files were not verified" in Page(html).text
    assert "96.7% (torch)" in markdown


def test_file_measured_against_a_torch_parent_says_so(tmp_path: Path) -> None:
    stages = (*WHOLE[:5], ("verify", None, verify(("int8.tflite",))), BENCHMARK)
    fact = read_report(write_run(tmp_path, stages))["headline"]["facts"]["accuracy"]
    assert fact["value"] == "−0.8 points"
    assert "measured on int8.tflite, against the torch parent" in fact["condition"]


def test_the_last_benchmark_and_export_count(tmp_path: Path) -> None:
    slower = benchmark()
    for row in slower["rows"]:
        row["p50_ms"] *= 2
    report = read_report(write_run(tmp_path, (*WHOLE, ("benchmark", None, slower))))
    assert {file["file"]: file["timing"]["p50_ms"] for file in report["files"]} == {n: 2 * P50_MS[n] for n in FILES}
    assert report["benchmark"]["stage"] == "08-benchmark"


def test_figures_of_a_file_that_was_exported_anew_are_left_out(tmp_path: Path) -> None:
    again = export(("parent.onnx", "int8.onnx"))
    again["files"]["int8.onnx"]["sha256"] = "e" * 64
    again["files"]["parent.onnx"]["sha256"] = export()["files"]["parent.onnx"]["sha256"]
    report = read_report(write_run(tmp_path, (*WHOLE, QUANTIZE, ("export", None, again))))
    files = {file["file"]: file for file in report["files"]}
    assert files["int8.onnx"]["timing"] is None
    assert files["int8.onnx"]["accuracy_of"] == "torch"
    assert files["parent.onnx"]["timing"]
    assert files["parent.onnx"]["accuracy_of"] == "file"
    assert "06-verify measured int8.onnx before it was exported anew: its figures are left out." in report["warnings"]


def test_a_network_that_was_never_exported_is_not_mixed_into_the_headline(tmp_path: Path) -> None:
    report = read_report(write_run(tmp_path, (*VARIANTS["float only"], QUANTIZE)))
    assert report["headline"]["file"] == "float.tflite"
    assert report["headline"]["facts"]["accuracy"]["value"] == "−0.3 points"
    assert "The network that 07-quantize left was not exported" in report["warnings"][-1]


def test_parity_failure_noise_and_unfinished_stages_are_on_top(tmp_path: Path) -> None:
    noisy = benchmark()
    for pair in noisy["pairs"]:
        pair["verdict"] = "NOISY"
    failed = verify(verdict="FAIL") | {"reason": "int8.onnx and int8.tflite differ by 9 LSB, allowed 1"}
    write_run(tmp_path, (*WHOLE[:5], ("verify", None, failed), ("benchmark", None, noisy)))
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"stages": [*run["stages"], "08-benchmark"]}))
    report = read_report(tmp_path)
    assert [warning.split()[0] for warning in report["warnings"]] == ["Parity", "These", "Noisy", "Unfinished"]
    assert report["warnings"][0].endswith("differ by 9 LSB, allowed 1")
    assert report["headline"]["sentence"].startswith("About 3.4× faster")


def test_an_arm_board_is_named_and_not_warned_about(tmp_path: Path) -> None:
    board = benchmark(machine="Raspberry Pi 5", arch="aarch64", is_arm=True, target="ssh")
    report = read_report(write_run(tmp_path, (*WHOLE[:6], ("benchmark", None, board))))
    assert report["warnings"] == []
    assert report["machine"]["statement"] == "Measured on Raspberry Pi 5 (aarch64)."


@pytest.mark.parametrize(
    "conditions",
    [
        {"arch": "x86_64", "is_arm": True},
        {"arch": None, "is_arm": None},
        {"arch": "aarch64", "is_arm": True, "target": "emulated"},
        {"arch": "riscv64", "is_arm": False},
    ],
)
def test_doubtful_machines_are_not_arm(tmp_path: Path, conditions: dict[str, Any]) -> None:
    report = read_report(write_run(tmp_path, (*WHOLE[:6], ("benchmark", None, benchmark(**conditions)))))
    assert not report["machine"]["is_arm"]
    assert report["machine"]["statement"] in report["warnings"]


def test_the_parent_is_the_one_that_the_product_names(tmp_path: Path) -> None:
    loaded = ("load", network(0.981), {})
    write_run(tmp_path, (loaded, TRAIN, *WHOLE[1:]))
    assert read_report(tmp_path)["parent"]["stage"] == "02-train"
    for stage in ("quantize", "export"):
        break_manifest(tmp_path, stage, {"product": {"parent": "stages/01-load/network", "files": {}}})
    report = read_report(tmp_path)
    assert (report["parent"]["stage"], report["parent"]["accuracy"]) == ("01-load", 0.981)
    assert report["stages"][2]["network"]["difference"] == pytest.approx(0.6139 - 0.981)
    assert [row["network"] for row in summary_rows(report)][:2] == ["01-load parent.tflite", "01-load parent.onnx"]


def test_a_float_file_faster_than_the_int8_file_is_mentioned(tmp_path: Path) -> None:
    measured = benchmark()
    measured["rows"][3]["p50_ms"] = 1.5
    report = read_report(write_run(tmp_path, (*WHOLE[:6], ("benchmark", None, measured))))
    assert report["headline"]["file"] == "int8.tflite"
    assert "float.tflite is faster here than int8.tflite: 1.50 ms against 1.86 ms at p50." in report["warnings"]


def test_texts_of_manifests_stay_texts(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script> | a$x^2$ \"b\""
    stages = list(WHOLE)
    pruned = json.loads(json.dumps(PRUNE).replace("features.0.0", "<b>$features_"))
    trained = json.loads(json.dumps(TRAIN).replace("features.0.0", "<b>$features_"))
    checked = verify()
    checked["agreement"][0]["a"] = evil
    stages[:2], stages[5] = [trained, pruned], ("verify", None, checked)
    write_run(tmp_path, tuple(stages), (evil,), name=evil, command=evil)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert evil in page.text
    for drawing in re.findall(r"<svg .*?</svg>", html, flags=re.S):
        ElementTree.fromstring(drawing)
    assert "01-train: \\<script" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, WHOLE))
    first = {path.name: path.read_bytes() for path in tmp_path.glob("report.*")}
    write_report(tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.glob("report.*")}
    assert set(first) == {"report.html", "report.json", "report.md"}
    assert {path.name for path in tmp_path.iterdir()} == {*first, "run.json", "recipe.yaml", "stages"}


def break_manifest(folder: Path, stage: str, change: dict[str, Any] | str) -> None:
    path = next(folder.glob(f"stages/*-{stage}/manifest.json"))
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("train", "{", ["01-train", "not JSON"]),
        ("train", "[]", ["01-train", "the file"]),
        ("train", {"stage": None}, ["01-train", "stage"]),
        ("train", {"network": {"accuracy": 97.2}}, ["network.accuracy"]),
        ("train", '{"stage": "train", "index": 1, "folder": "x", "seconds": NaN}', ["seconds", "finite"]),
        ("benchmark", {"metrics": {}}, ["07-benchmark", "metrics.conditions"]),
        ("benchmark", {"metrics": benchmark() | {"rows": [benchmark()["rows"][0] | {"p50_ms": "fast"}]}},
         ["metrics.rows.0.p50_ms"]),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_one_line(tmp_path: Path, stage: str, change: Any, words: list[str]) -> None:
    break_manifest(write_run(tmp_path, WHOLE), stage, change)
    with pytest.raises(CompressError) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="not a run folder"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "empty", "stages": ["01-train"]}')
    with pytest.raises(CompressError, match="none of its stages left a manifest"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "interrupted", "stages": []}')
    with pytest.raises(CompressError, match="goes on where it stopped"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.points(-0.0042), "−0.4 points"),
        (wording.points(0.0042), "+0.4 points"),
        (wording.points(-0.0001), "0.0 points"),
        (wording.points(None), "not measured"),
        (wording.Score().lost(-0.0001), "less than 0.1 points lost"),
        (wording.Score().lost(0.0), "accuracy unchanged"),
        (wording.faster(0.5), "2.0× slower"),
        (wording.faster(1.04), "4% faster"),
        (wording.faster(1.02, (0.99, 1.05)), "no measurable change in speed"),
        (wording.smaller(5.2), "5.2× smaller"),
        (wording.size(999), "999 B"),
        (wording.size(8_902_116), "8.90 MB"),
        (wording.count(94_000_000), "94.0 M"),
        (wording.count(1024), "1,024"),
        (wording.agreement(0.99999), "99.99%"),
        (wording.ms(0.0123), "0.012 ms"),
        (wording.duration(571.4), "9 min 31 s"),
    ],
)
def test_figures_in_words(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        ("train", {"lr": 0.05, "epochs": 8, "batch_size": 64, "ema": None, "only": []},
         "epochs 8, lr 0.05, batch size 64"),
        ("prune", {"steps": 3, "goal": {"macs": 0.25, "params": None}, "criterion": {"use": "taylor"}, "round_to": 16},
         "goal macs 0.25, taylor, round to 16, steps 3"),
        ("distill", {"losses": [{"use": "kd", "weight": 0.9}, {"use": "fitnets"}], "teacher": {"use": "parent"}},
         "parent, kd × 0.9 + fitnets"),
        ("load", {"use": "mobilenet_v2", "weights": "a.safetensors"}, ""),
        ("export", {}, ""),
    ],
)  # fmt: skip
def test_the_most_telling_settings_of_a_stage_in_a_few_words(
    stage: str, settings: dict[str, Any], expected: str
) -> None:
    assert key_settings(stage, settings) == expected


def test_every_stage_says_whether_it_ran_and_what_was_asked(tmp_path: Path) -> None:
    write_run(tmp_path, WHOLE)
    break_manifest(tmp_path, "train", {"settings": {"use": "train", "epochs": 8}, "resumed": True})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "12.3 s taken from an earlier run, 2026-11-21 10:02 UTC epochs 8" in page
    assert re.search(r"02-prune 97\.5% → 61\.4% .{0,90} 24\.7 s ran", page)
    assert "| taken from an earlier run, 2026-11-21 10:02 UTC | epochs 8 |" in (tmp_path / "report.md").read_text()
