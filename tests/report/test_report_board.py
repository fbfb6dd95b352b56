"""What a report says of a board, of one that throttles and of emulated cores, and that it says all of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import EXPORT, FILES, P50_MS, QUANTIZE, TRAIN, VERIFY, WHOLE, Page, benchmark, reported

from compress.report import summary_rows
from compress.report.folder import RunFolderError

QUIET = {"now": [], "since_boot": [], "count": 0, "cooling": 0}
HOT = {"now": ["soft temperature limit"], "since_boot": ["soft temperature limit"], "count": 0, "cooling": 0}
STATE = {
    "governor": "performance", "min_mhz": 1500, "max_mhz": 2400, "current_mhz": 2400, "temperature_c": 51.2,
    "throttle": QUIET, "load_1min": 0.21,
}  # fmt: skip
PI5 = {
    "target": "ssh://pi@raspberrypi:22", "board": "Raspberry Pi 5 Model B Rev 1.0", "cpu": "4 x Cortex-A76",
    "machine": "Raspberry Pi 5 Model B Rev 1.0, 4 x Cortex-A76", "arch": "aarch64", "is_arm": True,
    "features": ["asimd", "asimdhp", "asimddp"], "cores": 4, "cores_allowed": 4, "cores_fastest": [0, 1, 2, 3],
    "ram_gb": 7.87, "os": "Debian GNU/Linux 12 (bookworm)", "kernel": "Linux 6.6.31+rpt-rpi-2712", "libc": "glibc 2.36",
    "python": "3.11.2", "python_path": "/home/pi/.cache/compress/venv/bin/python3", "bits": 64, "numpy": "2.4.6",
    "venv": True, "disk_free_mb": 23104, "agent": "ab" * 32,
    "runtimes": {"onnxruntime": "1.31.1", "litert": "2.3.0"}, **STATE, "temperature_after_c": 62.4,
    "settings": "onnxruntime: threads=1, optimization=all; litert: threads=1, delegate=default (XNNPACK)",
    "notes": [], "throttled": [], "threads": 1, "cores_used": [2], "rounds": 4, "runs": 256, "warmup_s": 2.0,
    "min_s": 15.0, "batch": 1, "tolerance": 0.05, "seed": 7,
    "before": STATE, "during": {"current_mhz": [2398, 2400], "temperature_c": [51.2, 63.5]},
    "after": STATE | {"temperature_c": 62.4, "load_1min": 1.04},
}  # fmt: skip


def on_board(file: str, differing: int = 0, **fields: Any) -> dict[str, Any]:
    runtime, version = ("onnxruntime", "1.31.1") if file.endswith(".onnx") else ("litert", "2.3.0")
    integer = file.startswith("int8")
    largest: dict[str, Any] = (
        {"max_lsb": min(differing, 3)} if integer else {"max_difference": 3.6e-06 if differing else 0.0}
    )
    return {
        "file": file, "runtime": runtime, "images": 64, "correct": 62, "accuracy": 62 / 64, "host_accuracy": 62 / 64,
        "outputs": 640, "differing": differing, **largest, "equal": not differing, "board_version": version,
        "host_version": version, "outputs_sha256": "cd" * 32, "host_sha256": "cd" * 32, **fields,
    }  # fmt: skip


def throttling(file: str = "int8.tflite") -> dict[str, Any]:
    """Five minutes of a board without a fan: it heats up, and from 82 °C on the firmware lowers the clock."""
    points = []
    for step in range(1, 61):
        t_s = 5.0 * step
        celsius = 85 - 34 * math.exp(-t_s / 70)
        hot = celsius > 82
        mhz = 2400 - (300 * round(min(3, (celsius - 82) * 2)) if hot else 0)
        p50 = 4.3 * 2400 / mhz * (1 + 0.004 * math.sin(step))
        points.append(
            {"t_s": t_s, "p50_ms": p50, "p90_ms": p50 * (1.12 if hot else 1.03), "samples": int(5000 / p50), "mhz": mhz,
             "temperature_c": celsius, "throttle": HOT if hot else QUIET,
             "throttled": ["soft temperature limit during the run"] if hot else []}
        )  # fmt: skip
    first, last = points[6]["p50_ms"], points[-6]["p50_ms"]
    return {
        "file": file, "runtime": "litert", "threads": 1, "cores": [2], "minutes": 5.0, "series": points,
        "first_minute_p50_ms": first, "last_minute_p50_ms": last, "slowdown": last / first,
        "throttled": ["soft temperature limit during the run", "the clock went from 2400 to 1500 MHz"],
        "verdict": "THROTTLED",
    }  # fmt: skip


def steady(file: str = "int8.onnx") -> dict[str, Any]:
    """A virtual machine: it tells neither clock nor temperature."""
    points = [
        {"t_s": 5.0 * step, "p50_ms": 5.1 + 0.02 * (step % 3), "p90_ms": 5.4, "samples": 900, "mhz": "unavailable",
         "temperature_c": "unavailable", "throttle": "unavailable", "throttled": []}
        for step in range(1, 25)
    ]  # fmt: skip
    return {
        "file": file, "runtime": "onnxruntime", "threads": 1, "series": points, "first_minute_p50_ms": 5.12,
        "last_minute_p50_ms": 5.13, "slowdown": 1.002, "throttled": [], "verdict": "OK",
    }  # fmt: skip


def measured(samples: int = 2048, sampled_s: float = 64.2, **fields: Any) -> dict[str, Any]:
    found = benchmark(**PI5)
    for number, row in enumerate(found["rows"]):
        row |= {"samples": samples, "sampled_s": sampled_s, "sha256": f"{number:02d}" * 32}
    return found | fields


def run_of(metrics: dict[str, Any]) -> tuple[Any, ...]:
    return (*WHOLE[:6], ("benchmark", None, metrics))


CORES = ("cortex-a53", "cortex-a72", "cortex-a76")
COUNTED = {"parent.tflite": 41_200_000, "float.tflite": 18_900_000, "int8.tflite": 13_377_123}


def emulated() -> dict[str, Any]:
    counts = [
        {"file": file, "runtime": "litert", "cpu": cpu, "instructions": number if cpu != "cortex-a76" else number // 2,
         "repeat_instructions": (number if cpu != "cortex-a76" else number // 2) + 40, "overhead_instructions": 900_000,
         "cycles_estimated": "unavailable" if cpu == "cortex-a53" else number // (2 if cpu == "cortex-a72" else 5),
         "share_covered": "unavailable" if cpu == "cortex-a53" else 0.961, "size_bytes": 861_504, "sha256": "ef" * 32}
        for file, number in COUNTED.items()
        for cpu in CORES
    ]  # fmt: skip
    parity = [
        {"file": file, "runtime": "litert" if file.endswith("tflite") else "onnxruntime", "cpu": cpu, "outputs": 640,
         "differing": 0, "max_lsb": 0, "max_difference": None, "images": 8, "outputs_sha256": "cd" * 32,
         "host_sha256": "cd" * 32}
        for file in ("int8.onnx", "int8.tflite")
        for cpu in CORES
    ]  # fmt: skip
    conditions = {
        "target": "emulated", "machine": f"emulated {', '.join(CORES)} (qemu 7.2.17 on x86_64)", "qemu": "7.2.17",
        "cpus": CORES, "boards": {"cortex-a53": "Raspberry Pi 3", "cortex-a72": "Raspberry Pi 4"},
        "runtimes": {"onnxruntime": "1.31.1", "litert": "2.3.0"}, "python": "3.11.2", "numpy": "2.4.6", "threads": 1,
        "userland": "0a1b2c3d", "llvm_mca": "16.0.6", "cycle_models": {"cortex-a76": "neoverse-n1"},
        "statement": "Emulated: no time is measured. Cycles are estimated from the hot blocks.",
    }  # fmt: skip
    return {"conditions": conditions, "rows": [], "pairs": [], "parity": parity, "counts": counts}


def test_a_board_is_described_as_far_as_a_reader_needs_to_believe_it(tmp_path: Path) -> None:
    """One by one what has to stand beside a board's figures."""
    accuracy = [on_board("parent.tflite", 611), on_board("int8.onnx"), on_board("int8.tflite")]
    report, html, markdown = reported(tmp_path, run_of(measured(accuracy=accuracy, sustained=[throttling()])))
    text = Page(html).text
    board = text[text.index("The board What timed the files, whether it computes") :]
    for word in (
        "Raspberry Pi 5 Model B Rev 1.0", "4 x Cortex-A76", "asimddp", "7.87 GB", "Debian GNU/Linux 12 (bookworm)",
        "6.6.31+rpt-rpi-2712", "1.31.1", "2.3.0", "0404", "Affinity", "performance", "1500 to 2400 MHz", "51.2 °C",
        "62.4 °C", "2400 MHz", "51 to 64 °C", "2,398 to 2,400 MHz", "2 s in each process",
        "at least 256 samples and 15 s", "4 rounds of fresh ones, in turns: parent, the others, parent again",
        "1.004× in LiteRT", "NOISY beyond 5% from 1",
        "delegate=default (XNNPACK)", "ab" * 32, "ssh://pi@raspberrypi:22",
    ):  # fmt: skip
        assert word in board, word
        assert word in markdown or re.sub(r"([|\[<*`])", r"\\\1", word) in markdown, word
    for word in ("p50", "p90", "p99", "Least", "Spread", "Start-up", "First", "Memory"):
        assert word in text[text.index(" Latency ") : text.index("The board")]
    assert "These are" not in report["machine"]["statement"]
    assert report["machine"]["is_arm"]
    assert "MLPerf Mobile asks for at least 1,024 samples and 60 s, and judges by p90: met by every file." in text


