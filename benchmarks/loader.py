"""What a batch costs beside the training step that consumes it: CIFAR-10 shape, batch 128, crop and flip.

Times of the two are taken in turns in one process on two threads, so that a busy machine slows both.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from benchmarks.contract import Outcome, below, interleaved, main, threads
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


def run(quick: bool) -> Outcome:
    """Time batches and training steps in turns.

    Args:
        quick: 12 rounds instead of 60.

    Returns:
        {"results": medians in milliseconds and the ratio, "goals": the ratio below 5 %}.
    """
    with threads(2):
        return _measure(12 if quick else 60)


def _measure(rounds: int) -> Outcome:
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

    # The first rounds fill caches and allocate; they are not what a training run sees.
    timings = interleaved({"batch": produce, "step": step}, rounds, warmup=3)
    ratio = timings.ratio("batch", "step")
    return {
        "results": [
            {
                "data": source,
                "batch_size": BATCH,
                "augment": "crop,flip",
                "model": "resnet20",
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "batch_ms": round(timings.milliseconds("batch"), 3),
                "step_ms": round(timings.milliseconds("step"), 3),
                "ratio": round(ratio, 4),
            }
        ],
        "goals": [below("time of a batch over time of a ResNet-20 training step", ratio, GOAL)],
    }


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
