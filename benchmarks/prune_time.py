"""How long one-shot global pruning takes, and how much memory, beside torch.nn.utils.prune.

80 % of the weights of all convolutions and linear layers go by magnitude, in one ranking, in a net with the layers
of ResNet-50 (25.5 M weights) and in a transformer of 124 M parameters (85 M of them in linear layers). No forward
pass is run, so the layers just lie in a list. Times are taken in turns in one process; peak memory is that of a
process of its own, above what the model itself takes. One thread.

The peer is left where `global_unstructured` leaves it, with masks and original weights beside each other; making
its pruning permanent would cost more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as peer

import prunus
from benchmarks.contract import Outcome, at_least, below, equals, interleaved, main, memory_of_process, threads
from prunus.parameters import prunable
from prunus.randomness import generator

SPARSITY = 0.8
THREADS = 1  # with more, each of hundreds of short operations waits for a core that other work may hold
GOAL = 2.0
TRACE = 16 * 2**20  # bytes that building a net may leave above what it holds
ROUNDS = {"resnet50": (2, 7), "transformer-124m": (1, 3)}  # quick, full


def resnet50() -> nn.Module:
    """Return the convolutions and the linear layer of ResNet-50 (He et al., CVPR 2016) for 1,000 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False, device="meta")]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
            shapes += [(inputs, 4 * width, 1)] if block == 0 else []
            layers += [nn.Conv2d(i, o, k, bias=False, device="meta") for i, o, k in shapes]
            inputs = 4 * width
    return nn.ModuleList([*layers, nn.Linear(inputs, 1000, device="meta")])


def transformer() -> nn.Module:
    """Return the tables and linear layers of a 12-layer decoder of width 768 with a vocabulary of 50,257."""
    layers: list[nn.Module] = [nn.Embedding(50_257, 768, device="meta"), nn.Embedding(1024, 768, device="meta")]
    for _ in range(12):
        shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
        layers += [nn.Linear(i, o, device="meta") for i, o in shapes]
    return nn.ModuleList(layers)


NETS: dict[str, Callable[[], nn.Module]] = {"resnet50": resnet50, "transformer-124m": transformer}


def build(name: str) -> nn.Module:
    """Return a net with normal weights, filled in place so that building leaves no trace in the memory peak."""
    net = NETS[name]().to_empty(device="cpu")
    draws = generator(0, "benchmark", name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.02, generator=draws)
    return net


def with_prunus(net: nn.Module) -> int:
    """Prune in place and return how many prunable weights stay."""
    return prunus.prune(net, SPARSITY, inplace=True, measure=False).masks.kept


def with_torch(net: nn.Module) -> int:
    """Prune with torch.nn.utils.prune and return how many weights stay."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    tensors = [(layer, "weight") for layer in layers]
    peer.global_unstructured(tensors, pruning_method=peer.L1Unstructured, amount=SPARSITY)
    return sum(int(torch.count_nonzero(layer.get_buffer("weight_mask"))) for layer in layers)


PRUNERS: dict[str, Callable[[nn.Module], int]] = {"prunus": with_prunus, "torch.nn.utils.prune": with_torch}


def run(quick: bool) -> Outcome:
    """Time both pruners in turns on both nets, then measure the memory of each in a process of its own.

    Args:
        quick: 2 and 1 rounds instead of 7 and 3, and the memory of the smaller net only.
    """
    results, goals = [], []
    with threads(THREADS):
        for name in NETS:
            found, wanted = _measure(name, ROUNDS[name][0 if quick else 1], not quick or name == "resnet50")
            results += found
            goals += wanted
    return {"results": results, "goals": goals}


def _measure(name: str, rounds: int, memory: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    source = build(name)
    size = prunable(source).total
    wanted = size - round(SPARSITY * size)
    weights = source.state_dict()
    for first in PRUNERS.values():
        _first_use(first)
    nets: dict[str, nn.Module] = {}
    kept: dict[str, int] = {}

    def prepare(pruner: str) -> None:
        # A fresh net each time: zeros of an earlier pruning would be ties, and the peer wraps its modules.
        nets.clear()
        nets[pruner] = NETS[name]().to_empty(device="cpu")
        nets[pruner].load_state_dict(weights)

    def pruning(pruner: str) -> None:
        kept[pruner] = PRUNERS[pruner](nets[pruner])

    timings = interleaved(
        {pruner: partial(pruning, pruner) for pruner in PRUNERS},
        rounds,
        warmup=0,
        prepare={pruner: partial(prepare, pruner) for pruner in PRUNERS},
    )
    nets.clear()
    peaks = {pruner: peak_of(name, pruner) for pruner in PRUNERS} if memory else {}
    ours, theirs = PRUNERS
    results = []
    for pruner in PRUNERS:
        row = {"net": name, "prunable": size, "threads": THREADS, **timings.summary(pruner, ours), "kept": kept[pruner]}
        if memory:
            row |= {
                "peak_mib": round(peaks[pruner] / 2**20, 1),
                "peak_over_weights": round(peaks[pruner] / (4 * size), 3),
            }
        results.append(row)
    goals = [
        at_least(f"{name}: time of {theirs} over ours", timings.ratio(theirs, ours), GOAL),
        equals(f"{name}: weights kept", kept[ours], wanted),
    ]
    if memory:
        goals.append(below(f"{name}: our peak memory over that of {theirs}", peaks[ours] / peaks[theirs], 1.0))
    return results, goals


def _first_use(pruner: Callable[[nn.Module], int]) -> None:
    """Let a pruner import and allocate what it does once, so that it is not counted."""
    pruner(nn.ModuleList([nn.Linear(8, 8)]))


def peak_of(name: str, pruner: str) -> int:
    """Return the bytes that pruning takes at its peak above the model alone, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prune_time", "--peak", name, pruner],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(json.loads(done.stdout))


def _peak(name: str, pruner: str) -> int:
    torch.set_num_threads(THREADS)
    _first_use(PRUNERS[pruner])
    net = build(name)
    before = memory_of_process("VmRSS")
    if memory_of_process("VmHWM") > before + TRACE:
        raise RuntimeError("building the net took more memory than it holds, so its peak would hide that of pruning")
    PRUNERS[pruner](net)
    return memory_of_process("VmHWM") - before


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(_peak(*sys.argv[2:4])))
        sys.exit(0)
    sys.exit(main(run, __doc__))
