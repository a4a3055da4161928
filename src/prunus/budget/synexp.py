"""Layer densities that maximise the expected synaptic flow of a network: water-filling, no weights and no data.

Source: "Structured Pruning is All You Need for Pruning CNNs at Initialization", Cai et al., 2022 (arXiv 2203.02549;
SynExp in its later version). The authors' code is not published: formulas are derived here and checked by
simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prunus.budget.budgets import Budget, Problem
from prunus.errors import Infeasible, InvalidValue

Vector = NDArray[np.float64]


def expected_flow(widths: Sequence[int], densities: Sequence[float], mean_weights: Sequence[float]) -> float:
    """Return E[R] of R = 1^T |W_L * M_L| ... |W_1 * M_1| 1 for a chain of linear layers.

    E[R] = prod_l d_l * prod_l p_l E|w_l|: there are prod_l d_l paths, and each uses one entry of every layer. It holds
    for any random masks that are independent of the weights and between layers and keep every entry with probability
    p_l, so single weights, whole rows and whole columns give the same number.

    Args:
        widths: d_0 ... d_L, input and output included; one more than there are layers.
        densities: p_1 ... p_L.
        mean_weights: E|w_1| ... E|w_L|.

    Raises:
        InvalidValue: lengths that do not fit each other.
    """
    if not len(widths) - 1 == len(densities) == len(mean_weights):
        raise InvalidValue(
            f"{len(widths)} widths, {len(densities)} densities and {len(mean_weights)} mean weights do not fit: a "
            "chain of L layers has L + 1 widths."
        )
    return math.prod(widths) * math.prod(p * w for p, w in zip(densities, mean_weights, strict=True))


def synexp(densities: ArrayLike) -> float:
    """Return sum_l log p_l, the part of log E[R] that densities decide; -inf when a layer is empty.

    Skip connections are left out: a residual block contributes log(1 + k prod p), which is not concave in log p.
    """
    with np.errstate(divide="ignore"):
        return float(np.log(np.asarray(densities, dtype=np.float64)).sum())


@dataclass(frozen=True)
class WaterLevel:
    """The solution of `water_fill`.

    Attributes:
        densities: p_l, float64 of shape (layers,).
        multipliers: Lagrange multipliers, one per budget; 0 for a budget that is not used up.
    """

    densities: Vector
    multipliers: tuple[float, ...]


def water_fill(costs: ArrayLike, budgets: ArrayLike, *, upper: float = 1.0) -> WaterLevel:
    """Return the densities that maximise sum_l log p_l under one or two budgets, 0 < p_l <= `upper`.

    The conditions of optimality give p_l = min(upper, 1 / sum_b lambda_b cost_bl): under one budget all unsaturated
    layers get the same number of parameters (or multiply-accumulates). One budget is solved exactly by sorting, two
    by nested bisection with complementary slackness.

    Args:
        costs: cost of every layer at density 1, shape (layers,) or (budgets, layers), non-negative.
        budgets: one limit, or one per row of `costs`.
        upper: largest density; `math.inf` lets layers grow beyond their size (PreConfig).

    Raises:
        InvalidValue: not one or two budgets, costs or limits that are not finite or negative, a limit of 0, or with
            an infinite `upper` a layer that costs nothing under any budget.
    """
    matrix = np.atleast_2d(np.asarray(costs, dtype=np.float64))
    limits = np.atleast_1d(np.asarray(budgets, dtype=np.float64))
    _check(matrix, limits, upper)
    if len(limits) == 1:
        densities, multiplier = _fill_one(matrix[0], float(limits[0]), upper)
        return WaterLevel(densities, (multiplier,))
    alone = [_fill_one(row, float(limit), upper) for row, limit in zip(matrix, limits, strict=True)]
    for mine, other in ((0, 1), (1, 0)):
        densities, multiplier = alone[mine]
        if _use(matrix[other], densities) <= limits[other] * (1 + 1e-12):
            return WaterLevel(densities, (multiplier, 0.0) if mine == 0 else (0.0, multiplier))

    def at(first: float, second: float) -> Vector:
        with np.errstate(divide="ignore"):
            return np.minimum(upper, 1.0 / (first * matrix[0] + second * matrix[1]))

    def first_for(second: float) -> float:
        return _bisect(lambda first: _use(matrix[0], at(first, second)) - limits[0], alone[0][1])

    # Both budgets bind. A second multiplier can only lower the first, so each alone is an upper bound.
    second = _bisect(lambda mu: _use(matrix[1], at(first_for(mu), mu)) - limits[1], alone[1][1])
    first = first_for(second)
    return WaterLevel(at(first, second), (first, second))


def _check(matrix: Vector, limits: Vector, upper: float) -> None:
    if matrix.ndim != 2 or limits.ndim != 1 or not 1 <= len(limits) <= 2 or len(matrix) != len(limits):
        raise InvalidValue(
            f"costs of shape {matrix.shape} and {limits.shape} budgets do not fit; give one or two rows."
        )
    if matrix.shape[1] == 0:
        raise InvalidValue("there is no layer to give a density to.")
    if not (np.isfinite(matrix).all() and (matrix >= 0).all()):
        raise InvalidValue("costs of layers must be finite and not negative.")
    if not (np.isfinite(limits).all() and (limits > 0).all()):
        raise InvalidValue(f"budgets must be finite and above 0, got {limits.tolist()}.")
    if not upper > 0:
        raise InvalidValue(f"upper={upper} must be above 0.")
    if math.isinf(upper) and not (matrix > 0).any(axis=0).all():
        raise InvalidValue("a layer that costs nothing under any budget has no best density; leave it out.")


def _use(costs: Vector, densities: Vector) -> float:
    """Return what densities cost, where nothing times infinity is nothing."""
    return float((costs[costs > 0] * densities[costs > 0]).sum())


def _fill_one(costs: Vector, limit: float, upper: float) -> tuple[Vector, float]:
    """Return densities and multiplier under one budget: sum min(upper a_l, c) = limit has a root in closed form."""
    if math.isfinite(upper) and upper * costs.sum() <= limit:
        return np.full(len(costs), upper), 0.0
    ordered = np.sort(costs[costs > 0])
    spent, level = 0.0, 0.0
    for saturated, cost in enumerate(ordered):
        level = (limit - spent) / (len(ordered) - saturated)
        if level <= upper * cost:
            break
        spent += upper * cost
    with np.errstate(divide="ignore"):
        return np.minimum(upper, level / costs), 1.0 / level


def _bisect(excess: Callable[[float], float], high: float) -> float:
    """Return the smallest multiplier in [0, high] at which a falling function is not above 0."""
    low = 0.0
    if excess(low) <= 0:
        return low
    for _ in range(100):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, kw_only=True)
class SynExp(Budget):
    """Densities of the largest expected synaptic flow: every tensor keeps the same number of weights, or is dense.

    Source: Cai et al., 2022 (arXiv 2203.02549); see `water_fill`. It looks at sizes alone.
    """

    def densities(self, problem: Problem) -> list[float]:
        """Return the density of each tensor."""
        if problem.keep <= 0:
            raise Infeasible("water-filling needs at least one weight to give away; lower the sparsity.")
        return [float(p) for p in water_fill(problem.sizes, problem.keep).densities]
