"""Verdict rules: what has to be measured for a claim to hold, said before anything is measured.

Every rule compares numbers that repetitions (seeds) share, by a two-sided 95 % Student-t interval: of the paired
difference of two arms, or of the mean of one. It holds when the whole interval lies where the claim says, does not
hold when the whole interval lies on the other side, and is undecided otherwise (always so with a single seed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from prunus.errors import InvalidValue
from prunus.measure.statistics import Interval, format_interval, interval, paired_difference

HOLDS = "holds"
FAILS = "does not hold"
UNDECIDED = "undecided"
UNITS = ("percent", "number", "count")

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Judgement:
    """What a rule says about measurements.

    Attributes:
        verdict: "holds", "does not hold" or "undecided".
        evidence: the intervals it was decided on, printed.
    """

    verdict: str
    evidence: str


class Rule(Protocol):
    """A condition on measured arms."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the numbers it looks at, in the order in which they are reported."""
        ...

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        ...

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide, given one number per seed for each arm."""
        ...


def shown(value: Interval, unit: str, *, fine: bool = False) -> str:
    """Return "95.4 ± 0.5": shares as percent, other numbers with three digits, counts with one; one more if `fine`."""
    if unit not in UNITS:
        raise InvalidValue(f"unit {unit!r} is none of {', '.join(UNITS)}.")
    digits = {"percent": 1, "number": 3, "count": 1}[unit] + fine
    return format_interval(value, percent=unit == "percent", digits=digits)


def amount(value: float, unit: str) -> str:
    """Return a threshold as it is printed in conditions."""
    return f"{value * 100:g} points" if unit == "percent" else f"{value:g}"


def _between(found: Interval, low: float, high: float) -> str:
    """Decide whether the interval lies inside (low, high), outside, or across an edge."""
    if found.low is None or found.high is None:
        return UNDECIDED
    if found.low > low and found.high < high:
        return HOLDS
    return FAILS if found.high <= low or found.low >= high else UNDECIDED


@dataclass(frozen=True)
class Above:
    """The mean of `high` exceeds that of `low` (by more than `by`)."""

    high: str
    low: str
    by: float = 0.0

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return self.high, self.low

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        return f"{self.high} > {self.low}" + (f" + {amount(self.by, unit)}" if self.by else "")

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide by the interval of the paired difference."""
        found = paired_difference(values[self.high], values[self.low])
        return Judgement(_between(found, self.by, math.inf), f"difference {shown(found, unit, fine=True)}")


@dataclass(frozen=True)
class NotBelow:
    """The mean of `arm` is not lower than that of `than` by more than `margin`."""

    arm: str
    than: str
    margin: float

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return self.arm, self.than

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        return f"{self.arm} > {self.than} - {amount(self.margin, unit)}"

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide by the interval of the paired difference."""
        found = paired_difference(values[self.arm], values[self.than])
        return Judgement(_between(found, -self.margin, math.inf), f"difference {shown(found, unit, fine=True)}")


@dataclass(frozen=True)
class Alike:
    """The means of two arms differ by less than `within`."""

    first: str
    second: str
    within: float

    @property
    def arms(self) -> tuple[str, ...]:
        """Both arms."""
        return self.first, self.second

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        return f"{self.first} = {self.second} to {amount(self.within, unit)}"

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide by the interval of the paired difference."""
        found = paired_difference(values[self.first], values[self.second])
        return Judgement(_between(found, -self.within, self.within), f"difference {shown(found, unit, fine=True)}")


@dataclass(frozen=True)
class Inside:
    """The mean of an arm lies between two numbers."""

    arm: str
    low: float
    high: float

    @property
    def arms(self) -> tuple[str, ...]:
        """The arm."""
        return (self.arm,)

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        scale = 100 if unit == "percent" else 1
        if math.isinf(self.high):
            return f"{self.arm} > {self.low * scale:g}"
        if math.isinf(self.low):
            return f"{self.arm} < {self.high * scale:g}"
        return f"{self.low * scale:g} < {self.arm} < {self.high * scale:g}"

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide by the interval of the mean."""
        return Judgement(_between(interval(values[self.arm]), self.low, self.high), "")


@dataclass(frozen=True)
class Exactly:
    """An identity: every seed gives exactly this number. One seed is enough to refute it."""

    arm: str
    value: float

    @property
    def arms(self) -> tuple[str, ...]:
        """The arm."""
        return (self.arm,)

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        return f"{self.arm} = {self.value:g} for every seed"

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide by equality, without an interval."""
        return Judgement(HOLDS if all(v == self.value for v in values[self.arm]) else FAILS, "")


@dataclass(frozen=True)
class Every:
    """Several conditions at once: holds when all hold, does not when one does not."""

    rules: tuple[Rule, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms of all conditions, each once."""
        return tuple(dict.fromkeys(arm for rule in self.rules for arm in rule.arms))

    def expected(self, unit: str) -> str:
        """Return the conditions in symbols."""
        return "; ".join(rule.expected(unit) for rule in self.rules)

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide every condition."""
        found = [rule.judge(values, unit) for rule in self.rules]
        verdicts = {j.verdict for j in found}
        verdict = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
        return Judgement(verdict, ", ".join(j.evidence.removeprefix("difference ") for j in found if j.evidence))


@dataclass(frozen=True)
class Ordered:
    """Each arm exceeds the next."""

    arms: tuple[str, ...]

    def expected(self, unit: str) -> str:
        """Return the condition in symbols."""
        return " > ".join(self.arms)

    def judge(self, values: Values, unit: str) -> Judgement:
        """Decide every step of the order by the interval of the paired difference."""
        found = Every(tuple(Above(a, b) for a, b in pairwise(self.arms))).judge(values, unit)
        return Judgement(found.verdict, f"differences {found.evidence}")
