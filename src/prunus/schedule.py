"""When: durations as text, and schedules as two functions of progress: the value now, and whether an event is due."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from prunus.errors import InvalidValue, ScheduleTooShort

Duration = str | int

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ep|ba|dur)\s*")


def steps_of(duration: Duration, *, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """Return a duration in optimizer steps.

    Args:
        duration: an int (steps), or "500ba" (steps), "2ep" (epochs), "0.3dur" (share of the whole training).
        total_steps: length of the training in optimizer steps.
        steps_per_epoch: needed for "ep".

    Raises:
        InvalidValue: not a duration, negative, or in epochs while `steps_per_epoch` is unknown.
    """
    if isinstance(duration, bool) or not isinstance(duration, int | str):
        raise InvalidValue(f"duration {duration!r} must be a number of steps or text such as '2ep', '500ba', '0.3dur'.")
    if isinstance(duration, int):
        if duration < 0:
            raise InvalidValue(f"duration {duration} is negative; give a number of steps from 0 up.")
        return duration
    match = _DURATION.fullmatch(duration)
    if not match:
        raise InvalidValue(f"duration {duration!r} is not understood; write '2ep', '500ba' or '0.3dur'.")
    number, unit = float(match[1]), match[2]
    if unit == "ba":
        if number != int(number):
            raise InvalidValue(f"duration {duration!r} is not a whole number of steps.")
        return int(number)
    if unit == "dur":
        if number > 1:
            raise InvalidValue(f"duration {duration!r} is more than the whole training (1dur).")
        return round(number * total_steps)
    if steps_per_epoch is None:
        raise InvalidValue(
            f"duration {duration!r} is in epochs, but steps_per_epoch is not known; pass it or use 'ba'/'dur'."
        )
    return round(number * steps_per_epoch)


def interval_of(duration: Duration, *, total_steps: int, steps_per_epoch: int | None = None) -> int:
    """Return an interval in optimizer steps; a share of a short training ("0.01dur") is at least one step.

    Raises:
        InvalidValue: as `steps_of`, or an interval of zero steps.
    """
    steps = steps_of(duration, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if isinstance(duration, str) and duration.strip().endswith("dur"):
        steps = max(1, steps)
    if steps < 1:
        raise InvalidValue(f"interval {duration!r} is {steps} steps here; it must be at least 1 step.")
    return steps


def progress(step: int, begin: int, end: int) -> float:
    """Return how far `step` is from `begin` (0.0) to `end` (1.0), clipped; an empty span jumps at `begin`."""
    if end <= begin:
        return 1.0 if step >= begin else 0.0
    return min(1.0, max(0.0, (step - begin) / (end - begin)))


def constant(initial: float, final: float, p: float) -> float:
    """Return `final` at every progress."""
    return final


def linear(initial: float, final: float, p: float) -> float:
    """Return the straight line from `initial` (p = 0) to `final` (p = 1)."""
    return initial + (final - initial) * p


def cubic(initial: float, final: float, p: float) -> float:
    """Return final + (initial - final) (1 - p)^3, the gradual ramp of Zhu & Gupta, ICLR workshop 2018."""
    return final + (initial - final) * (1.0 - p) ** 3


def cosine(initial: float, final: float, p: float) -> float:
    """Return half a cosine from `initial` to `final`: final + (initial - final) (1 + cos(pi p)) / 2."""
    return final + (initial - final) * (1.0 + math.cos(math.pi * p)) / 2.0


def exponential(initial: float, final: float, p: float) -> float:
    """Return the sparsity whose density falls by equal factors: 1 - (1 - initial) ((1 - final)/(1 - initial))^p."""
    return 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** p


def oneshot(initial: float, final: float, p: float) -> float:
    """Return `initial` until the very end of the span, then `final`."""
    return final if p >= 1.0 else initial


CURVES = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "exponential": exponential,
    "oneshot": oneshot,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that runs from `initial` to `final` between two moments, with events every `every` steps.

    Step 0 is before the first optimizer step; events fall on `begin`, `begin + every`, ... and always on `end`.

    Attributes:
        curve: one of "constant", "linear", "cubic", "cosine", "exponential", "oneshot".
        initial, final: the value before `begin` and from `end` on.
        begin, end, every: durations (see `steps_of`).
    """

    final: float
    initial: float = 0.0
    curve: str = "cubic"
    begin: Duration = 0
    end: Duration = "0.75dur"
    every: Duration = "100ba"

    def resolve(self, total_steps: int, steps_per_epoch: int | None = None) -> ResolvedSchedule:
        """Turn durations into steps for a training of `total_steps`.

        Raises:
            ScheduleTooShort: the window does not fit in the training.
            InvalidValue: unknown curve, or an interval of zero.
        """
        if self.curve not in CURVES:
            raise InvalidValue(f"curve {self.curve!r} is not known; choose from {', '.join(CURVES)}.")
        span = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        begin, end = steps_of(self.begin, **span), steps_of(self.end, **span)  # type: ignore[arg-type]
        every = interval_of(self.every, **span)  # type: ignore[arg-type]
        if end < begin:
            raise InvalidValue(
                f"the schedule ends ({self.end!r} = step {end}) before it begins ({self.begin!r} = step {begin})."
            )
        if end > total_steps:
            raise ScheduleTooShort(
                f"the schedule needs {end} steps ({self.end!r}) but the training has {total_steps}; "
                "train longer or end the schedule earlier."
            )
        return ResolvedSchedule(self.curve, self.initial, self.final, begin, end, every)


@dataclass(frozen=True)
class ResolvedSchedule:
    """A schedule in optimizer steps."""

    curve: str
    initial: float
    final: float
    begin: int
    end: int
    every: int

    def value(self, step: int) -> float:
        """Return the value at `step`: `initial` before `begin`, exactly `final` from `end` on."""
        if step >= self.end:
            return self.final
        if step < self.begin:
            return self.initial
        return CURVES[self.curve](self.initial, self.final, progress(step, self.begin, self.end))

    def due(self, step: int) -> bool:
        """Tell whether an event falls on `step`; the last one falls exactly on `end`."""
        if step == self.end:
            return True
        return self.begin <= step < self.end and (step - self.begin) % self.every == 0

    def events(self) -> list[int]:
        """Return all steps with an event."""
        regular = list(range(self.begin, self.end, self.every))
        return [*regular, self.end]
