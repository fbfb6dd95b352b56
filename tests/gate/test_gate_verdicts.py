"""Which numbers give which verdict, as properties and on made runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import IMAGES, labels, network, rounds, top1, write_run

from compress import gate
from compress.errors import CompressError
from compress.gate import timing
from compress.gate.baseline import read_baseline, write_baseline
from compress.gate.goals import METRICS, TYPES, Goal
from compress.gate.record import BaselineError, File, read_run
from compress.gate.timing import between_recordings, median_ms, resampled_medians
from compress.gate.verdict import EXIT_STATUS, ORDER, judged, same_outputs, worst
from compress.progress import Silent
from compress.targets.outputs import compared, output_step

METRIC = st.sampled_from(sorted(METRICS))
VALUE = st.floats(0.01, 100)


@given(metric=METRIC, kind=st.sampled_from(TYPES), goal=st.floats(0.01, 0.99), before=VALUE, now=VALUE, more=VALUE)
def test_better_is_never_judged_worse(metric, kind, goal, before, now, more):
    wanted = Goal(metric, kind, goal)
    better = now + more if wanted.about.more_is_better else now / (1 + more)
    assert ORDER.index(judged(better, None, before, wanted)) <= ORDER.index(judged(now, None, before, wanted))


@given(metric=METRIC, kind=st.sampled_from(TYPES), goal=st.floats(0.01, 0.99), before=VALUE, now=VALUE, half=VALUE)
def test_a_verdict_on_an_interval_holds_on_all_of_it(metric, kind, goal, before, now, half):
    wanted = Goal(metric, kind, goal)
    low, high = now / (1 + half), now * (1 + half)
    verdict = judged(now, (low, high), before, wanted)
    ends = [judged(end, None, before, wanted) for end in (low, now, high)]
    if verdict == "ACCEPT":
        assert ends == ["ACCEPT"] * 3
    elif verdict == "NOISY":
        assert "ACCEPT" in (ends[0], ends[2])
        assert {ends[0], ends[2]} != {"ACCEPT"}
    else:
        assert "ACCEPT" not in ends
    if verdict == "INFEASIBLE":
        assert not wanted.allows_loss


@given(metric=METRIC, kind=st.sampled_from(TYPES[2::2]), goal=st.floats(0.01, 0.99), before=VALUE)
def test_an_improvement_that_is_not_reached_is_infeasible_and_a_loss_a_regression(metric, kind, goal, before):
    wanted = Goal(metric, kind, goal)
    assert judged(before, None, before, wanted) == "INFEASIBLE"
    worse = before * (0.5 if wanted.about.more_is_better else 2)
    assert judged(worse, None, before, wanted) == "REGRESSION"


@given(st.lists(st.sampled_from(ORDER)))
def test_the_worst_line_is_the_verdict(verdicts):
    found = worst(verdicts)
    assert (found in verdicts) if verdicts else found == "ACCEPT"
    assert all(ORDER.index(verdict) <= ORDER.index(found) for verdict in verdicts)


def test_exit_statuses_are_apart_and_leave_errors_and_usage_alone():
    assert EXIT_STATUS["ACCEPT"] == 0
    others = [EXIT_STATUS[verdict] for verdict in ORDER[1:]]
    assert len({*others, 0, 1, 2}) == 6


def test_two_recordings_need_a_control():
    found = between_recordings(rounds(10), rounds(12, seed=1), control=None, tolerance=0.05)
    assert found.noisy
    assert "--measure" in found.noisy[0]


def test_drift_widens_the_interval_and_too_much_of_it_is_noisy():
    before, now = rounds(10), rounds(11, seed=1)
    quiet = between_recordings(before, now, control=(rounds(5, seed=2), rounds(5, seed=3)), tolerance=0.05)
    drifted = between_recordings(before, now, control=(rounds(5, seed=2), rounds(5.2, seed=3)), tolerance=0.05)
    off = between_recordings(before, now, control=(rounds(5, seed=2), rounds(5.5, seed=3)), tolerance=0.05)
    assert not quiet.noisy
    assert quiet.interval[0] < 1.1 < quiet.interval[1]
    assert quiet.interval[1] - quiet.interval[0] < 0.03
    assert not drifted.noisy
    assert drifted.interval[0] < 1.1 / 1.03 < 1.1 * 1.03 < drifted.interval[1]
    assert off.noisy


def test_resamples_are_of_the_rounds_samples_whatever_their_number(monkeypatch):
    uneven = [[1.0] * 5, [2.0] * 50, [3.0] * 500]
    found = resampled_medians(uneven, seed=0, resamples=300)
    assert found.shape == (300,)
    assert set(found) == {1.0, 2.0, 3.0}
    monkeypatch.setattr(timing, "DRAWN_AT_ONCE", 1)
    one_by_one = resampled_medians(rounds(10), seed=0)
    monkeypatch.undo()
    assert one_by_one.std() == pytest.approx(resampled_medians(rounds(10), seed=0).std(), rel=0.2)


def test_the_interval_of_two_recordings_covers_the_truth():
    """Processes differ among themselves by 2 %, samples by 5 %, and the file by 7 %."""
    rng = np.random.default_rng(0)

    def recording(ms: float) -> list[list[float]]:
        levels = ms * (1 + 0.02 * rng.standard_normal(8))
        return [(level * (1 + 0.05 * rng.standard_normal(30))).tolist() for level in levels]

    def exact() -> tuple[list[list[float]], list[list[float]]]:
        return [[1.0]], [[1.0]]

    hits = [
        low <= 1.07 <= high
        for low, high in (
            between_recordings(recording(1), recording(1.07), control=exact(), tolerance=0.05, seed=n).interval
            for n in range(200)
        )
    ]
    assert np.mean(hits) >= 0.85  # eight rounds are few for a percentile bootstrap


def recorded(outputs_NK: np.ndarray, kind: str = "int8") -> File:
    return File("int8.tflite", kind, "0", 1, "litert", "2.3.0", 1.0, outputs_NK=outputs_NK)


@given(st.integers(0, 40), st.integers(0, 3), st.sampled_from([np.int8, np.float32]))
def test_outputs_of_another_machine_may_be_one_step_off_and_no_more(count, step, dtype):
    scale = 1 if dtype == np.int8 else 0.0371
    steps = np.zeros((8, 5))
    steps[:, 2], steps[:, 3] = 100, 1
    computed = steps.copy()
    computed.reshape(-1)[:count] += step
    line = same_outputs(recorded((steps * scale).astype(dtype)), (computed * scale).astype(dtype), "here")
    changed = count if step else 0
    assert line.facts["differing"] == changed
    assert line.facts["largest"] == pytest.approx(step if changed else 0, rel=1e-5)
    assert line.verdict == ("REGRESSION" if changed and step > 1 else "ACCEPT")
    assert line.facts["classes_changed"] == 0


def test_float_files_may_differ_by_a_thousandth_of_the_largest():
    outputs = np.linspace(-3, 10, 40, dtype=np.float32).reshape(8, 5)
    assert same_outputs(recorded(outputs, "float"), outputs + np.float32(0.009), "here").verdict == "ACCEPT"
    assert same_outputs(recorded(outputs, "float"), outputs + np.float32(0.011), "here").verdict == "REGRESSION"
    assert same_outputs(recorded(outputs, "float"), outputs * np.float32(np.nan), "here").verdict == "REGRESSION"


def test_outputs_of_another_shape_are_a_regression():
    zeros = np.zeros((8, 5), np.int8)
    assert same_outputs(recorded(zeros), zeros[:4], "here").verdict == "REGRESSION"
    assert same_outputs(recorded(zeros), zeros.astype(np.float32), "here").verdict == "REGRESSION"


# Made runs: real folders, a real file, answers and times as the test wants them.

PARENT, INT8 = "parent.onnx", "int8.onnx"


def no_runtime(path: Path, images_NCHW: np.ndarray) -> np.ndarray:
    """Outputs that a test does not look at."""
    return np.zeros((len(images_NCHW), 10), np.int8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {PARENT: network(tmp_path / "p.onnx", 2), INT8: network(tmp_path / "i.onnx", 1, seed=1)}


@pytest.fixture
def made(tmp_path: Path, files) -> Callable[..., Path]:
    """A run's folder by name."""

    def make(name: str, **changes) -> Path:
        own = changes.pop("files", files)
        times = {PARENT: rounds(10, seed=1), INT8: rounds(4, seed=2)} | changes.pop("times", {})
        control = changes.pop("control", {PARENT: rounds(10, seed=3)})
        return write_run(tmp_path / name, own, times=times, control=control, **changes)

    return make


