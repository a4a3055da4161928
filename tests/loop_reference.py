"""What every loop is compared with: six methods written out by hand, without hooks, on one small float64 training.

Nothing here uses Prunus, except that random starts are handed over as masks. Gradients are always masked before the
optimizer sees them and dense ones are kept aside for growth, so that an implementation in which dense gradients
leak into weights or optimizer state cannot agree with this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 12
BATCH = 16
Keep = dict[str, Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "Static": {"sparsity": 0.8, "score": "magnitude", "budget": "global"},
    "GMP": {"sparsity": 0.8, "budget": "global", "end": 8, "every": 2},
    "RigL": {"sparsity": 0.8, "every": 3, "end": 9},
    "GraNet": {"sparsity": 0.8, "initial": 0.5, "ramp_end": 7, "every": 2, "end": 11},
    "SRSTE": {"unit": "2:4", "decay": 0.01, "freeze": 8},
    "ISSP": {"sparsity": 0.7, "factor": 0.9, "search_end": 7},
}


def method(name: str) -> Any:
    """Return the method called `name` with the options above."""
    import prunus

    return getattr(prunus, name)(**METHODS[name])


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Return conv - linear - linear on (4, 6, 6) inputs: 3,648 prunable weights, all inputs divisible by 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 12)
        )
    return net.to(dtype)


def batch(step: int, size: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the inputs (size, 4, 6, 6) and labels (size,) of one step."""
    draws = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 4, 6, 6, generator=draws, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 12, (size,), generator=draws)


def backward(model: nn.Module, step: int, size: int = BATCH) -> None:
    """Fill the gradients of one step's mean cross-entropy."""
    model.zero_grad()
    x, y = batch(step, size, next(model.parameters()).dtype)
    F.cross_entropy(model(x), y).backward()


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices and kernels by name."""
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2}


def best(values: Tensor, count: int) -> Tensor:
    """Mark the `count` largest entries; of equal ones the earlier."""
    keep = torch.zeros(values.numel(), dtype=torch.bool)
    keep[values.reshape(-1).sort(descending=True, stable=True).indices[:count]] = True
    return keep.reshape(values.shape)


def best_of_all(values: Keep, count: int) -> Keep:
    """Mark the `count` largest entries of all tensors in one ranking."""
    keep = best(torch.cat([v.reshape(-1) for v in values.values()]), count)
    parts = keep.split([v.numel() for v in values.values()])
    return {n: part.reshape(v.shape) for (n, v), part in zip(values.items(), parts)}


def two_of_four(weight: Tensor) -> Tensor:
    """Mark the two largest of every four consecutive inputs."""
    lines = weight.movedim(1, -1)
    order = lines.reshape(-1, 4).abs().argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :2], True)
    return keep.reshape(lines.shape).movedim(-1, 1)


def exchange(keep: Tensor, weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Drop the `count` smallest kept weights, then grow the `count` largest gradients of all that is not kept."""
    alive = int(keep.sum())
    left = best(torch.where(keep, weight.abs(), -1.0), alive - count)
    return left | best(torch.where(left, -1.0, gradient.abs()), count)


