"""What masks cost in training: a step of a masked ResNet-20 over the same step dense.

ResNet-20 on CIFAR-shaped random images, batch 128, two threads, SGD with momentum, 90 % sparsity. One process takes
a step of each in turns: dense, a fixed mask (Static), RigL, and the masks of torch.nn.utils.prune, which multiplies
in every forward pass. RigL is counted with one exchange in 100 steps: ordinary steps and steps with an exchange are
timed apart, because 100 steps of each would take an hour.

The ratio of whole steps is what counts, and needs a quiet machine: a step takes hundreds of milliseconds, the masks
two. The share of a masked step that is spent in the hooks is measured inside those same steps and varies less. Where
other work holds a core, every operation on more than 32,768 numbers, an addition as well as a mask, waits
milliseconds for the second thread, and the sixty short ones of the hooks wait most; `OMP_WAIT_POLICY=PASSIVE` in the
environment spares all of them that wait. The results say how it was set.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as peer

import prunus
from benchmarks.contract import Outcome, at_most, interleaved, main, threads
from prunus.models.create import create
from prunus.parameters import prunable
from prunus.randomness import generator

BATCH = 128
SPARSITY = 0.9
GOAL = 1.02
AMORTISED_OVER = 100
WARMUP = 2


def run(quick: bool) -> Outcome:
    """Time steps in turns.

    Args:
        quick: 8 rounds with 2 exchanges instead of 120 with 12.
    """
    rounds, every = (8, 4) if quick else (120, 10)
    with threads(2):
        return _measure(rounds, every)


@dataclass
class HookTime:
    """Seconds between optimizer hooks of our own that stand right before and right behind those of Prunus."""

    optimizer: torch.optim.Optimizer
    started: float = 0.0
    spent: float = 0.0
    steps: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Register the hooks that run before Prunus."""
        self.optimizer.register_step_pre_hook(self._start)
        self.optimizer.register_step_post_hook(self._start)

    def end(self) -> None:
        """Register the hooks that run after Prunus."""
        self.optimizer.register_step_pre_hook(self._stop)
        self.optimizer.register_step_post_hook(self._finish)

    def _start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.spent = time.perf_counter() - self.started

    def _finish(self, *_: Any) -> None:
        self.steps.append(self.spent + time.perf_counter() - self.started)


def _static(model: nn.Module, optimizer: torch.optim.Optimizer) -> HookTime:
    hooks = HookTime(optimizer)
    hooks.begin()
    prunus.sparsify(model, optimizer, prunus.Static(SPARSITY), steps=1_000_000)
    hooks.end()
    return hooks


def _stepper(prepare: Callable[[nn.Module, torch.optim.Optimizer], object]) -> tuple[Callable[[], None], object]:
    """Return a function that takes one training step, and what `prepare` returned."""
    model = create("resnet20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    attached = prepare(model, optimizer)
    draws = generator(0, "benchmark", "batch")
    x = torch.randn(BATCH, 3, 32, 32, generator=draws)
    y = torch.randint(0, 10, (BATCH,), generator=draws)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, attached


def _torch_prune(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    masks = prunus.prune(model, SPARSITY, measure=False).masks
    for name, mask in masks.items():
        module, _, tensor = name.rpartition(".")
        owner = model.get_submodule(module)
        peer.custom_from_mask(owner, tensor, mask)


def _measure(rounds: int, every: int) -> Outcome:
    total = (rounds + 10) * every
    steps, handles = {}, {}
    for name, prepare in {
        "dense": lambda m, o: None,
        "static": _static,
        "rigl": lambda m, o: prunus.sparsify(m, o, prunus.RigL(SPARSITY, every=every, end="1dur"), steps=total),
        "torch.nn.utils.prune": _torch_prune,
    }.items():
        steps[name], handles[name] = _stepper(prepare)

    rigl = handles["rigl"]
    assert isinstance(rigl, prunus.Sparsifier)
    exchanges: list[int] = []

    def after(name: str, number: int) -> None:
        if name == "rigl" and rigl.step % every == 0:
            exchanges.append(number)

    timings = interleaved(steps, rounds, warmup=WARMUP, after=after)
    ordinary = timings.ratio("rigl", "dense", [r for r in range(rounds) if r not in set(exchanges)])
    exchange = timings.ratio("rigl", "dense", exchanges)
    amortised = ((AMORTISED_OVER - 1) * ordinary + exchange) / AMORTISED_OVER
    static = timings.ratio("static", "dense")
    hooks = handles["static"]
    assert isinstance(hooks, HookTime)
    share = statistics.median(h / t for h, t in zip(hooks.steps[WARMUP:], timings.seconds["static"], strict=True))
    size = prunable(create("resnet20")).total
    return {
        "results": [
            {
                "model": "resnet20",
                "batch_size": BATCH,
                "prunable": size,
                "sparsity": SPARSITY,
                "threads": torch.get_num_threads(),
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
            },
            *(timings.summary(name, "dense") for name in steps),
            {
                "name": f"rigl, one exchange in {AMORTISED_OVER} steps",
                "ratio": round(amortised, 4),
                "ratio_of_ordinary_steps": round(ordinary, 4),
                "ratio_of_steps_with_an_exchange": round(exchange, 4),
                "exchanges_timed": len(exchanges),
            },
            {
                "name": "hooks of the fixed mask, inside its steps",
                "median_ms": round(1e3 * statistics.median(hooks.steps[WARMUP:]), 3),
                "share_of_step": round(share, 5),
            },
        ],
        "goals": [
            at_most("time of a step with a fixed mask at 90 % sparsity over the dense step", static, GOAL),
            at_most("share of that step spent in the hooks that mask", share, GOAL - 1),
        ],
    }


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