@pytest.fixture
def baseline(tmp_path: Path, made) -> Path:
    path = tmp_path / "base" / "baseline.json"
    write_baseline(read_run(made("first", wrong={INT8: range(10)})), path, no_runtime)
    return path


def judge(run: Path, baseline: Path, *goals: str, only: str | None = None):
    return gate.gate(run, baseline, gate.asked(list(goals), only), progress=Silent())


def verdicts(judgement) -> dict[str, str]:
    return {line.metric: line.verdict for line in judgement.lines}


def test_a_run_against_its_own_baseline_is_accepted(tmp_path, baseline):
    found = judge(tmp_path / "first", baseline)
    assert found.verdict == "ACCEPT"
    assert verdicts(found) == dict.fromkeys(("parity", "accuracy", "size", "latency"), "ACCEPT")
    assert all(line.value == line.baseline for line in found.lines)


def test_a_baseline_says_the_same_after_a_round_trip(tmp_path, baseline):
    run, kept = read_run(tmp_path / "first"), read_baseline(baseline)
    assert (kept.name, kept.fingerprint, kept.shipped) == (run.name, run.fingerprint, [INT8])
    assert kept.conditions == run.conditions
    assert list(kept.timings) == list(run.timings)
    for name, file in run.files.items():
        assert (kept.files[name].sha256, kept.files[name].size_bytes) == (file.sha256, file.size_bytes)
        assert kept.files[name].accuracy == file.accuracy
        assert np.array_equal(kept.answers.top1[name], run.answers.top1[name])
    assert np.array_equal(kept.answers.labels_N, labels())
    assert kept.files[INT8].path.read_bytes() == run.files[INT8].path.read_bytes()
    again = baseline.with_name("again") / "baseline.json"
    write_baseline(run, again, no_runtime)
    assert again.read_bytes() == baseline.read_bytes()


