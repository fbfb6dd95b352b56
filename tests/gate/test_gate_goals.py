"""Goals mean what Olive's mean: its formulas, computed apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.gate.goals import DEFAULTS, GROUPS, METRICS, TYPES, Goal, chosen, parse


@pytest.mark.parametrize(
    ("goal", "baseline", "bound"),
    [
        ("accuracy:max-degradation=0.01", 0.9, 0.89),
        ("accuracy:min-improvement=0.02", 0.9, 0.92),
        ("accuracy:percent-max-degradation=10", 0.9, 0.81),
        ("accuracy:percent-min-improvement=5", 0.8, 0.84),
        ("accuracy:threshold=0.95", 0.2, 0.95),
        ("latency:max-degradation=2", 10.0, 12.0),
        ("latency:min-improvement=2", 10.0, 8.0),
        ("latency:percent-max-degradation=5", 10.0, 10.5),
        ("latency:percent-min-improvement=20", 10.0, 8.0),
        ("latency:threshold=7.5", 10.0, 7.5),
        ("fps:percent-max-degradation=5", 100.0, 95.0),
        ("fps:percent-min-improvement=50", 100.0, 150.0),
        ("speedup:threshold=2", 1.0, 2.0),
        ("size:percent-max-degradation=1", 1000, 1010),
        ("size:threshold=500000", 1000, 500000),
    ],
)
def test_bounds(goal, baseline, bound):
    assert parse(goal).bound(baseline) == pytest.approx(bound)


@given(
    metric=st.sampled_from(sorted(METRICS)),
    kind=st.sampled_from(TYPES),
    value=st.floats(0.001, 0.999),
    baseline=st.floats(0.1, 100),
)
def test_a_goal_survives_its_text_and_lies_on_its_side_of_the_baseline(metric, kind, value, baseline):
    goal = Goal(metric, kind, float(f"{value:g}"))
    assert parse(str(goal)) == goal
    if kind != "threshold":
        worse = METRICS[metric].sign * (goal.bound(baseline) - baseline) < 0
        assert worse == goal.allows_loss


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy", "is no goal"),
        ("accuracy:max-degradation", "is no goal"),
        ("acuracy:threshold=1", "did you mean 'accuracy'?"),
        ("accuracy:max-degredation=0.1", "did you mean 'max-degradation'?"),
        ("latency:threshold=fast", "'fast' is no number"),
        ("latency:threshold=nan", "'nan' is no number"),
        ("parity:threshold=1", "parity has no goal"),
        ("accuracy:max-degradation=1.5", "half a point is 0.005"),
        ("accuracy:percent-max-degradation=100", "between 0 and 100"),
        ("latency:percent-min-improvement=100", "between 0 and 100"),
        ("latency:percent-max-degradation=0", "between 0 and inf"),
        ("size:max-degradation=-1", "between 0 and inf"),
    ],
)
def test_what_is_no_goal_is_said_in_one_line(text, said):
    with pytest.raises(CompressError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_olives_ranges_of_percentages():
    assert parse("fps:percent-min-improvement=300").value == 300
    assert parse("latency:percent-max-degradation=300").value == 300


def test_the_command_comes_before_the_baseline_and_both_before_the_defaults():
    command, kept = [parse("latency:threshold=9")], [parse("latency:threshold=8"), parse("fps:threshold=100")]
    found = chosen(command, kept, GROUPS)
    assert {str(goal) for goal in found} == {
        "accuracy:max-degradation=0.005",
        "size:percent-max-degradation=1",
        "latency:threshold=9",
        "fps:threshold=100",
    }
    assert chosen([], [], GROUPS) == list(DEFAULTS)
    assert [goal.metric for goal in chosen([], kept, ["size"])] == ["size"]


def test_a_goal_that_only_leaves_out_is_refused():
    with pytest.raises(CompressError, match="leaves out latency"):
        chosen([parse("fps:threshold=9")], [], ["accuracy"])
