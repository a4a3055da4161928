"""Channel widths under budgets: the best ones, found by convex optimisation in the logarithms of the widths.

Every family t of coupled channels has one multiplier s_t of its full width; a weight tensor with input family i and
output family o then keeps the density s_i * s_o (a depthwise one s_t). Costs are posynomials in s, hence convex in
x = log s, and so is the negative expected flow -sum_l log p_l: a geometric program.

Source of the task: Cai et al., 2022 (arXiv 2203.02549), where widths follow from densities by a square root. One
multiplier per family, so that neighbours agree, is a choice of this library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.errors import Infeasible, InvalidValue, unknown

Vector = NDArray[np.float64]
Part = tuple[int, int]  # (number of the family, or -1 when it stays; positions at full width)


@dataclass(frozen=True)
class Terms:
    """A cost as a posynomial: sum_k coefficients_k * prod_t s_t ** exponents_kt.

    Attributes:
        coefficients: positive, shape (K,).
        exponents: shape (K, T).
    """

    coefficients: Vector
    exponents: Vector

    def cost(self, x: Vector) -> float:
        """Return the cost at s = exp(x)."""
        return float((self.coefficients * np.exp(self.exponents @ x)).sum())

    def log_sum(self, x: Vector) -> tuple[float, Vector, Vector]:
        """Return log cost, its gradient (T,) and its Hessian (T, T) at x = log s."""
        parts = self.coefficients * np.exp(self.exponents @ x)
        share = parts / parts.sum()
        slope = self.exponents.T @ share
        return float(np.log(parts.sum())), slope, (self.exponents.T * share) @ self.exponents - np.outer(slope, slope)


@dataclass(frozen=True)
class WidthSpace:
    """A network as its widths see it.

    Attributes:
        families: names of the families of coupled channels.
        sizes: units of each at full width.
        layouts: for every parameter tensor, per axis the parts it is made of; one part unless tensors were joined.
        positions: for every weight tensor, how often one example uses each of its entries.
    """

    families: tuple[str, ...]
    sizes: tuple[int, ...]
    layouts: Mapping[str, tuple[tuple[Part, ...], ...]]
    positions: Mapping[str, int]

    def blocks(self, name: str) -> list[tuple[int, list[int]]]:
        """Return the blocks of a tensor: (entries at full width, families whose multipliers scale it)."""
        return [
            (math.prod(length for _, length in block), [family for family, _ in block if family >= 0])
            for block in itertools.product(*self.layouts[name])
        ]

    def terms(self, uses: Mapping[str, int]) -> Terms:
        """Return sum over tensors of uses * kept entries, blocks of equal exponents merged."""
        merged: dict[tuple[int, ...], float] = {}
        for name, times in uses.items():
            for entries, families in self.blocks(name):
                if times and entries:
                    key = tuple(sorted(families))
                    merged[key] = merged.get(key, 0.0) + float(times) * entries
        exponents = np.zeros((len(merged), len(self.families)))
        for row, key in enumerate(merged):
            for family in key:
                exponents[row, family] += 1
        return Terms(np.array(list(merged.values())), exponents)

    @property
    def params(self) -> Terms:
        """All parameters, biases and norms included."""
        return self.terms(dict.fromkeys(self.layouts, 1))

    @property
    def macs(self) -> Terms:
        """Multiply-accumulates of one example in weight tensors."""
        return self.terms(self.positions)

    def densities(self, widths: Sequence[int]) -> dict[str, float]:
        """Return the share of each weight tensor that is left at these widths."""
        share = [w / size for w, size in zip(widths, self.sizes, strict=True)]
        found = {}
        for name in self.positions:
            blocks = self.blocks(name)
            left = sum(entries * math.prod(share[f] for f in families) for entries, families in blocks)
            found[name] = left / sum(entries for entries, _ in blocks)
        return found

    def count(self, terms: Terms, widths: Sequence[float]) -> int:
        """Return a cost at whole widths, exactly."""
        return round(terms.cost(np.log(np.asarray(widths, dtype=np.float64) / np.asarray(self.sizes))))


@dataclass(frozen=True)
class Limit:
    """A cost and how large it may be."""

    terms: Terms
    limit: float
    name: str = "cost"


def best_widths(space: WidthSpace, limits: Sequence[Limit], *, upper: float = 1.0) -> Vector:
    """Return log multipliers that maximise the expected flow sum_l log p_l under all limits.

    Of a tensor that reads joined families (a concatenation), every block counts by its share, a lower bound of log
    p_l that keeps the problem convex.

    Args:
        space: the network.
        limits: costs that may not be exceeded.
        upper: largest multiplier; `math.inf` lets families grow beyond their width.

    Raises:
        Infeasible: one unit per family costs more than a limit.
    """
    low, high = _box(space, upper)
    _check_floor(space, limits, low)
    if all(limit.terms.cost(high) <= limit.limit for limit in limits):
        return high
    slope = np.zeros(len(space.families))
    for name in space.positions:
        blocks = space.blocks(name)
        total = sum(entries for entries, _ in blocks)
        for entries, families in blocks:
            for family in families:
                slope[family] += entries / total
    return _minimise(np.zeros((len(slope), len(slope))), slope, limits, low, high)


def fit_widths(
    space: WidthSpace, densities: Mapping[str, float], limits: Sequence[Limit], *, upper: float = 1.0
) -> Vector:
    """Return log multipliers whose products come near given layer densities, then scaled until a limit is met.

    Minimises sum_l a_l p_l (log s_in + log s_out - log p_l)^2 over multipliers up to `upper`, a_l the parameters of
    tensor l; tensors that are not named do not count. Products alone leave a chain free to alternate between wide and
    narrow layers, see `root_widths`.

    Args:
        space: the network.
        densities: weight tensor -> density, from 0 to upper^2; an empty layer counts as one entry.
        limits: costs that may not be exceeded; the multipliers grow or shrink until the first of them is met.
        upper: largest multiplier; `math.inf` lets families grow beyond their width.

    Raises:
        UnknownName: a density for a tensor that is no weight of the network.
        InvalidValue: a density that is negative, not finite, or above what `upper` allows.
        Infeasible: one unit per family costs more than a limit.
    """
    low, high = _box(space, upper)
    _check_floor(space, limits, low)
    quadratic = np.zeros((len(low), len(low)))
    linear = np.zeros(len(low))
    for weight, target, families in _targets(space, densities, upper):
        row = np.bincount(families, minlength=len(low)).astype(np.float64)
        quadratic += 2 * weight * np.outer(row, row)
        linear += 2 * weight * target * row
    scale = max(float(np.abs(quadratic).max(initial=0.0)), 1.0)
    return scaled(space, _minimise(quadratic / scale, linear / scale, [], low, high), limits, upper=upper)


def root_widths(
    space: WidthSpace, densities: Mapping[str, float], limits: Sequence[Limit], *, upper: float = 1.0
) -> Vector:
    """Return log multipliers that split every layer's density evenly over its widths, then scaled until a limit is met.

    A tensor between two families asks both for sqrt(p_l), one with a single family asks it for p_l, as in the paper;
    where neighbours disagree about the width they share, they are averaged in the logarithm by their a_l p_l, the
    parameters left. Families that no tensor asks for stay whole. Arguments and errors as in `fit_widths`.
    """
    low, high = _box(space, upper)
    _check_floor(space, limits, low)
    total, votes = np.zeros(len(low)), np.zeros(len(low))
    for weight, target, families in _targets(space, densities, upper):
        for family in families:
            total[family] += weight * target / len(families)
            votes[family] += weight
    x = np.divide(total, votes, out=np.zeros(len(low)), where=votes > 0)
    return scaled(space, np.clip(x, low, high), limits, upper=upper)


def _targets(
    space: WidthSpace, densities: Mapping[str, float], upper: float
) -> Iterator[tuple[float, float, list[int]]]:
    """Yield (parameters left, logarithm of the density, families) of every block of the tensors named."""
    for name, density in densities.items():
        if name not in space.positions:
            raise unknown("weight tensor", name, space.positions)
        if not 0 <= density <= upper**2 or math.isinf(density):
            raise InvalidValue(f"the density of {name!r} must lie in [0, {upper**2:g}], got {density!r}.")
        blocks = space.blocks(name)
        target = max(density, 1 / sum(entries for entries, _ in blocks))
        for entries, families in blocks:
            yield entries * target, math.log(target), families


def scaled(space: WidthSpace, x: Vector, limits: Sequence[Limit], *, upper: float = 1.0) -> Vector:
    """Return `x` plus one number, cut to the possible widths, so that the first limit is just met.

    With x = 0 these are the uniform widths under the limits.

    Raises:
        Infeasible: one unit per family costs more than a limit.
    """
    low, high = _box(space, upper)
    _check_floor(space, limits, low)
    down, up = float((low - x).min()), float((high - x).max())
    for _ in range(100):
        middle = (down + up) / 2
        fits = all(limit.terms.cost(np.clip(x + middle, low, high)) <= limit.limit for limit in limits)
        down, up = (middle, up) if fits else (down, middle)
    full = np.clip(x + up, low, high)
    return full if all(limit.terms.cost(full) <= limit.limit for limit in limits) else np.clip(x + down, low, high)


def whole_widths(space: WidthSpace, x: Vector, limits: Sequence[Limit], *, upper: float = 1.0) -> list[int]:
    """Return whole widths: floors, then unit by unit where it costs least, never beyond a limit.

    Families below the ceiling of their exact width are served first, then those at most one unit above it, and so on,
    until no unit of any family fits. The cost of a unit is the largest share of what a limit has left that it takes;
    ties go to the earlier family.

    Args:
        space, limits, upper: as in `best_widths`.
        x: log multipliers that respect the limits.
    """
    sizes = np.asarray(space.sizes, dtype=np.float64)
    exact = np.exp(x) * sizes
    widths = np.maximum(1, np.floor(exact + 1e-6))
    room = [limit.limit - space.count(limit.terms, widths.tolist()) for limit in limits]
    ceiling = np.ceil(exact - 1e-6)
    while True:
        costs = [_next_costs(limit.terms, widths, sizes) for limit in limits]
        fits = np.all([cost <= left for cost, left in zip(costs, room, strict=True)], axis=0) & (widths < upper * sizes)
        if not fits.any():
            return [int(w) for w in widths]
        offered = fits & (widths < ceiling)
        if not offered.any():
            ceiling = ceiling + 1
            continue
        price = np.max([cost / max(left, 1.0) for cost, left in zip(costs, room, strict=True)], axis=0)
        if math.isinf(upper) and float(price[fits].min()) == 0.0:
            raise InvalidValue(f"no limit bounds the width of {space.families[int(np.argmin(price))]!r}.")
        chosen = int(np.argmin(np.where(offered, price, np.inf)))
        room = [left - float(cost[chosen]) for left, cost in zip(room, costs, strict=True)]
        widths[chosen] += 1


def _next_costs(terms: Terms, widths: Vector, sizes: Vector) -> Vector:
    """Return what one more unit of each family costs, whole numbers of shape (T,)."""
    parts = terms.coefficients * np.exp(terms.exponents @ np.log(widths / sizes))
    return np.round(parts @ ((1 + 1 / widths) ** terms.exponents - 1))


def _box(space: WidthSpace, upper: float) -> tuple[Vector, Vector]:
    """Return the logarithms of the smallest (one unit) and the largest multipliers."""
    low = -np.log(np.asarray(space.sizes, dtype=np.float64))
    return low, np.full(len(low), math.log(upper) if math.isfinite(upper) else 50.0)


def _check_floor(space: WidthSpace, limits: Sequence[Limit], low: Vector) -> None:
    if not space.families:
        raise Infeasible("no width of this network can change, so no budget can be met by widths.")
    for limit in limits:
        least = limit.terms.cost(low)
        if round(least) > limit.limit:
            raise Infeasible(
                f"with a single unit in every family the network still has {round(least)} {limit.name}, more than the "
                f"{limit.limit:g} allowed; raise the budget."
            )


def _minimise(quadratic: Vector, linear: Vector, limits: Sequence[Limit], low: Vector, high: Vector) -> Vector:
    """Return the minimum of x^T Q x / 2 - c^T x with log cost_b(x) <= log limit_b and low <= x <= high.

    Newton's method on logarithmic barriers (Boyd and Vandenberghe, Convex Optimization, 2004, section 11.3).
    """
    free = high - low > 1e-9
    x = np.where(free, low, (low + high) / 2)
    step = np.where(free, np.minimum(high - low, 4.0) / 2, 0.0)

    def slack(v: Vector) -> Vector:
        over = [math.log(b.limit) - math.log(b.terms.cost(v)) for b in limits]
        return np.concatenate([np.array(over), (high - v)[free], (v - low)[free]])

    while step.max(initial=0.0) > 1e-12 and not (slack(x + step) > 0).all():
        step = step / 2
    x = x + step
    if not (slack(x) > 0).all():
        return x - step  # the limit leaves nothing but one unit each

    def value(v: Vector, weight: float) -> float:
        left = slack(v)
        if not (left > 0).all():
            return math.inf
        return weight * float(v @ quadratic @ v / 2 - linear @ v) - float(np.log(left).sum())

    weight, constraints = 1.0, len(slack(x))
    while constraints / weight > 1e-9:
        for _ in range(100):
            gradient = weight * (quadratic @ x - linear) + 1 / (high - x + ~free) - 1 / (x - low + ~free)
            hessian = weight * quadratic + np.diag(1 / (high - x + ~free) ** 2 + 1 / (x - low + ~free) ** 2)
            for limit in limits:
                logarithm, slope, curve = limit.terms.log_sum(x)
                left = math.log(limit.limit) - logarithm
                gradient = gradient + slope / left
                hessian = hessian + curve / left + np.outer(slope, slope) / left**2
            gradient, move = np.where(free, gradient, 0.0), np.zeros(len(x))
            move[free] = -np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
            decrease = float(-gradient @ move)
            if decrease < 1e-10:
                break
            now, length = value(x, weight), 1.0
            while value(x + length * move, weight) > now - 0.1 * length * decrease and length > 1e-12:
                length /= 2
            if length <= 1e-12:
                break
            x = x + length * move
        weight *= 10
    return x