def test_a_repeated_recording_is_accepted(made, baseline):
    again = made("again", wrong={INT8: range(10)}, times={PARENT: rounds(10, seed=5), INT8: rounds(4, seed=6)})
    found = judge(again, baseline)
    assert found.verdict == "ACCEPT"
    (latency,) = (line for line in found.lines if line.metric == "latency")
    assert latency.interval[0] < 4 < latency.interval[1]
    assert latency.facts["aa_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "guilty"),
    [
        ({"wrong": {INT8: range(40)}}, "accuracy"),
        ({"times": {INT8: rounds(5, seed=7)}, "wrong": {INT8: range(10)}}, "latency"),
        ({"verdict": "FAIL", "wrong": {INT8: range(10)}}, "parity"),
    ],
)
def test_what_got_worse_is_a_regression_of_that_metric_alone(made, baseline, changes, guilty):
    found = judge(made("worse", **changes), baseline)
    assert found.exit_status == 3
    others = {metric: verdict for metric, verdict in verdicts(found).items() if metric != guilty}
    assert verdicts(found)[guilty] == "REGRESSION"
    assert set(others.values()) == {"ACCEPT"}


def test_a_larger_file_is_a_regression(tmp_path, made, files, baseline):
    larger = network(tmp_path / "l.onnx", 2, seed=1)
    found = judge(made("larger", wrong={INT8: range(10)}, files=files | {INT8: larger}), baseline)
    assert verdicts(found)["size"] == "REGRESSION"
    assert judge(tmp_path / "larger", baseline, "size:percent-max-degradation=500").verdict == "ACCEPT"


