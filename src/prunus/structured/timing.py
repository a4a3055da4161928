"""Cut until the clock agrees: candidates are really cut, run in turns with the dense model, and narrowed by halving."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from prunus.errors import Infeasible, InvalidValue
from prunus.measure.latency import latency
from prunus.structured.target import Target

TOLERANCE = 0.05
STEPS = 12
_ROUNDS = 15
_MOST_ROUNDS = 60
_SECONDS = 2.0  # of timing per candidate, roughly
ALL = 1 - 1e-12  # the largest share that can be asked to go
_SAME = 1e-4  # shares nearer than this are not told apart

Choice = TypeVar("Choice")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Found(Generic[Choice]):
    """What a search for a latency ended with.

    Attributes:
        choice: the candidate.
        achieved: its share of the dense latency, or milliseconds, as the target was given.
        dense_ms: median of the dense model over the whole search, milliseconds.
        tried: how many candidates were timed.
        note: how far it got and why, when it missed the target by more than 5 %; "" otherwise.
    """

    choice: Choice
    achieved: float
    dense_ms: float
    tried: int
    note: str = ""


class Stopwatch:
    """Times candidates against one dense model.

    Attributes:
        dense_ms: every median of the dense model so far, milliseconds.
    """

    def __init__(
        self,
        dense: nn.Module,
        example: Any,
        *,
        clock: Callable[[], float] = time.perf_counter,
        rounds: int | None = None,
    ) -> None:
        self.dense, self.example, self.clock = dense, example, clock
        first = latency({"dense": dense}, example, repeats=3, warmup=2, clock=clock)["dense"].median
        self.dense_ms = [first * 1e3]
        fitting = int(_SECONDS / 2 / max(first, 1e-9))
        self.rounds = rounds or max(_ROUNDS, min(_MOST_ROUNDS, fitting))

    def ratio(self, small: nn.Module, *, times: int = 1) -> float:
        """Return the median share of the dense time that a call of `small` takes, of `times` as many rounds."""
        found = latency(
            {"dense": self.dense, "small": small}, self.example, repeats=self.rounds * times, warmup=2, clock=self.clock
        )
        self.dense_ms.append(found["dense"].median * 1e3)
        return found["small"].ratio

    def value(self, target: Target, ratio: float) -> float:
        """Return a ratio in the units of the target."""
        return ratio if target.what == "latency" else ratio * self.median

    @property
    def median(self) -> float:
        """Milliseconds of the dense model, over all measurements."""
        return statistics.median(self.dense_ms)


def check_latency(target: Target) -> float:
    """Return the latency that is asked for, or raise `InvalidValue`."""
    value, share = target.asked, target.what == "latency"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf") or (share and value > 1):
        wanted = "a share of the dense latency in (0, 1]" if share else "a number of milliseconds above 0"
        raise InvalidValue(f"{target.what} {value!r} must be {wanted}.")
    return float(value)


def to_latency(
    target: Target,
    candidate: Callable[[float], Choice],
    cut: Callable[[Choice], nn.Module],
    watch: Stopwatch,
    *,
    key: Callable[[Choice], Hashable] = lambda choice: choice,  # type: ignore[assignment, return-value]
    steps: int = STEPS,
    on_stage: Progress | None = None,
) -> Found[Choice]:
    """Return the candidate that comes nearest below a latency.

    The share that goes is halved between what was too slow and what was fast enough; every candidate is really cut and
    timed in turns with the dense model, and judged by the median of the ratios. The search ends within 5 % below the
    target, when no candidate is left in between, or after `steps`. The winner is timed again, for twice as long, and
    that is what is reported; when it turns out more than 5 % too slow, the search goes on below it.

    Args:
        target: "latency" (share of the dense one) or "latency_ms".
        candidate: share in [0, 1] -> what would stay.
        cut: candidate -> small model.
        watch: times models.
        key: what tells candidates apart; equal ones are not timed twice.
        steps: most candidates to time.
        on_stage: called with a sentence per candidate.

    Raises:
        InvalidValue: the target is no latency.
        Infeasible: the smallest model is slower than the target.
    """
    asked = check_latency(target)
    unit = " of dense" if target.what == "latency" else " ms"
    tried = 0

    def timed(share: float, times: int = 1) -> float:
        nonlocal tried
        tried += 1
        value = watch.value(target, watch.ratio(cut(candidate(share)), times=times))
        if on_stage is not None:
            on_stage(f"a share of {share:.1%} removed takes {value:.4g}{unit}, asked for {asked:.4g}{unit}")
        return value

    if asked >= watch.value(target, 1.0):
        return Found(candidate(0.0), watch.value(target, 1.0), watch.median, tried)
    least = timed(1.0)
    if least > asked:
        raise Infeasible(
            f"{target.what} {asked:.4g} cannot be reached here: with everything at its floor a call still takes "
            f"{least:.4g}{unit}. Ask for more time, lower `minimum` or `round_to`, protect fewer layers, or time "
            "larger inputs: on small ones the time goes into calling operators."
        )
    slow = 0.0
    fast = [(1.0, least)]  # shares that were fast enough, each smaller than the one before
    sure = False
    while tried < steps:
        share, value = fast[-1]
        if value >= asked * (1 - TOLERANCE):
            value = timed(share, times=2)
            fast[-1] = (share, value)
            sure = abs(value / asked - 1) <= TOLERANCE
            if sure:
                break
            if value > asked and len(fast) > 1:
                fast.pop()
                slow = share
                continue
        middle = (slow + share) / 2
        if share - slow < _SAME:
            break
        keys = [key(candidate(s)) for s in (slow, middle, share)]
        if keys[1] == keys[0]:
            slow = middle
        elif keys[1] == keys[2]:
            fast[-1] = (middle, value)
        else:
            value = timed(middle)
            if value <= asked:
                fast.append((middle, value))
            else:
                slow = middle
    share, achieved = fast[-1]
    if not sure:
        achieved = timed(share, times=2)
    note = ""
    if abs(achieved / asked - 1) > TOLERANCE:
        why = (
            "the machine is uneven"
            if achieved > asked
            else "time falls in steps, because whole units go and kernels favour some widths"
        )
        note = f"{target.what} {asked:.4g} was asked for, {achieved:.4g} reached after {tried} candidates: {why}"
    return Found(candidate(share), achieved, watch.median, tried, note)
