"""The sparse engine beside dense runtimes: whole networks and linear layers, by pattern, density, batch and threads.

Each case is one model with random masks of a pattern and density. The engine's compressed model (engine="always",
kernels chosen by timing) and every dense runtime run in turns in this process; each is called once untimed before its
timed call, so that none pays for what another left in the caches. Ratios are medians over rounds of the runtime's time
over the engine's: above 1 the engine is faster. Weights are random, which changes no time.

The goals are stated for two cores of Zen 4; the results name the processor that they were measured on. `--quick`
measures ResNet-50 and two linear layers at one density.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from benchmarks.contract import Outcome, at_least, main, threads
from prunus.models.vision_repair import repair_torchvision
from prunus.randomness import generator
from prunus.runtime.library import why_not
from prunus.runtime.peers import dense, onnxruntime, openvino, torch_compile

ROUNDS = (7, 21)  # quick, full
PATTERNS = {"unstructured": 1, "2x1": 2, "4x1": 4, "8x1": 8, "16x1": 16}
PEERS: dict[str, Callable[..., Callable[[], Any]]] = {
    "torch": dense,
    "torch.compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        model: name, see `build`.
        batch: examples in a call.
        threads: of every runtime.
        pattern: of `PATTERNS`.
        sparsity: share of weights that are zero.
        goal: the engine is to be so many times as fast as the best dense runtime, if that is a goal.
    """

    model: str
    batch: int
    threads: int
    pattern: str
    sparsity: float
    goal: float | None = None