def test_mcnemar_needs_both_many_images_and_a_goal_that_is_missed(made, baseline):
    """Ten wrong images before. Three more are no evidence (p = 0.25), eight more are (p = 0.008)."""
    some = judge(made("some", wrong={INT8: range(13)}), baseline, only="accuracy")
    assert some.verdict == "NOISY"
    assert some.lines[0].facts["mcnemar_p"] == pytest.approx(0.25)
    many = made("many", wrong={INT8: range(18)})
    found = judge(many, baseline, only="accuracy")
    assert found.verdict == "REGRESSION"
    assert found.lines[0].facts["mcnemar_p"] == pytest.approx(2 / 2**8)
    assert judge(many, baseline, "accuracy:max-degradation=0.05", only="accuracy").verdict == "ACCEPT"


def test_goals_out_of_reach_are_infeasible_and_not_regressions(made, baseline):
    same = made("same", wrong={INT8: range(10)})
    for goal in (
        "accuracy:threshold=0.99",
        "accuracy:min-improvement=0.02",
        "latency:percent-min-improvement=20",
        "latency:threshold=3",
        "fps:threshold=400",
        "size:percent-min-improvement=10",
        "speedup:threshold=4",
    ):
        found = judge(same, baseline, goal)
        assert (goal, found.verdict, found.exit_status) == (goal, "INFEASIBLE", 4)
    for goal in ("accuracy:threshold=0.94", "latency:threshold=5", "fps:threshold=200", "speedup:threshold=2.3"):
        assert judge(same, baseline, goal).verdict == "ACCEPT"


def test_improvements_that_are_reached_are_accepted(made, baseline):
    better = made("better", wrong={INT8: range(1)}, times={INT8: rounds(2, seed=9)})
    goals = (
        "accuracy:min-improvement=0.04",
        "latency:percent-min-improvement=40",
        "speedup:percent-min-improvement=80",
    )
    assert judge(better, baseline, *goals).verdict == "ACCEPT"


def test_an_interval_across_the_bound_is_noisy(made, baseline):
    wide = made("wide", wrong={INT8: range(10)}, times={INT8: rounds(4.2, spread=0.3, seed=4)})
    found = judge(wide, baseline)
    assert (found.verdict, found.exit_status) == ("NOISY", 5)


def test_a_machine_that_drifted_or_was_restless_is_noisy(made, baseline):
    slower = made("slower", times={PARENT: rounds(12, seed=8), INT8: rounds(5, seed=7)}, control={PARENT: rounds(12)})
    assert verdicts(judge(slower, baseline))["latency"] == "NOISY"
    restless = made("restless", times={INT8: rounds(4, seed=6)}, control={PARENT: rounds(11)})
    (line,) = (line for line in judge(restless, baseline).lines if line.metric == "latency")
    assert line.verdict == "NOISY"
    assert "against itself" in line.reason


def test_another_parent_is_no_control(tmp_path, made, files, baseline):
    changed = files | {PARENT: network(tmp_path / "q.onnx", 2, seed=9)}
    found = judge(made("other", files=changed, times={INT8: rounds(4, seed=6)}), baseline)
    assert verdicts(found)["latency"] == "NOISY"
    assert any("--measure" in reason for reason in gate.reasons(found))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": {"cpu": "4 x Cortex-A72", "machine": "Board C"}}, "the baseline is of Board B"),
        ({"conditions": {"features": ["asimd"]}}, "other features"),
        ({"conditions": {"threads": 4}}, "threads 1 and 4"),
        ({"conditions": {"cores_used": [0]}}, "cores_used"),
        ({"versions": {"onnxruntime": "1.32.0"}}, "onnxruntime 1.31.1 and 1.32.0"),
        ({"settings": {"session.x64quantprecision": "1"}}, "x64quantprecision"),
    ],
)
def test_times_of_another_device_or_runtime_are_refused_with_the_way_out(made, baseline, changes, said):
    run = made("elsewhere", wrong={INT8: range(10)}, **changes)
    with pytest.raises(BaselineError) as caught:
        judge(run, baseline)
    assert said in str(caught.value)
    assert "--measure" in str(caught.value)
    assert "--only accuracy,size,parity" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert judge(run, baseline, only="accuracy,size,parity").verdict == "ACCEPT"


