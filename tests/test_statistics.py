"""Intervals: checked against the textbook table of Student's t, by hand, and by how often they cover the truth."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidValue, NonFinite
from prunus.measure.statistics import format_interval, interval, overlap, paired_difference, student_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.95, 9, 1.833), (0.995, 30, 2.750)],
)
def test_quantile_agrees_with_the_printed_table(probability: float, degrees: int, table: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(table, abs=5e-4)


def test_hand_case_of_three_seeds() -> None:
    # mean 2, s = 1, s / sqrt(3) = 0.57735, t(0.975; 2) = 4.302653
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302652729696 / math.sqrt(3), abs=1e-9)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert (found.n, found.level, found.single) == (3, 0.95, False)


def test_two_values_by_the_closed_form_of_cauchy() -> None:
    # One degree of freedom is the Cauchy distribution: quantile tan(pi (p - 1/2)).
    found = interval([0.0, 2.0], level=0.9)
    assert found.half == pytest.approx(math.tan(math.pi * 0.45), rel=1e-9)


def test_single_seed_has_no_spread_and_says_so() -> None:
    found = interval([0.9603])
    assert (found.mean, found.low, found.high, found.half) == (0.9603, None, None, None)
    assert found.single
    assert format_interval(found) == "96.03 (single seed)"


def test_equal_values_have_zero_width_exactly() -> None:
    found = interval([0.1] * 7)
    assert (found.mean, found.half) == (0.1, 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert interval(values) == interval(shuffled)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.floats(0.5, 0.98))
def test_higher_level_is_never_narrower(values: list[float], level: float) -> None:
    narrow, wide = interval(values, level), interval(values, level + 0.01)
    assert narrow.half is not None
    assert wide.half is not None
    assert narrow.half <= wide.half


def test_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 3))
    hits = [found.low <= 3.0 <= found.high for found in map(interval, draws.tolist())]
    assert abs(np.mean(hits) - 0.95) < 0.02
    # Negative control: the normal quantile 1.96 instead of t covers far too rarely with three seeds.
    half = 1.96 * draws.std(axis=1, ddof=1) / math.sqrt(3)
    assert np.mean(np.abs(draws.mean(axis=1) - 3.0) <= half) < 0.85


def test_pairing_removes_what_seeds_share() -> None:
    a, b = [0.90, 0.95, 0.99], [0.89, 0.94, 0.98]
    assert overlap(interval(a), interval(b)) is True
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.01)
    assert difference.low is not None
    assert difference.low > 0.0


def test_overlap_touching_apart_and_unknown() -> None:
    assert overlap(interval([0.0, 2.0]), interval([0.0, 2.0])) is True
    assert overlap(interval([0.0, 0.1]), interval([50.0, 50.1])) is False
    assert overlap(interval([1.0]), interval([0.0, 2.0])) is None


def test_format_in_percent_and_plain() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert format_interval(found, percent=False, digits=1) == "2.0 ± 2.5"
    assert format_interval(interval([0.5, 0.5])) == "50.00 ± 0.00"


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_no_values_is_refused(values: list[float]) -> None:
    with pytest.raises(InvalidValue, match="at least one"):
        interval(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_values_are_refused_by_position(bad: float) -> None:
    with pytest.raises(NonFinite, match="value 1 of 3"):
        interval([0.1, bad, 0.2])


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_impossible_level_is_refused(level: float) -> None:
    with pytest.raises(InvalidValue, match="confidence level"):
        interval([0.1, 0.2], level)


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(InvalidValue, match="2 and 1"):
        paired_difference([0.1, 0.2], [0.1])


def test_import_needs_neither_torch_nor_scipy() -> None:
    code = "import sys, prunus.measure.statistics; print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
