"""Means with intervals: what a handful of seeds can and cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prunus.errors import InvalidValue, NonFinite


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it.

    Attributes:
        mean: arithmetic mean of the values.
        low: lower end of the interval, None when a single value was given.
        high: upper end of the interval, None when a single value was given.
        half: half the width of the interval (the number after "±"), None when a single value was given.
        n: how many values.
        level: the confidence level, between 0 and 1.
    """

    mean: float
    low: float | None
    high: float | None
    half: float | None
    n: int
    level: float = 0.95

    @property
    def single(self) -> bool:
        """True when one value was given: a mean without any knowledge of its spread."""
        return self.n == 1


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution with `degrees` degrees of freedom.

    Args:
        probability: the share of the distribution to the left, strictly between 0 and 1.
        degrees: degrees of freedom, at least 1.
    """
    # Arrives with scikit-learn; imported here because it is slow to load and only means need it.
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(degrees, probability))


def interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Return the mean of independent repetitions with its two-sided Student-t interval.

    half = t((1 + level) / 2; n - 1) * s / sqrt(n), where s is the sample standard deviation (divisor n - 1).
    With one value there is no spread to speak of: `low`, `high` and `half` are None.

    Args:
        values: one finite number per repetition (seed), at least one.
        level: confidence level, strictly between 0 and 1.

    Raises:
        InvalidValue: no values, or a level outside (0, 1).
        NonFinite: a value is NaN or infinite.

    Source: Student, "The probable error of a mean", Biometrika, 1908.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise InvalidValue(f"an interval needs at least one number, got values of shape {data.shape}.")
    if not 0.0 < level < 1.0:
        raise InvalidValue(f"the confidence level must lie strictly between 0 and 1, got {level!r}; usual is 0.95.")
    if not np.isfinite(data).all():
        bad = int(np.flatnonzero(~np.isfinite(data))[0])
        raise NonFinite(f"value {bad} of {data.size} is {data[bad]}; leave failed repetitions out and report them.")
    # fsum is exact up to one rounding, so equal values in any order give the same mean, and equal values a zero half.
    mean = math.fsum(data) / data.size
    if data.size == 1:
        return Interval(mean, None, None, None, 1, level)
    variance = math.fsum((data - mean) ** 2) / (data.size - 1)
    half = student_quantile((1.0 + level) / 2.0, data.size - 1) * math.sqrt(variance / data.size)
    return Interval(mean, mean - half, mean + half, half, int(data.size), level)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of a[i] - b[i] over repetitions that share everything but the method (the same seeds).

    An interval that does not contain 0 is a difference at this level. Pairing removes what the seeds have in common,
    so it can separate methods whose own intervals overlap.

    Raises:
        InvalidValue: the two sequences have different lengths, or are empty.
        NonFinite: a value is NaN or infinite.
    """
    if len(a) != len(b):
        raise InvalidValue(f"pairs need equal lengths, got {len(a)} and {len(b)}; keep the seeds both have.")
    return interval((x - y for x, y in zip(a, b)), level)


def overlap(a: Interval, b: Interval) -> bool | None:
    """Return whether two intervals share a point; None when either comes from a single value."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.low <= b.high and b.low <= a.high


def format_interval(value: Interval, *, percent: bool = True, digits: int = 2) -> str:
    """Return "96.03 ± 0.06", or "96.03 (single seed)" when there was one value.

    Args:
        value: the interval to print.
        percent: multiply by 100 (for shares such as accuracy); no "%" sign is added.
        digits: digits after the point.
    """
    scale = 100.0 if percent else 1.0
    mean = f"{value.mean * scale:.{digits}f}"
    return f"{mean} (single seed)" if value.half is None else f"{mean} ± {value.half * scale:.{digits}f}"