def test_other_data_are_refused_with_the_way_out(tmp_path, made, baseline):
    run = made("data", fingerprint="e" * 64)
    with pytest.raises(BaselineError, match="--only size,parity,latency"):
        judge(run, baseline)
    assert judge(run, baseline, only="size,parity,latency").verdict == "ACCEPT"
    with pytest.raises(BaselineError, match="judged 200 images, not the run's 100"):
        judge(made("fewer", images=100, wrong={INT8: range(3)}), baseline, only="accuracy")


def test_a_run_without_times_is_refused_only_where_times_are_judged(tmp_path, files, baseline):
    run = write_run(tmp_path / "untimed", files, wrong={INT8: range(10)})
    with pytest.raises(BaselineError, match="has no times"):
        judge(run, baseline)
    assert judge(run, baseline, only="accuracy,parity").verdict == "ACCEPT"


def test_a_run_that_failed_verify_is_judged_although_it_was_never_timed(tmp_path, files, baseline):
    found = judge(write_run(tmp_path / "failed", files, verdict="FAIL"), baseline)
    assert found.verdict == "REGRESSION"
    assert any("differ by 9 LSB" in reason for reason in gate.reasons(found))


def test_a_run_without_a_judged_file_is_refused(tmp_path, files, baseline):
    with pytest.raises(BaselineError, match=r"has no int8\.onnx"):
        judge(write_run(tmp_path / "less", {PARENT: files[PARENT]}), baseline)


def test_a_file_that_changed_after_it_was_verified_is_refused(made, baseline):
    run = made("touched")
    path = run / "stages/01-export/int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BaselineError, match="has changed since it was verified"):
        judge(run, baseline)


def test_a_baseline_is_not_made_of_a_run_that_failed(tmp_path, made):
    run = read_run(made("failed", verdict="FAIL"))
    with pytest.raises(BaselineError, match="failed verify"):
        write_baseline(run, tmp_path / "b" / "baseline.json", no_runtime)
    assert not (tmp_path / "b").exists()


def test_two_baselines_do_not_share_a_folder(made, baseline):
    before = baseline.with_name("int8.onnx").read_bytes()
    with pytest.raises(BaselineError, match=r"baseline\.json keeps its files"):
        write_baseline(read_run(made("second")), baseline.with_name("other.json"), no_runtime)
    assert baseline.with_name("int8.onnx").read_bytes() == before
    write_baseline(read_run(made("third")), baseline, no_runtime)  # the same one, made anew
    assert read_baseline(baseline).files[INT8].accuracy == 1


def test_goals_of_the_baseline_hold_until_the_command_names_others(tmp_path, made):
    path = tmp_path / "strict" / "baseline.json"
    run = made("strict-run", wrong={INT8: range(10)})
    write_baseline(read_run(run), path, no_runtime, goals=[gate.parse("accuracy:threshold=0.97")])
    assert judge(run, path).verdict == "INFEASIBLE"
    assert judge(run, path, "accuracy:threshold=0.9").verdict == "ACCEPT"


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_baseline_cut_short_is_one_clear_error(tmp_path, made, baseline, part):
    content = baseline.read_bytes()
    baseline.write_bytes(content[: int(part * len(content))])
    with pytest.raises(BaselineError) as caught:
        judge(tmp_path / "first", baseline)
    assert str(caught.value).startswith(f"{baseline}: ")
    assert "\n" not in str(caught.value)