def cases(quick: bool) -> list[Case]:
    """Return what is compared; dense runtimes are measured once per model, batch and threads, beside all densities."""
    if quick:
        return [
            Case("resnet50", 1, 1, "unstructured", 0.9, 4.0),
            Case("linear 4096x4096", 1, 1, "unstructured", 0.9, 10.0),
            Case("linear 768x3072", 128, 1, "unstructured", 0.9, 6.0),
        ]
    found = []
    goals = {(2, "unstructured", 0.9): 3.0, (1, "unstructured", 0.9): 4.0, (2, "unstructured", 0.95): 5.0}
    goals |= {(2, "4x1", 0.5): 1.6, (2, "4x1", 0.8): 3.2}
    for count in (1, 2):
        for pattern, sparsity in (
            *(("unstructured", s) for s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
            *(("4x1", s) for s in (0.5, 0.8, 0.9)),
        ):
            found.append(Case("resnet50", 1, count, pattern, sparsity, goals.get((count, pattern, sparsity))))
    for count in (1, 2):
        for sparsity in (0.8, 0.9, 0.95):
            goal = 4.2 if sparsity == 0.9 else None
            found.append(Case("resnet20", 64, count, "unstructured", sparsity, goal))
            found.append(Case("resnet20", 1, count, "unstructured", sparsity))
            found.append(Case("mobilenet_v2", 1, count, "unstructured", sparsity))
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        goal = {0.5: 1.5, 0.9: 6.0}.get(sparsity)
        found.append(Case("linear 768x3072", 128, 1, "unstructured", sparsity, goal))
        found.append(Case("linear 4096x4096", 1, 1, "unstructured", sparsity, 10.0 if sparsity == 0.9 else None))
        found.append(Case("vit_b_16", 1, 1, "unstructured", sparsity))
    return found


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return (model in eval mode, shape of one example)."""
    if name.startswith("linear "):
        inputs, outputs = (int(n) for n in name.removeprefix("linear ").split("x"))
        return nn.Sequential(nn.Linear(inputs, outputs)).eval(), (inputs,)
    if name == "resnet20":
        from prunus.models.resnet import resnet20

        return resnet20(10, (3, 32, 32)).eval(), (3, 32, 32)
    repair_torchvision()
    from torchvision import models

    return models.get_model(name, weights=None).eval(), (3, 224, 224)


def masked(model: nn.Module, pattern: str, sparsity: float) -> nn.Module:
    """Put zeros of a pattern into all weights with enough rows, the first convolution excepted; in place."""
    rows = PATTERNS[pattern]
    first = True
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            weight = module.weight
            draws = generator(0, "benchmark", name)
            weight.normal_(0.0, weight[0].numel() ** -0.5, generator=draws)
            stem, first = first and isinstance(module, nn.Conv2d), False
            grouped = isinstance(module, nn.Conv2d) and module.groups > 1
            if stem or grouped or weight.shape[0] % rows:
                continue
            kept = torch.rand(weight.shape[0] // rows, 1, weight[0].numel(), generator=draws) >= sparsity
            weight.mul_(kept.expand(-1, rows, -1).reshape(weight.shape))
    return model


def turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call, in turns; each is called once untimed before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(group: list[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row per case; all share model, batch and threads."""
    case = group[0]
    model, shape = build(case.model)
    masked(model, "unstructured", 0.0)
    example = torch.randn(case.batch, *shape, generator=generator(0, "benchmark", "example"))
    calls: dict[str, Callable[[], Any]] = {}
    skipped = {}
    for name, peer in PEERS.items():
        try:
            calls[name] = peer(model, example, case.threads)
        except prunus.errors.PrunusError as error:
            skipped[name] = str(error)
    differences = {}
    sparse: dict[str, Case] = {}
    with threads(case.threads):
        for one in group:
            name = f"{one.pattern} {one.sparsity:.0%}"
            fast = prunus.compress(masked(build(one.model)[0], one.pattern, one.sparsity), example, engine="always")
            calls[name], sparse[name] = partial(_called, fast, example), one
            assert fast.report is not None
            differences[name] = fast.report.difference
        seconds = turns(calls, rounds)
    for name, one in sparse.items():
        ratios = {
            peer: statistics.median(a / b for a, b in zip(seconds[peer], seconds[name], strict=True))
            for peer in PEERS
            if peer in seconds
        }
        best = min(ratios, key=lambda peer: ratios[peer])
        yield {
            "model": one.model,
            "batch": one.batch,
            "threads": one.threads,
            "pattern": one.pattern,
            "sparsity": one.sparsity,
            "engine_ms": round(1e3 * statistics.median(seconds[name]), 3),
            **{f"{peer}_ms": round(1e3 * statistics.median(seconds[peer]), 3) for peer in ratios},
            "ratios": {peer: round(ratio, 3) for peer, ratio in ratios.items()},
            "best_dense": best,
            "ratio": round(ratios[best], 3),
            "difference": differences[name],
            "skipped": skipped,
            "goal": one.goal,
        }


def _called(model: nn.Module, example: Tensor) -> Any:
    with torch.inference_mode():
        return model(example)


def run(quick: bool) -> Outcome:
    """Measure all cases; see the module.

    Args:
        quick: three cases, seven rounds.
    """
    if why_not():
        return {"results": [], "goals": [{"what": "native engine", "value": why_not(), "goal": "there", "met": False}]}
    results, goals = [], []
    groups: dict[Any, list[Case]] = {}
    for case in cases(quick):
        groups.setdefault((case.model, case.batch, case.threads), []).append(case)
    for number, group in enumerate(groups.values()):
        for row in compare(group, ROUNDS[0 if quick else 1]):
            results.append(row)
            what = (
                f"{row['model']} batch {row['batch']}, {row['threads']} threads, {row['pattern']} {row['sparsity']:.0%}"
            )
            print(f"[{number + 1}/{len(groups)}] {what}: {row['ratio']} times {row['best_dense']}", file=sys.stderr)
            if row["goal"] is not None:
                goals.append(at_least(f"{what}: best dense time over the engine's", row["ratio"], row["goal"]))
            goals.append(
                at_least(f"{what}: agreement (1e-4 over the difference)", 1e-4 / max(row["difference"], 1e-12), 1)
            )
    return {"results": results, "goals": goals}


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
