"""How a budget is divided over layers before any weight is looked at: densities from shapes alone.

Pure functions from tensor shapes to densities, and one that turns densities into counts with an exact total.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from prunus.errors import Infeasible, InvalidValue

Shape = Sequence[int]


def fit_counts(
    wanted: Sequence[float], capacity: Sequence[int], total: int, minimum: Sequence[int] | None = None
) -> list[int]:
    """Return whole counts with an exact sum, as near to `wanted` as the limits allow.

    Where a wish lies outside [minimum, capacity] it is clipped and the others are scaled by one common factor to
    make up for it; fractions are rounded by largest remainder, ties to the earlier layer.

    Raises:
        Infeasible: `total` is below the sum of minima or above the sum of capacities.
    """
    low = [min(m, c) for m, c in zip(minimum or [0] * len(wanted), capacity, strict=True)]
    if total > sum(capacity):
        raise Infeasible(f"cannot keep {total} entries: only {sum(capacity)} are left; lower the density.")
    if total < sum(low):
        raise Infeasible(
            f"a budget of {total} entries is below the {sum(low)} that the per-layer minimum asks for; "
            "lower the minimum or the sparsity."
        )

    def clipped(factor: float) -> list[float]:
        return [min(max(factor * w, lo), c) for w, lo, c in zip(wanted, low, capacity, strict=True)]

    exact = clipped(1.0)
    if abs(sum(exact) - total) > 1e-6 * max(total, 1):
        lower, upper = 0.0, 1.0
        while sum(clipped(upper)) < total and upper < 1e18:
            upper *= 2.0
        for _ in range(200):
            middle = (lower + upper) / 2
            lower, upper = (middle, upper) if sum(clipped(middle)) < total else (lower, middle)
        exact = clipped(upper)
    counts = [math.floor(x + 1e-9) for x in exact]
    rest = [(-(x - c), i) for i, (x, c) in enumerate(zip(exact, counts, strict=True))]
    while sum(counts) < total:  # wishes of zero leave room that the remainders alone may not fill
        for _, i in sorted(rest):
            if sum(counts) < total and counts[i] < capacity[i]:
                counts[i] += 1
    for _, i in sorted(rest, reverse=True):
        if sum(counts) > total and counts[i] > low[i]:
            counts[i] -= 1
    return counts


def _numel(shape: Shape) -> int:
    return math.prod(shape)


def proportional_densities(
    raw: Sequence[float], sizes: Sequence[int], density: float, dense: Sequence[bool] | None = None
) -> list[float]:
    """Return densities eps * raw_l with sum(density_l * size_l) = density * sum(size_l), none above 1.

    Layers that would exceed 1 are made dense and eps is solved again until none does (the rule that SET, RigL and
    their successors share): eps = [d * sum_sparse n - (1 - d) * sum_dense n] / sum_sparse raw * n.
    """
    fixed = list(dense) if dense is not None else [False] * len(raw)
    while True:
        free = [i for i, f in enumerate(fixed) if not f]
        budget = density * sum(sizes) - sum(n for n, f in zip(sizes, fixed, strict=True) if f)
        if not free:
            return [1.0] * len(raw)
        if budget < 0:
            raise Infeasible(
                f"density {density:g} is less than the layers kept dense need; keep fewer"
                " layers dense or lower the sparsity."
            )
        epsilon = budget / sum(raw[i] * sizes[i] for i in free)
        worst = max(epsilon * raw[i] for i in free)
        if worst <= 1.0 + 1e-12:
            return [1.0 if f else epsilon * r for r, f in zip(raw, fixed, strict=True)]
        # Every layer at the maximum goes dense at once; only exact ties differ from one at a time, and not in the end.
        fixed = [f or (epsilon * r >= worst * (1 - 1e-12)) for r, f in zip(raw, fixed, strict=True)]


def uniform(shapes: Sequence[Shape], density: float) -> list[float]:
    """Return the same density for every layer."""
    return [density] * len(shapes)


def uniform_plus(shapes: Sequence[Shape], density: float, last: float = 0.2) -> list[float]:
    """Return uniform densities with the first layer dense and the last at least `last` dense.

    Source: Gale et al., 2019 ("The State of Sparsity"). The remaining budget is divided by the size of the
    remaining layers, so the total is met.

    Raises:
        Infeasible: first and last layer alone exceed the budget.
    """
    sizes = [_numel(s) for s in shapes]
    if len(shapes) == 1:
        return [density]
    total = density * sum(sizes)
    share = (total - sizes[0]) / sum(sizes[1:])
    if share >= last:
        return [1.0, *[share] * (len(shapes) - 1)]
    # The dense first layer can push the common share below `last` even where the density is above it.
    left = total - sizes[0] - last * sizes[-1]
    if left < 0:
        raise Infeasible(
            f"uniform-plus at density {density:g} needs {total - left:.0f} of {total:.0f} entries for the first and "
            "last layer alone; use 'uniform' or 'erk'."
        )
    return [1.0, *[left / sum(sizes[1:-1])] * (len(shapes) - 2), last]


def erdos_renyi(shapes: Sequence[Shape], density: float, *, kernel: bool = True, power: float = 1.0) -> list[float]:
    """Return Erdos-Renyi densities: raw_l = sum(dims)/prod(dims), all dims with `kernel`, else outputs and inputs only.

    Source: SET (Mocanu et al., Nature Communications 2018) for ER, RigL (Evci et al., ICML 2020) for ERK. `power`
    bends between uniform (0) and ER(K) (1).
    """
    raw = []
    for shape in shapes:
        dims = list(shape) if kernel else list(shape[:2])
        raw.append((sum(dims) / math.prod(dims)) ** power)
    return proportional_densities(raw, [_numel(s) for s in shapes], density)


def erdos_renyi_plus(shapes: Sequence[Shape], density: float, last: float = 1.0) -> list[float]:
    """Return ERK densities with the last layer (classifier) fixed at `last` and taken out of the budget first.

    Source: Liu et al., ICLR 2022 (ERK+): d' = (d * total - last * n_last) / (total - n_last).
    """
    if len(shapes) == 1:
        return [density]
    sizes = [_numel(s) for s in shapes]
    rest = sum(sizes[:-1])
    left = density * sum(sizes) - last * sizes[-1]
    if left < 0:
        raise Infeasible(
            f"erk-plus keeps {last:g} of the last layer, more than density {density:g} allows; lower `last`."
        )
    return [*erdos_renyi(shapes[:-1], min(1.0, left / rest)), last]


def smart_ratio(shapes: Sequence[Shape], density: float, last: float = 0.3) -> list[float]:
    """Return densities that fall towards the output: layer l of n gets (n-l+1)^2 + (n-l+1), the last one `last`.

    Source: Su et al., NeurIPS 2020 ("Sanity-Checking Pruning Methods"). Shares above 1 are clipped and passed on.
    """
    n = len(shapes)
    if n == 1:
        return [density]
    sizes = [_numel(s) for s in shapes]
    last = min(last, density * sum(sizes) / sizes[-1])
    raw = [float((n - l) ** 2 + (n - l)) for l in range(n - 1)]
    left = (density * sum(sizes) - last * sizes[-1]) / sum(sizes[:-1])
    return [*proportional_densities(raw, sizes[:-1], min(1.0, max(0.0, left))), last]


def check_fraction(name: str, value: float, *, one_allowed: bool = True) -> float:
    """Return `value` as a float in [0, 1] (or [0, 1)), or raise `InvalidValue` with the remedy."""
    if isinstance(value, str):
        hint = ""
        text = value.strip()
        if text.endswith("%"):
            try:
                hint = f" Write {float(text[:-1]) / 100:g} instead of {value!r}."
            except ValueError:
                hint = ""
        raise InvalidValue(f"{name} must be a number between 0 and 1, not the text {value!r}.{hint}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidValue(f"{name} must be a number between 0 and 1, not {value!r}.")
    top = value <= 1.0 if one_allowed else value < 1.0
    if not (value >= 0.0 and top):
        hint = f" If you mean {value:g} %, write {value / 100:g}." if 1 <= value <= 100 and value != 1 else ""
        interval = "[0, 1]" if one_allowed else "[0, 1)"
        raise InvalidValue(f"{name} {value!r} is outside {interval}.{hint}")
    return float(value)