GARBLED = {
    "empty": "",
    "binary": "\0\1\2",
    "a list": "[]",
    "another JSON": '{"a": 1}',
    "another schema": '{"schema": 99}',
    "no facts": '{"schema": 1}',
}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_what_is_no_baseline_is_one_clear_error(tmp_path, baseline, content):
    baseline.write_text(content)
    with pytest.raises(BaselineError) as caught:
        judge(tmp_path / "first", baseline)
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_no_damaged_field_passes_as_a_traceback(tmp_path_factory, data):
    """Any value anywhere in the JSON replaced: read as it is, or refused in one line."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = folder / "baseline.json"
    if not folder.exists():
        folder.mkdir()
        file = {INT8: network(folder / "i.onnx", 1)}
        times = {INT8: [[1.0, 1.1], [1.2, 1.0]]}
        write_baseline(read_run(write_run(folder / "run", file, times=times, images=12)), path, no_runtime)
        path.rename(folder / "good.txt")
    value = json.loads((folder / "good.txt").read_text())
    place = value
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from([None, -1, 0, "x", [], {}, [None], {"x": 1}, 1e400, True]))
    path.write_text(json.dumps(value))
    try:
        text = gate.markdown(judge(folder / "run", path), "x")
    except CompressError as error:
        text = str(error)
        assert "\n" not in text
    assert text


def test_a_kept_file_that_was_exchanged_is_refused(tmp_path, baseline):
    kept = baseline.with_name("int8.onnx")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(BaselineError, match="has changed since it was verified"):
        judge(tmp_path / "first", baseline)


def test_the_sample_belongs_to_the_baseline(tmp_path, baseline):
    np.save(baseline.with_name("sample.npy"), np.zeros((8, 3, 16, 16), "f4"))
    with pytest.raises(BaselineError, match="is not the sample"):
        judge(tmp_path / "first", baseline)


def test_only_names_what_is_known():
    for words, said in (("speed", "no such part 'speed'"), ("fps", "judged with latency"), (",", "names nothing")):
        with pytest.raises(CompressError, match=said):
            gate.asked([], words)


# What people and programs read.


def test_the_summary_says_the_verdict_first_then_every_line_and_how_to_repeat_it(made, baseline):
    run = made("worse", wrong={INT8: range(40)}, times={INT8: rounds(5, seed=7)})
    found = judge(run, baseline)
    text = gate.markdown(found, "compress gate RUN")
    lines = text.splitlines()
    assert lines[0].startswith("## REGRESSION: accuracy of int8.onnx (-15.00 points), latency of int8.onnx (+2")
    assert text.rstrip().endswith("```bash\ncompress gate RUN\n```")
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("| REGRESSION |") for line in tables) == 2
    assert sum(line.startswith("| ACCEPT |") for line in tables) == 2
    widths = {line.count("|") for line in tables if "REGRESSION" in line or "ACCEPT" in line or "verdict" in line}
    assert len(widths) == 1
    (speed,) = (line for line in tables if line.startswith("| int8.onnx | onnxruntime"))
    p50_ms = float(np.median(np.concatenate(rounds(5, seed=7))))
    assert f"{1000 / p50_ms:.1f} (-" in speed
    assert "fps on aarch64" in text
    assert "Board B, 4 x Cortex-A76 (aarch64)" in text
    assert "no ARM machine" not in text


def test_the_json_has_everything_and_is_strict(made, baseline):
    found = judge(made("same", wrong={INT8: range(10)}), baseline)
    value = json.loads(json.dumps(gate.as_json(found, "x"), allow_nan=False))
    assert (value["verdict"], value["exit_status"]) == ("ACCEPT", 0)
    assert len(value["lines"]) == 4
    accuracy = next(line for line in value["lines"] if line["metric"] == "accuracy")
    assert accuracy["facts"]["images"] == IMAGES
    assert accuracy["value"] == pytest.approx((top1(range(10)) == labels()).mean())
    assert value["run"]["files"][INT8]["sha256"] == value["baseline"]["files"][INT8]["sha256"]


def test_x86_times_are_never_called_arm(made, tmp_path):
    x86 = {"arch": "x86_64", "is_arm": False, "machine": "EPYC", "cpu": "EPYC"}
    run = made("x86", conditions=x86)
    path = tmp_path / "x86base" / "b.json"
    write_baseline(read_run(run), path, no_runtime)
    text = gate.markdown(judge(run, path), "x")
    assert "fps on x86_64" in text
    assert "which is no ARM machine" in text


def test_a_comparison_has_a_row_per_file_and_says_what_cannot_be_compared(made, baseline):
    base = gate.read(baseline)
    worse = gate.read(made("worse", wrong={INT8: range(40)}, times={INT8: rounds(5, seed=7)}))
    rows = gate.comparison_rows(base, worse)
    assert [row["file"] for row in rows] == [PARENT, INT8]
    assert rows[1]["accuracy %"] == "95.00 → 80.00"
    assert rows[1]["Δ points"].startswith("-15.00 (")
    ratio = median_ms(rounds(5, seed=7)) / median_ms(rounds(4, seed=2))
    assert rows[1]["Δ ms %"].startswith(f"{100 * (ratio - 1):+.1f} (")
    (note,) = gate.comparison_notes(base, worse)
    assert "two recordings" in note
    assert len([line for line in gate.comparison_markdown(base, worse).splitlines() if line.startswith("|")]) == 4
    json.dumps(gate.comparison_json(base, worse), allow_nan=False)

    elsewhere = gate.read(made("elsewhere", fingerprint="e" * 64, conditions={"cpu": "another", "machine": "Board C"}))
    rows, notes = gate.comparison_rows(base, elsewhere), gate.comparison_notes(base, elsewhere)
    assert {row["Δ ms %"] for row in rows} == {row["Δ points"] for row in rows} == {""}
    assert any("different images" in note for note in notes)
    assert any("Board B" in note and "Board C" in note for note in notes)


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, "ACCEPT"), (1, "ACCEPT"), (2, "REGRESSION"), (math.nan, "REGRESSION")]
)
def test_an_int8_file_that_computes_something_else_on_the_board_is_a_regression(made, baseline, steps, expected):
    """Its outputs are real values on an int8 grid, as an ONNX file gives them; compared as the benchmark does."""
    here = (np.arange(40).reshape(4, 10) * np.float32(0.25)).astype(np.float32)
    there = here.copy()
    there[1, 2] += np.float32(0.25 * steps)
    parent = np.nextafter(here, np.float32(np.inf))
    on_target = [
        {"file": INT8, **compared(there, here, int8=True)},
        {"file": PARENT, **compared(parent, here)},  # floats are rounded by each CPU in its own way
    ]
    json.dumps(on_target, allow_nan=False)
    found = judge(made("run", on_target=on_target), baseline, only="parity")
    assert found.verdict == expected
    assert found.exit_status == (0 if expected == "ACCEPT" else 3)


def test_integers_are_told_apart_in_steps_of_one():
    here = np.array([[-128, 5], [127, 0]], np.int8)
    found = compared(here[::-1].copy(), here, int8=True)
    assert (found["differing"], found["max_lsb"], found["largest_steps"]) == (4, 255, None)
    assert output_step(here) == 1
    grid = np.float32([[0.5, 1.0, 3.5], [2.0, 0.0, 1.5]])
    assert output_step(grid) == 0.5
    none = np.random.default_rng(0).normal(size=(32, 100)).astype(np.float32)  # on no grid: 255 steps over the range
    assert output_step(none) == pytest.approx((none.max() - none.min()) / 255)


def test_times_under_an_emulator_are_no_fps_and_no_boards(made, tmp_path, baseline):
    pi = {"arch": "aarch64", "is_arm": True, "machine": "4 x Cortex-A72", "cpu": "4 x Cortex-A72"}
    emulated = made("emulated", conditions=pi | {"emulator": "qemu-aarch64"})
    path = tmp_path / "pi" / "b.json"
    write_baseline(read_run(made("real", conditions=pi | {"emulator": "unavailable"})), path, no_runtime)
    with pytest.raises(BaselineError, match="emulator"):
        judge(emulated, path)
    own = tmp_path / "own" / "b.json"
    write_baseline(read_run(emulated), own, no_runtime)
    text = gate.markdown(judge(emulated, own), "x")
    assert "fps on" not in text
    assert "not ARM fps" in text


def test_an_improvement_by_chance_is_not_one(made, baseline):
    """One image gained of 200: McNemar's p is 1."""
    found = judge(made("luck", wrong={INT8: range(9)}), baseline, "accuracy:min-improvement=0.004", only="accuracy")
    assert found.verdict == "NOISY"
    found = judge(made("better", wrong={INT8: ()}), baseline, "accuracy:min-improvement=0.004", only="accuracy")
    assert found.verdict == "ACCEPT"
    assert "parity, latency not judged" in gate.headline(found)