@pytest.mark.parametrize(
    ("samples", "sampled_s", "words"),
    [
        (1024, 60.0, "met by every file"),
        (1023, 60.0, "not met (as few as 1,023 samples, as short as 1 min)"),
        (1024, 59.9, "not met (as few as 1,024 samples, as short as 59.9 s)"),
        (1024, None, "not met (as few as 1,024 samples, as short as an unrecorded time)"),
    ],
)
def test_mlperfs_least_is_said_to_be_met_or_not(
    tmp_path: Path, samples: int, sampled_s: float | None, words: str
) -> None:
    report, html, markdown = reported(tmp_path, run_of(measured(samples, sampled_s)))
    assert words in report["board"]["mlperf"]
    assert words in Page(html).text
    assert words in markdown


def test_one_file_that_was_measured_for_too_short_is_named(tmp_path: Path) -> None:
    metrics = measured()
    metrics["rows"][-1] |= {"sampled_s": 3.0, "samples": 700}
    report, _, _ = reported(tmp_path, run_of(metrics))
    assert report["board"]["mlperf"].endswith("not met by int8.tflite (700 samples, 3.0 s).")
    assert "met by parent.onnx" in report["board"]["mlperf"]


def test_equal_outputs_are_said_to_be_equal_and_float_sums_are_no_fault(tmp_path: Path) -> None:
    accuracy = [on_board("parent.tflite", 611), on_board("int8.onnx"), on_board("int8.tflite")]
    report, html, markdown = reported(tmp_path, run_of(measured(accuracy=accuracy)))
    fact = report["headline"]["facts"]["board"]
    assert (fact["value"], fact["tone"]) == ("equal, bit for bit", "good")
    assert fact["detail"] == "int8.onnx, int8.tflite"
    assert "64 images, ONNX Runtime 1.31.1 on both, LiteRT 2.3.0 on both" in fact["condition"]
    assert not any("other outputs" in warning for warning in report["warnings"])
    for text in (Page(html).text, markdown):
        assert "611 of 640" in text
        assert "3.6e-06" in text


