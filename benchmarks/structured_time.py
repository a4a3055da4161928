"""How long removing half of all channels takes, and how much memory, beside torch-pruning 1.6.1.

Four torchvision classifiers with random weights at 224 pixels, batch 1. Timed is everything between a model and its
smaller self: reading the network, finding which channels belong together, scoring them by magnitude, planning and
cutting in place. Both get the model, one input and the ratio; the peer is also told its output layer. Ours is also
timed with the proof, which it gives by default and the peer does not have, that removing equals masking; that is not
judged. Fresh models are built untimed.

Times are the processor time of one process on one thread, taken in turns, which other work on the machine disturbs
less than wall time; peak memory is that of a process of its own, above what the model itself takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from benchmarks.contract import Outcome, at_most, below, equals, interleaved, main, memory_of_process, threads
from prunus.models.vision_repair import repair_torchvision
from prunus.randomness import generator

RATIO = 0.5
THREADS = 1  # with more, each of thousands of short operations waits for a core that other work may hold
GOALS = {"resnet50": 0.5, "densenet121": 0.1, "vit_b_16": 0.5, "convnext_tiny": 0.5}
ROUNDS = (1, 3)  # quick, full
CLASSES = 1000


def build(name: str) -> nn.Module:
    """Return the torchvision model of that name in eval mode, all parameters normal, filled in place."""
    repair_torchvision()
    from torchvision import models

    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    model = model.to_empty(device="cpu").eval()
    draws = generator(0, "benchmark", name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=draws)
        for buffer in model.buffers():  # running variances must be positive
            buffer.fill_(1)
    return model


def image() -> Tensor:
    """Return one image of shape (1, 3, 224, 224)."""
    return torch.randn(1, 3, 224, 224, generator=generator(0, "benchmark", "image"))


def with_prunus(model: nn.Module, example: Tensor, *, verify: bool = False) -> nn.Module:
    """Prune in place and return the model.

    Args:
        model: what to prune.
        example: its input.
        verify: prove first that removing equals masking, as `prunus.prune` does unless told otherwise.
    """
    options = {"example": example, "inplace": True, "measure": False, "verify": verify}
    return prunus.prune(model, RATIO, unit="channel", **options).model


def with_torch_pruning(model: nn.Module, example: Tensor) -> nn.Module:
    """Prune in place with torch-pruning, its output layer excepted, and return the model."""
    import torch_pruning as peer

    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = peer.pruner.BasePruner(
            model,
            example,
            importance=peer.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            global_pruning=False,
            ignored_layers=last,
        )
        pruner.step()
    return model


PRUNERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "prunus": with_prunus,
    "torch-pruning": with_torch_pruning,
    "prunus with proof": partial(with_prunus, verify=True),
}


def run(quick: bool) -> Outcome:
    """Time both pruners in turns on all models, then measure the memory of each in a process of its own.

    Args:
        quick: one round instead of three, and the memory of ResNet-50 only.
    """
    results, goals = [], []
    with threads(THREADS):
        for name in GOALS:
            found, wanted = _measure(name, ROUNDS[0 if quick else 1], not quick or name == "resnet50")
            results += found
            goals += wanted
    return {"results": results, "goals": goals}


def _measure(name: str, rounds: int, memory: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    example = image()
    for pruner in PRUNERS.values():
        _first_use(pruner)
    models: dict[str, nn.Module] = {}
    kept: dict[str, int] = {}
    runs: dict[str, bool] = {}

    def prepare(pruner: str) -> None:
        models.clear()
        models[pruner] = build(name)

    def pruning(pruner: str) -> None:
        models[pruner] = PRUNERS[pruner](models[pruner], example)

    def after(pruner: str, _: int) -> None:
        kept[pruner] = sum(parameter.numel() for parameter in models[pruner].parameters())
        runs[pruner] = _runs(models[pruner], example)

    timings = interleaved(
        {pruner: partial(pruning, pruner) for pruner in PRUNERS},
        rounds,
        warmup=0,
        prepare={pruner: partial(prepare, pruner) for pruner in PRUNERS},
        after=after,
        clock=time.process_time,
    )
    models.clear()
    peaks = {pruner: peak_of(name, pruner) for pruner in PRUNERS} if memory else {}
    size = sum(parameter.numel() for parameter in build(name).parameters())
    ours, theirs, _ = PRUNERS
    results = []
    for pruner in PRUNERS:
        row = {"model": name, "parameters": size, "threads": THREADS, **timings.summary(pruner, theirs)}
        row |= {"parameters_kept": kept[pruner], "runs": runs[pruner]}
        if memory:
            row |= {"peak_mib": round(peaks[pruner] / 2**20, 1), "peak_over_model": round(peaks[pruner] / 4 / size, 3)}
        results.append(row)
    goals = [
        at_most(f"{name}: our time over that of {theirs}", timings.ratio(ours, theirs), GOALS[name]),
        equals(f"{name}: our pruned model runs", runs[ours], True),
    ]
    if memory:
        goals.append(below(f"{name}: our peak memory over that of {theirs}", peaks[ours] / max(1, peaks[theirs]), 1.0))
    return results, goals


def _runs(model: nn.Module, example: Tensor) -> bool:
    try:
        with torch.no_grad():
            return tuple(model(example).shape) == (1, CLASSES)
    except RuntimeError:
        return False


def _first_use(pruner: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    """Let a pruner import and allocate what it does once, so that it is not counted."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, CLASSES))
    pruner(small.eval(), torch.ones(1, 3, 8, 8))


def peak_of(name: str, pruner: str) -> int:
    """Return the bytes that pruning takes at its peak above the model alone, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.structured_time", "--peak", name, pruner],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(json.loads(done.stdout))


def _peak(name: str, pruner: str) -> int:
    torch.set_num_threads(THREADS)
    _first_use(PRUNERS[pruner])
    model, example = build(name), image()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = memory_of_process("VmRSS")
    PRUNERS[pruner](model, example)
    return memory_of_process("VmHWM") - before


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(_peak(*sys.argv[2:4])))
        sys.exit(0)
    sys.exit(main(run, __doc__))
