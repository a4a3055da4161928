"""Layer sparsities by rate-distortion curves and an exact dynamic program.

Source: Xu et al., ICCV 2023 (efficient joint optimisation of layer-adaptive weight pruning). The program below is
the textbook recurrence, which finds the true optimum of the additive model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunus.budget.budgets import Budget, Problem
from prunus.budget.select import keep_best
from prunus.errors import Infeasible, InvalidValue


def solve(costs: Sequence[Sequence[float]], keeps: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option per layer with the least summed cost whose summed keeps stay within `budget`.

    D_l[j] = min over options a with keep_l(a) <= j of cost_l(a) + D_{l-1}[j - keep_l(a)], D_0 = 0, where D_l[j]
    means "at most j kept"; the answer is traced back from D_L[budget]. Costs need be neither monotone nor convex.
    Time O(layers * options * budget) in vectorised numpy, memory O(layers * budget).

    Args:
        costs: per layer, the distortion of each option; infinite for options that are not allowed.
        keeps: per layer, how many units each option keeps.
        budget: how many units may stay in total.

    Returns:
        The index of the chosen option of each layer; ties go to the earlier option.

    Raises:
        Infeasible: no choice fits the budget.
    """
    best = np.zeros(budget + 1)
    choices: list[np.ndarray] = []
    for cost, keep in zip(costs, keeps, strict=True):
        value = np.full(budget + 1, np.inf)
        choice = np.full(budget + 1, -1, dtype=np.int32)
        for option, (c, k) in enumerate(zip(cost, keep, strict=True)):
            if k > budget or not math.isfinite(c):
                continue
            candidate = c + best[: budget + 1 - k]
            better = candidate < value[k:]
            value[k:][better] = candidate[better]
            choice[k:][better] = option
        best = value
        choices.append(choice)
    if not math.isfinite(best[budget]):
        raise Infeasible(f"no combination of layer sparsities keeps at most {budget} units; raise the budget.")
    chosen, j = [], budget
    for choice, keep in zip(reversed(choices), reversed(list(keeps)), strict=True):
        option = int(choice[j])
        chosen.append(option)
        j -= keep[option]
    return chosen[::-1]


def curves(
    scores: Mapping[str, Tensor],
    grid: Sequence[float],
    distortion: Callable[[Mapping[str, Tensor]], float],
) -> dict[str, list[float]]:
    """Return, per layer and pruned share of `grid`, the output distortion with only that layer pruned so far.

    Args:
        scores: element scores; the int(a * n) lowest of a layer go at share a (a tolerance guards against 0.2899999).
        grid: pruned shares; 0 has distortion 0 by definition unless entries are pruned already.
        distortion: output distortion under masks (layers not named stay as they are).
    """
    result: dict[str, list[float]] = {}
    for name, score in scores.items():
        n, alive = score.numel(), int(torch.count_nonzero(score > -math.inf))
        result[name] = []
        for share in grid:
            kept = n - int(share * n + 1e-9)
            if kept > alive:
                result[name].append(math.inf)  # pruned weights do not come back
            elif kept == alive:
                result[name].append(0.0)
            else:
                result[name].append(distortion({name: keep_best(score, kept)}))
    return result


@dataclass(frozen=True, kw_only=True)
class RateDistortion(Budget):
    """Divide the budget so that the sum of single-layer output distortions is least (Xu et al., ICCV 2023).

    Attributes:
        points: number of equal steps of the pruned share (paper's code: 100; costs points x layers forward passes).
        resolution: the budget is counted in units of total / resolution; what rounding leaves is given back to the
            layers in proportion. 0 counts single weights (exact, slow for large nets).
    """

    points: int = 50
    resolution: int = 5000

    def __post_init__(self) -> None:
        if self.points < 1 or self.resolution < 0:
            raise InvalidValue(f"points {self.points} must be at least 1 and resolution {self.resolution} at least 0.")

    @property
    def needs_distortion(self) -> bool:
        """The model is run once per layer and grid point."""
        return True

    def densities(self, problem: Problem) -> list[float]:
        """Return the density of each tensor that the dynamic program chose."""
        if problem.distortion is None:
            raise InvalidValue("a rate-distortion budget runs the model; use prunus.prune(..., data=...).")
        grid = [i / self.points for i in range(self.points + 1)]
        table = curves(problem.scores, grid, problem.distortion)
        unit = max(1, sum(problem.sizes) // self.resolution) if self.resolution else 1
        kept = [[n - int(a * n + 1e-9) for a in grid] for n in problem.sizes]
        # Alive entries can be fewer than a grid point keeps after earlier rounds; they are an option of their own.
        for row, cost, alive in zip(kept, table.values(), problem.alive, strict=True):
            if not any(math.isfinite(c) and k == alive for c, k in zip(cost, row, strict=True)):
                row.append(alive)
                cost.append(0.0)
        keeps = [[-(-k // unit) for k in row] for row in kept]
        chosen = solve(list(table.values()), keeps, problem.keep // unit)
        return [row[c] / n for row, c, n in zip(kept, chosen, problem.sizes, strict=True)]