def test_other_outputs_on_the_board_are_counted_and_warned_about_with_both_versions(tmp_path: Path) -> None:
    old = {"board_version": "2.14.0 (tflite-runtime)"}
    accuracy = [on_board("int8.onnx"), on_board("int8.tflite", 12, **old, accuracy=61 / 64)]
    report, html, markdown = reported(tmp_path, run_of(measured(accuracy=accuracy)))
    warning = (
        "int8.tflite computes other outputs on the machine that measured than here: 12 of 640 differ, by at most 3 LSB"
        " (LiteRT 2.14.0 (tflite-runtime) there, 2.3.0 here)."
    )
    assert warning in report["warnings"]
    assert warning in Page(html).text
    assert warning in markdown
    fact = report["headline"]["facts"]["board"]
    assert (fact["value"], fact["tone"]) == ("12 of 1,280 differ", "bad")
    row = re.search(r"\| int8\.tflite \| LiteRT .* 12 of 640 .*", markdown)
    assert row
    assert "95.3%" in row[0]


def drawing(html: str, heading: str) -> ElementTree.Element:
    after = html.partition(f"<h3>{heading}</h3>")[2]
    return ElementTree.fromstring(after[after.index("<svg") : after.index("</svg>") + len("</svg>")])


def test_throttling_is_drawn_where_it_happened(tmp_path: Path) -> None:
    series = throttling()
    held = [point for point in series["series"] if point["throttled"]]
    assert 0 < len(held) < len(series["series"])
    report, html, markdown = reported(tmp_path, run_of(measured(sustained=[series])))
    words = "".join(drawing(html, "int8.tflite without a pause").itertext())
    for word in ("latency per image, ms", "MHz (left), °C (right)", "minutes", "throttled", "p50, shaded to p90"):
        assert word in words
    svg = html.partition("int8.tflite without a pause</h3>")[2].partition("</svg>")[0]
    shaded = re.findall(r"fill: var\(--bad\); opacity: 0.14", svg)
    assert len(shaded) == 2 * len(held)  # in both panels
    warning = next(text for text in report["warnings"] if text.startswith("The machine throttles"))
    assert "int8.tflite takes 1.59× as long" in warning
    assert "5 min without a pause" in warning
    for text in (Page(html).text, markdown):
        assert "THROTTLED" in text
        assert "1,500 to 2,400 MHz" in text
        assert "the clock went from 2400 to 1500 MHz" in text
    assert report["board"]["sustained"][0]["held_back"] == len(held)


