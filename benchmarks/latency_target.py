"""How near `prunus.prune(latency=...)` and `latency_ms=...` come to the time that was asked for.

Channels of ResNet-18 (torchvision) and DeiT-tiny (timm) at 224 pixels and of ResNet-56 for CIFAR-10 at 32 pixels go
until a call takes half as long, for batches of 1 and of 32; weights are random, which changes no time. Afterwards
dense and small model are timed anew in turns, and the median of the ratios is compared with what was asked for. Half
is asked for as a share, and for ResNet-18 at batch 1 once more in milliseconds, taken of the dense model just before;
that one is judged at the speed the machine had then, by the dense model's time before and after.

A target that the search calls infeasible, or that it says it missed, counts as missed: reason and note are in the
results. One thread.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from benchmarks.contract import Outcome, Timings, at_most, interleaved, main, threads
from prunus.errors import Infeasible
from prunus.models.create import create
from prunus.randomness import generator

SHARE = 0.5
GOAL = 0.05
THREADS = 1
SECONDS = (4.0, 20.0)  # of timing afterwards: quick, full
LEAST_ROUNDS, MOST_ROUNDS = 7, 200
NETS = {
    "resnet18": ("torchvision/resnet18", 224, 1000),
    "resnet56": ("resnet56", 32, 10),
    "deit-tiny": ("timm/deit_tiny_patch16_224", 224, 1000),
}


@dataclass(frozen=True)
class Case:
    """What is asked for.

    Attributes:
        net: a name in `NETS`.
        batch: examples in a call.
        milliseconds: whether it is asked for in milliseconds, else as a share.
    """

    net: str
    batch: int
    milliseconds: bool = False

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.net} batch {self.batch}{' in ms' if self.milliseconds else ''}"


CASES = (
    Case("resnet18", 1),
    Case("resnet18", 1, milliseconds=True),
    Case("resnet56", 1),
    Case("deit-tiny", 1),
    Case("resnet56", 32),
    Case("resnet18", 32),
    Case("deit-tiny", 32),
)
QUICK = CASES[:4]


def build(net: str) -> nn.Module:
    """Return the model of that name with random weights, in eval mode."""
    name, side, classes = NETS[net]
    return create(name, num_classes=classes, input_shape=(3, side, side), seed=0).eval()


def images(net: str, batch: int) -> Tensor:
    """Return (batch, 3, side, side) normal noise."""
    side = NETS[net][1]
    return torch.randn(batch, 3, side, side, generator=generator(0, "benchmark", net))


def timed(models: dict[str, nn.Module], x: Tensor, seconds: float) -> Timings:
    """Time calls of all models in turns, for about so many seconds."""

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(x)

        return run

    calls = {name: call(model) for name, model in models.items()}
    for run in calls.values():
        run()
    start = time.perf_counter()
    for run in calls.values():
        run()
    rounds = round(seconds / max(time.perf_counter() - start, 1e-6))
    return interleaved(calls, min(MOST_ROUNDS, max(LEAST_ROUNDS, rounds)))


def measure(case: Case, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row and the goal of one case."""
    model, x = build(case.net), images(case.net, case.batch)
    if case.milliseconds:
        dense = timed({"dense": model}, x, seconds).milliseconds("dense")
        asked: dict[str, float] = {"latency_ms": SHARE * dense}
    else:
        asked = {"latency": SHARE}
    row: dict[str, Any] = {"case": case.name, "threads": THREADS} | {k: round(v, 4) for k, v in asked.items()}
    start = time.perf_counter()
    ratio = math.nan
    try:
        small = prunus.prune(model, unit="channel", example=x, measure=False, verify=False, **asked)
    except Infeasible as error:
        row["reason"] = str(error)
    else:
        row["search_seconds"] = round(time.perf_counter() - start, 1)
        timings = timed({"dense": model, "small": small.model}, x, seconds)
        row |= {k: v for k, v in timings.summary("small", "dense").items() if k != "name"}
        row |= {"dense_ms": round(timings.milliseconds("dense"), 3), "notes": list(small.report.notes)}
        row["macs_kept"] = round(small.report.macs_kept / small.report.macs, 4)
        ratio = timings.ratio("small", "dense") / SHARE
        row["achieved_over_asked"] = round(ratio, 4)
        if case.milliseconds:
            row["achieved_over_asked_on_the_clock"] = round(timings.milliseconds("small") / asked["latency_ms"], 4)
    print(f"{case.name}: {row.get('reason') or f'achieved over asked {ratio:.3f}'}", flush=True)
    return row, at_most(f"{case.name}: distance of achieved over asked from 1", abs(ratio - 1), GOAL)


def run(quick: bool) -> Outcome:
    """Ask for half the time in every case, and time what comes back.

    Args:
        quick: batch 1 only, and less timing afterwards.
    """
    with threads(THREADS):
        pairs = list(map(partial(measure, seconds=SECONDS[0 if quick else 1]), QUICK if quick else CASES))
    return {"results": [row for row, _ in pairs], "goals": [goal for _, goal in pairs]}


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