def cosine(first: float, last: float, share: float) -> float:
    """Return half a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def cubic(first: float, last: float, share: float) -> float:
    """Return the cubic ramp from `first` to `last`."""
    return last + (first - last) * (1 - min(share, 1.0)) ** 3


def kept_at(weights: dict[str, nn.Parameter], sparsity: float) -> int:
    """Return how many weights stay."""
    total = sum(w.numel() for w in weights.values())
    return total - math.floor(sparsity * total + 0.5)


def magnitudes(weights: dict[str, nn.Parameter], keep: Keep | None = None) -> Keep:
    """Return |w| of every tensor, and -1 where already pruned: a kept weight may be exactly zero, too."""
    return {
        n: w.detach().abs() if keep is None else torch.where(keep[n], w.detach().abs(), -1.0)
        for n, w in weights.items()
    }


def new_masks(name: str, step: int, keep: Keep, weights: dict[str, nn.Parameter], dense: Keep) -> Keep:
    """Return the masks after `step` steps are done (GMP, RigL, GraNet, ISSP; Static never changes)."""
    o = METHODS[name]
    if name == "GMP" and step <= o["end"] and (step % o["every"] == 0 or step == o["end"]):
        return best_of_all(magnitudes(weights, keep), kept_at(weights, cubic(0.0, o["sparsity"], step / o["end"])))
    if name == "RigL" and step % o["every"] == 0 and step <= o["end"]:
        share = cosine(0.3, 0.0, step / o["end"])
        return {
            n: exchange(keep[n], w.detach(), dense[n], int(share * int(keep[n].sum()) + 1e-9))
            for n, w in weights.items()
        }
    if name == "GraNet" and step < STEPS and (step % o["every"] == 0 or step == o["ramp_end"]):
        if step <= o["ramp_end"]:
            target = cubic(o["initial"], o["sparsity"], step / o["ramp_end"])
            keep = best_of_all(magnitudes(weights, keep), kept_at(weights, target))
        share = cosine(0.5, 0.005, step / o["end"])
        return {
            n: exchange(keep[n], w.detach(), dense[n], math.ceil(share * int(keep[n].sum()) - 1e-9))
            for n, w in weights.items()
        }
    if name == "ISSP" and step <= o["search_end"]:
        important = {
            n: best(m, m.numel() - math.ceil(o["sparsity"] * m.numel())) for n, m in magnitudes(weights).items()
        }
        if step == o["search_end"]:
            return important
        for n, w in weights.items():
            w.data[~important[n]] *= o["factor"]
    return keep


def first_masks(name: str, weights: dict[str, nn.Parameter]) -> Keep:
    """Return the masks of the methods that do not start at random."""
    if name == "Static":
        return best_of_all(magnitudes(weights), kept_at(weights, METHODS[name]["sparsity"]))
    if name == "SRSTE":
        return {n: two_of_four(w.detach()) for n, w in weights.items()}
    return {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}


def zero(weights: dict[str, nn.Parameter], keep: Keep, optimizer: torch.optim.Optimizer | None) -> None:
    """Zero what is pruned, in weights and (when given) in optimizer state."""
    for name, weight in weights.items():
        weight.data[~keep[name]] = 0.0
        for value in optimizer.state.get(weight, {}).values() if optimizer is not None else ():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value[~keep[name]] = 0.0


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    fill: Callable[[int], Any],
    *,
    start: Keep | None = None,
    steps: int = STEPS,
    after: Callable[[], None] = lambda: None,
) -> Keep:
    """Train `model` with a method written out, and return its last masks.

    Args:
        fill: writes the gradients of step 0, 1, ...; returns False when that step is to be skipped.
        start: first masks, for methods that start at random.
        after: called at the end of every step (learning rate schedules).
    """
    weights = weights_of(model)
    keep = start if start is not None else first_masks(name, weights)
    behind = {n: w.detach().clone() for n, w in weights.items()}
    zero(weights, keep, None)
    done = 0
    for step in range(steps):
        if fill(step) is False:
            after()
            continue
        dense = {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in weights.items()}
        straight = name == "SRSTE" and done < METHODS[name]["freeze"]
        for n, w in weights.items():
            if w.grad is not None and straight:
                w.grad += METHODS[name]["decay"] * torch.where(keep[n], torch.zeros_like(w), behind[n])
                w.data.copy_(behind[n])
            elif w.grad is not None:
                w.grad[~keep[n]] = 0.0
        optimizer.step()
        done += 1
        if straight:
            behind = {n: w.detach().clone() for n, w in weights.items()}
            keep = {n: two_of_four(w.detach()) for n, w in weights.items()}
            zero(weights, keep, None)
        else:
            zero(weights, keep, optimizer)
            keep = new_masks(name, done, keep, weights, dense)
            zero(weights, keep, optimizer)
        after()
    return keep


def assert_same(
    model: nn.Module, masks: Any, other: nn.Module, keep: Any, *, rtol: float = 0.0, prefix: str = ""
) -> None:
    """Check that two trainings ended with identical masks and, to relative `rtol` (0: bitwise), equal parameters."""
    found = {n.removeprefix(prefix): m for n, m in masks.items()}
    assert set(found) == set(keep)
    for name, mask in keep.items():
        assert torch.equal(found[name].cpu(), mask), f"masks of {name} differ"
    mine = {n.removeprefix(prefix): p for n, p in model.named_parameters()}
    for name, parameter in other.named_parameters():
        if rtol == 0.0:
            assert torch.equal(mine[name], parameter), f"{name} differs"
        else:
            torch.testing.assert_close(mine[name], parameter, rtol=rtol, atol=rtol)