def test_a_machine_that_tells_no_clock_gets_the_latency_alone(tmp_path: Path) -> None:
    report, html, _ = reported(tmp_path, run_of(measured(sustained=[steady()])))
    words = "".join(drawing(html, "int8.onnx without a pause").itertext())
    assert "latency per image, ms" in words
    assert "MHz" not in words
    assert "throttled" not in words
    assert "Clock unavailable, temperature unavailable" in Page(html).text
    assert not any("throttles" in warning for warning in report["warnings"])


def test_emulated_cores_have_counts_and_no_speed(tmp_path: Path) -> None:
    report, html, markdown = reported(tmp_path, run_of(emulated()))
    text = Page(html).text
    assert report["headline"]["sentence"].endswith("; speed not measured (emulated)")
    assert not report["machine"]["is_arm"]
    for said in (text, markdown, json.dumps(summary_rows(report))):
        assert not re.search(r"fps|\d ms\b|faster|p50|p90", re.sub(r"Time taken", "", said)), said
        assert "13.4 M" in said
    for said in (text, markdown):
        assert "no time is measured" in said
        assert "cycles, estimated" in said.lower()
        assert "6.69 M" in said  # estimated cycles of int8.tflite on the A72
        assert "2.18× fewer" in said  # float against parent, both float: instructions can be compared
        assert "other type" in said  # int8 against float: they cannot
        assert "3.08× fewer" in said  # their cycles can
        assert "unavailable" in said
        assert "3 ppm off" in said
    assert [entry["equal"] for entry in report["board"]["parity"]] == [True] * 6
    assert report["headline"]["facts"]["board"]["value"] == "equal, bit for bit"
    assert report["headline"]["facts"]["speed"]["label"] == "Instructions"
    assert "instructions" in summary_rows(report)[0]


