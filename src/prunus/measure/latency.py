"""How long a forward pass takes, measured side by side so that the machine's moods hit everyone alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.errors import InvalidValue
from prunus.measure.forwarding import call, evaluating, tensors_of


@dataclass(frozen=True)
class Latency:
    """Time of one call.

    Attributes:
        median: seconds.
        low: first quartile, seconds.
        high: third quartile, seconds.
        ratio: median over rounds of this time divided by the first model's time in the same round; 1 for the first
            model, below 1 is faster.
        repeats: how many timed calls.
    """

    median: float
    low: float
    high: float
    ratio: float
    repeats: int

    @property
    def interquartile_range(self) -> float:
        """Width of the middle half of the times, in seconds."""
        return self.high - self.low


def latency(
    models: Mapping[str, Callable[..., Any]],
    example: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    primed: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time models against each other, one call of each per round, every second round in reverse order.

    A slow moment of the machine then falls on all of them, and the ratios, which compare calls of one round, stay
    meaningful where times measured one after the other drift. Models are in eval mode under inference_mode; the modes
    of all modules are restored. Work on an accelerator is waited for.

    Args:
        models: name -> module or function; the first one is what the ratios refer to.
        example: inputs for every model: a tensor, a tuple of arguments or a mapping of keyword arguments, used whole.
        repeats: timed rounds (default 30).
        warmup: rounds before the first timed one (default 5).
        primed: call each once more, untimed, right before its timed call. What others left behind (their threads still
            spinning, caches full of their weights) is then not counted: it is the time within a stream of calls.
        clock: returns seconds; replaceable for tests.

    Raises:
        InvalidValue: no models, repeats below 1 or a negative warmup.
    """
    if not models:
        raise InvalidValue("there is no model to time.")
    if repeats < 1 or warmup < 0:
        raise InvalidValue(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}.")
    wait = _waiter(example)
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.inference_mode():
        for turn in range(warmup + repeats):
            for name in models if turn % 2 == 0 else reversed(list(models)):
                if primed:
                    call(models[name], example)
                wait()
                start = clock()
                call(models[name], example)
                wait()
                taken = clock() - start
                if turn >= warmup:
                    times[name].append(taken)
    reference = times[next(iter(models))]
    return {name: _summary(taken, reference) for name, taken in times.items()}


@contextmanager
def using_threads(count: int | None) -> Iterator[int]:
    """Let torch use `count` threads inside the block (None: as many as it has now); gives their number.

    Raises:
        InvalidValue: not a whole number from 1 up.
    """
    before = torch.get_num_threads()
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InvalidValue(f"threads {count!r} must be a whole number from 1 up.")
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _summary(taken: list[float], reference: list[float]) -> Latency:
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [taken[0]] * 3
    # A clock too coarse to see a call gives 0 / 0: equal as far as it can tell.
    ratios = [t / r if r > 0 else (1.0 if t == 0 else float("inf")) for t, r in zip(taken, reference)]
    return Latency(middle, low, high, statistics.median(ratios), len(taken))


def _waiter(example: Any) -> Callable[[], None]:
    """Return a function that waits until the device of the example is idle."""
    device: torch.device | None = next((t.device for t in tensors_of(example) if isinstance(t, Tensor)), None)
    if device is not None and device.type != "cpu":
        return lambda: torch.accelerator.synchronize(device)
    return lambda: None
