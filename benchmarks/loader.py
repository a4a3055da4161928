"""What a batch costs beside the training step that consumes it: CIFAR-10 shape, batch 128, crop and flip.

Times of the two are taken in turns in one process on two threads, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from prunus.data.batches import Batches
from prunus.data.examples import Examples
from prunus.data.load import load
from prunus.errors import DataMissing
from prunus.models.create import create
from prunus.randomness import generator

BATCH = 128
GOAL = 0.05


def examples() -> tuple[Examples, str]:
    """Return the CIFAR-10 training images and "cifar10", or random bytes of their shape and "random"."""
    try:
        return load("cifar10").train, "cifar10"
    except DataMissing:
        draws = generator(0, "benchmark", "images")
        x = torch.randint(0, 256, (50_000, 3, 32, 32), generator=draws, dtype=torch.uint8)
        y = torch.randint(0, 10, (50_000,), generator=draws)
        return Examples.from_arrays(x, y, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3), "random"


def run(quick: bool) -> dict[str, Any]:
    """Time batches and training steps in turns.

    Args:
        quick: 12 rounds instead of 60.

    Returns:
        {"results": medians in milliseconds and the ratio, "goals": the ratio below 5 %}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return _measure(12 if quick else 60)
    finally:
        torch.set_num_threads(threads)


def _measure(rounds: int) -> dict[str, Any]:
    data, source = examples()
    batches = Batches(data, BATCH, augment="crop,flip")
    model = create("resnet20", num_classes=data.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    stream = batches.epoch(0)
    x, y, _ = next(stream)

    def produce() -> None:
        nonlocal x, y
        x, y, _ = next(stream)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"batch": [], "step": []}
    for index in range(rounds + 3):
        for name, work in (("batch", produce), ("step", step)):
            taken = _seconds(work)
            # The first rounds fill caches and allocate; they are not what a training run sees.
            if index >= 3:
                seconds[name].append(taken)
    batch, training = (1e3 * statistics.median(seconds[name]) for name in ("batch", "step"))
    ratio = statistics.median(b / s for b, s in zip(seconds["batch"], seconds["step"]))
    return {
        "results": [
            {
                "data": source,
                "batch_size": BATCH,
                "augment": "crop,flip",
                "model": "resnet20",
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "batch_ms": round(batch, 3),
                "step_ms": round(training, 3),
                "ratio": round(ratio, 4),
            }
        ],
        "goals": [
            {
                "what": "time of a batch over time of a ResNet-20 training step",
                "value": round(ratio, 4),
                "goal": f"< {GOAL}",
                "met": ratio < GOAL,
            }
        ],
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    """Run, print one JSON object, and return 0 only if every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="12 rounds instead of 60")
    outcome = run(parser.parse_args().quick)
    print(json.dumps(outcome, indent=2))
    return 0 if all(goal["met"] for goal in outcome["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