def test_emulated_outputs_that_differ_are_warned_about(tmp_path: Path) -> None:
    metrics = emulated()
    metrics["parity"][4] |= {"differing": 7, "max_lsb": 103}
    report, _, _ = reported(tmp_path, run_of(metrics))
    assert (
        "int8.tflite computes other outputs on an emulated Cortex-A72 than here: 7 of 640 differ, by at most 103 LSB."
        in report["warnings"]
    )
    assert report["headline"]["facts"]["board"]["tone"] == "bad"


def test_a_board_that_is_emulated_is_not_arm(tmp_path: Path) -> None:
    """A machine behind ssh, or a container, that runs ARM programs on an x86 CPU and takes its time for it."""
    conditions = PI5 | {"emulator": "qemu-aarch64"}
    report, html, markdown = reported(tmp_path, run_of(benchmark(**conditions)))
    assert not report["machine"]["is_arm"]
    assert report["machine"]["statement"] in report["warnings"]
    for said in (Page(html).text, markdown):
        assert "Timed under qemu-aarch64" in said
        assert "this is not ARM fps" in said


def test_no_condition_is_left_out(tmp_path: Path) -> None:
    """Whatever the agent will say one day is shown, known to the report or not."""
    odd = {"fan": "removed", "supply_v": 5.1, "case": ["none"]}
    _, html, markdown = reported(tmp_path, run_of(benchmark(**PI5, **odd)))
    for said in (Page(html).text, markdown):
        for word in ("Fan", "removed", "Supply v", "5.1", "Case"):
            assert word in said


def test_a_board_that_tells_nothing_is_unavailable_and_not_zero(tmp_path: Path) -> None:
    unknown = dict.fromkeys(STATE, "unavailable")
    conditions = PI5 | unknown | {"before": unknown, "after": unknown, "during": {}, "features": "unavailable"}
    report, html, _ = reported(tmp_path, run_of(benchmark(**conditions)))
    changing = {row[0]: row[1:] for row in report["board"]["changing"]}
    assert changing["Temperature"] == ["unavailable", "", "unavailable"]
    assert changing["Throttling"] == ["unavailable", "", "unavailable"]
    assert "Clock, least to most unavailable" in Page(html).text


def test_run_folders_of_before_have_their_machine_too(tmp_path: Path) -> None:
    """`benchmark()` is what the first version wrote: no states, no accuracy, no seconds."""
    before = benchmark(governor="schedutil", temperature_c=48.0, temperature_after_c=55.5, current_mhz=1800)
    report, html, markdown = reported(tmp_path, run_of(before))
    assert ["Temperature", "48 °C", "", "55.5 °C"] in report["board"]["changing"]
    assert ["Frequency", "1800 MHz", "", "not measured"] in report["board"]["changing"]
    for said in (Page(html).text, markdown):
        assert "schedutil" in said
        assert "as short as an unrecorded time" in said
    assert "board" not in report["headline"]["facts"]
    assert set(P50_MS) >= {row["file"] for row in report["benchmark"]["rows"]} == set(FILES)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("accuracy", [on_board("int8.onnx") | {"differing": None}], "metrics.accuracy.0.differing"),
        ("sustained", [steady() | {"series": [{"t_s": 1.0, "p50_ms": "fast"}]}], "metrics.sustained.0.series.0.p50_ms"),
        ("counts", [emulated()["counts"][0] | {"instructions": 0}], "metrics.counts.0.instructions"),
    ],
)
def test_a_broken_measurement_is_one_line(tmp_path: Path, field: str, value: Any, word: str) -> None:
    with pytest.raises(RunFolderError, match=re.escape(word)) as error:
        reported(tmp_path, run_of(measured(**{field: value})))
    assert "\n" not in str(error.value)


def test_a_run_without_pruning_has_a_board_too(tmp_path: Path) -> None:
    plain = ("parent.onnx", "parent.tflite", "int8.onnx", "int8.tflite")
    found = benchmark(plain, **PI5)
    report, html, _ = reported(tmp_path, (TRAIN, QUANTIZE, EXPORT, VERIFY, ("benchmark", None, found)))
    assert report["board"]["title"] == "The board"
    assert report["machine"]["statement"] in Page(html).text
