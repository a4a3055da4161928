"""What a machine could do at most, and how near to that some work comes.

The model is that of Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM, 2009: work with an intensity of i operations per byte runs at no more than
min(peak, i * bandwidth).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prunus.measure.latency import using_threads

_SIDE = 1024
_COPIED = 1 << 27  # bytes: more than the last cache of most machines holds


@dataclass(frozen=True)
class Peaks:
    """The best that dense work reached on this machine.

    Attributes:
        gflops: 1e9 floating-point operations per second (a multiply-accumulate is two) of a float32 matrix product.
        gigabytes_per_second: 1e9 bytes per second read and written by a large copy.
        threads: that torch used.
    """

    gflops: float
    gigabytes_per_second: float
    threads: int

    @property
    def ridge(self) -> float:
        """MACs per byte above which arithmetic, and below which memory, is what binds."""
        return self.gflops / 2 / self.gigabytes_per_second

    def attainable(self, intensity: float) -> float:
        """Return the GFLOP/s that work of `intensity` MACs per byte could reach."""
        return min(self.gflops, 2 * intensity * self.gigabytes_per_second)

    def bound(self, intensity: float) -> str:
        """Return "arithmetic" or "memory": what holds work of `intensity` MACs per byte back."""
        return "arithmetic" if intensity >= self.ridge else "memory"


def measured_peaks(
    threads: int | None = None,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 5,
    side: int = _SIDE,
    copied: int = _COPIED,
    clock: Callable[[], float] = time.perf_counter,
) -> Peaks:
    """Measure a square float32 matrix product and a copy; the fastest of some rounds counts.

    Args:
        threads: default those that torch has now.
        device: where to measure.
        rounds: how often each runs.
        side: of the matrices.
        copied: bytes of the copy's source, more than caches hold.
        clock: returns seconds; replaceable for tests.
    """
    device = torch.device(device)
    with using_threads(threads) as count, torch.inference_mode():
        a, b = (torch.ones(side, side, device=device) for _ in range(2))
        source = torch.ones(max(1, copied // 4), device=device)
        target = torch.empty_like(source)
        product = _fastest(lambda: torch.mm(a, b), rounds, device, clock)
        copy = _fastest(lambda: target.copy_(source), rounds, device, clock)
    return Peaks(2 * side**3 / product / 1e9, 2 * 4 * source.numel() / copy / 1e9, count)


def _fastest(work: Callable[[], object], rounds: int, device: torch.device, clock: Callable[[], float]) -> float:
    best = float("inf")
    for number in range(rounds + 1):  # the first one warms up
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken = clock() - start
        best = min(best, taken) if number else best
    return max(best, 1e-9)
