"""Durations as text, curves by hand and by property, and events that fall where they should."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import InvalidValue, ScheduleTooShort
from prunus.schedule import CURVES, ResolvedSchedule, Schedule, cubic, interval_of, progress, steps_of

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SHARES = st.floats(0, 0.99)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (0, 0),
        (17, 17),
        ("17ba", 17),
        ("0ba", 0),
        ("2ep", 50),
        ("0.5ep", 12),
        ("1dur", 1000),
        ("0.3dur", 300),
        ("0.75dur", 750),
        (" 10 ba ", 10),
        ("0dur", 0),
    ],
)
def test_durations(text, steps):
    assert steps_of(text, total_steps=1000, steps_per_epoch=25) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "'abc' is not understood; write '2ep', '500ba' or '0.3dur'"),
        ("", "not understood"),
        ("-3ba", "not understood"),
        ("2", "not understood"),
        ("1e3ba", "not understood"),
        ("2.5ba", "not a whole number"),
        ("1.5dur", "more than the whole training"),
        (-1, "negative"),
        (True, "must be a number of steps"),
        (2.0, "must be a number of steps"),
        (None, "must be a number of steps"),
    ],
)
def test_durations_that_make_no_sense(text, message):
    with pytest.raises(InvalidValue, match=message):
        steps_of(text, total_steps=1000, steps_per_epoch=25)


def test_epochs_need_to_be_known():
    with pytest.raises(InvalidValue, match="steps_per_epoch is not known"):
        steps_of("2ep", total_steps=10)


def test_intervals_are_at_least_one_step():
    assert interval_of("0.01dur", total_steps=10) == 1
    for zero in (0, "0ba", "0ep"):
        with pytest.raises(InvalidValue, match="at least 1 step"):
            interval_of(zero, total_steps=10, steps_per_epoch=5)


@FEW
@given(number=st.integers(0, 10**6), total=st.integers(1, 10**6), per=st.integers(1, 5000))
def test_parsing_whole_durations(number, total, per):
    assert steps_of(number, total_steps=total) == number
    assert steps_of(f"{number}ba", total_steps=total) == number
    assert steps_of(f"{number}ep", total_steps=total, steps_per_epoch=per) == number * per


@FEW
@given(share=st.decimals(0, 1, places=3), total=st.integers(1, 10**6))
def test_parsing_shares(share, total):
    steps = steps_of(f"{share}dur", total_steps=total)
    assert abs(steps - float(share) * total) <= 0.5
    assert 0 <= steps <= total


def test_cubic_values_by_hand():
    ramp = ResolvedSchedule("cubic", 0.0, 0.9, 0, 10, 1)
    for step, value in ((0, 0.0), (1, 0.2439), (5, 0.7875), (10, 0.9)):
        assert ramp.value(step) == pytest.approx(value, abs=1e-12)
    ramp = ResolvedSchedule("cubic", 0.5, 0.9, 0, 10, 1)
    expected = [0.5, 0.6084, 0.6952, 0.7628, 0.8136, 0.85, 0.8744, 0.8892, 0.8968, 0.8996, 0.9]
    assert [ramp.value(i) for i in range(11)] == pytest.approx(expected, abs=1e-12)


def test_other_curves_by_hand():
    assert CURVES["linear"](0.2, 0.8, 0.5) == pytest.approx(0.5)
    assert CURVES["cosine"](0.3, 0.0, 0.5) == pytest.approx(0.15)
    assert CURVES["cosine"](0.3, 0.0, 0.0) == pytest.approx(0.3)
    assert CURVES["exponential"](0.0, 0.99, 0.5) == pytest.approx(0.9)
    assert CURVES["exponential"](0.0, 0.9, 1.0) == pytest.approx(0.9)
    assert CURVES["oneshot"](0.0, 0.9, 0.999) == 0.0
    assert CURVES["constant"](0.0, 0.9, 0.1) == 0.9


@FEW
@given(
    curve=st.sampled_from(sorted(CURVES)),
    initial=SHARES,
    rise=st.floats(0, 1),
    begin=st.integers(0, 40),
    span=st.integers(0, 60),
    every=st.integers(1, 30),
)
def test_schedules_rise_monotonically_and_end_exactly(curve, initial, rise, begin, span, every):
    final = initial + rise * (0.99 - initial)
    schedule = ResolvedSchedule(curve, initial, final, begin, begin + span, every)
    values = [schedule.value(step) for step in range(begin + span + 5)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert all(v == initial for v in values[:begin])
    assert all(v == final for v in values[begin + span :])
    assert all(min(initial, final) - 1e-12 <= v <= max(initial, final) + 1e-12 for v in values)


@FEW
@given(initial=SHARES, final=SHARES, shift=st.floats(0.1, 3), p=st.floats(0, 1))
def test_the_cubic_ramp_is_linear_in_its_ends(initial, final, shift, p):
    assert cubic(initial, initial, p) == pytest.approx(initial)
    assert cubic(shift * initial, shift * final, p) == pytest.approx(shift * cubic(initial, final, p), abs=1e-9)
    assert cubic(initial, final, 0.0) == pytest.approx(initial)
    assert cubic(initial, final, 1.0) == final


@FEW
@given(begin=st.integers(0, 40), span=st.integers(0, 60), every=st.integers(1, 30))
def test_events_are_where_due_says(begin, span, every):
    schedule = ResolvedSchedule("linear", 0.0, 0.5, begin, begin + span, every)
    due = [step for step in range(begin + span + 10) if schedule.due(step)]
    assert due == schedule.events()
    assert due[-1] == begin + span
    assert due == sorted(set(due))


def test_progress_is_clipped():
    assert [progress(s, 10, 20) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert [progress(s, 5, 5) for s in (4, 5)] == [0.0, 1.0]


def test_resolving():
    wanted = Schedule(final=0.9, begin="1ep", end="0.5dur", every="10ba")
    assert wanted.resolve(100, 20) == ResolvedSchedule("cubic", 0.0, 0.9, 20, 50, 10)
    assert Schedule(final=0.9, end="1dur").resolve(100).end == 100


@pytest.mark.parametrize(
    ("choices", "kind", "message"),
    [
        ({"curve": "cubical"}, InvalidValue, "'cubical' is not known; choose from"),
        ({"begin": 60}, InvalidValue, "ends .*step 50.* before it begins .*60"),
        ({"end": 101}, ScheduleTooShort, "needs 101 steps .* has 100; train longer or end"),
        ({"end": "9ep"}, ScheduleTooShort, "9ep"),
        ({"every": 0}, InvalidValue, "interval 0 is 0 steps"),
    ],
)
def test_schedules_that_cannot_be(choices, kind, message):
    with pytest.raises(kind, match=message):
        Schedule(**{"final": 0.9, "end": "0.5dur", **choices}).resolve(100, 20)


def test_a_cosine_anneals_to_half_in_the_middle():
    assert math.isclose(CURVES["cosine"](0.5, 0.005, 0.5), 0.2525)
