"""Spend a structured budget: which units stay, by share, multiply-accumulates, parameters or any measured cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prunus.errors import Infeasible, InvalidValue
from prunus.graph.couple import Family

Kept = dict[str, Tensor]
SCOPES = ("local", "global", "isomorphic")


@dataclass(frozen=True)
class Limits:
    """What a cut must respect.

    Attributes:
        minimum: fewest units that stay in a family: a count, or a share in (0, 1).
        round_to: kept units are a multiple of this where the family is at least as large.
        protected: families that stay whole.
    """

    minimum: int | float = 1
    round_to: int = 1
    protected: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise InvalidValue(f"round_to {self.round_to!r} must be a whole number from 1 up.")
        if (
            isinstance(self.minimum, bool)
            or not isinstance(self.minimum, int | float)
            or not self.minimum > 0
            or (isinstance(self.minimum, float) and self.minimum > 1)
        ):
            raise InvalidValue(f"minimum {self.minimum!r} must be a count from 1 up, or a share in (0, 1].")

    def floor(self, family: Family) -> int:
        """Return the fewest units of a family that may stay."""
        if family.name in self.protected:
            return family.size
        least = int(np.ceil(self.minimum * family.size)) if isinstance(self.minimum, float) else int(self.minimum)
        return self.rounded(family, max(1, min(least, family.size)), up=True)

    def rounded(self, family: Family, count: int, *, up: bool = False) -> int:
        """Return `count` as a multiple of `round_to`, at least one multiple, at most the family."""
        if self.round_to == 1 or family.size < self.round_to:
            return count
        multiple = -(-count // self.round_to) if up else count // self.round_to
        return min(max(multiple, 1) * self.round_to, family.size)


def check_share(name: str, value: float) -> float:
    """Return a share in [0, 1), or raise `InvalidValue`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InvalidValue(f"{name} {value!r} must be a number in [0, 1).")
    return float(value)


def best(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest; equal scores keep the earlier unit."""
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[order[:count].cpu()] = True
    return keep


def by_share(
    families: Sequence[Family], scores: Mapping[str, Tensor], share: float, limits: Limits, scope: str
) -> Kept:
    """Return the units that stay when `share` of them goes.

    "local": the same share of every family. "global": the lowest scores of all families go, as many units as `share`
    of them all. "isomorphic": families of the same form (kind, roles and axes of their slots) compete among themselves.
    Floors and protected families hold in every scope; equal scores keep the earlier family and unit.
    """
    check_share("sparsity", share)
    if scope not in SCOPES:
        raise InvalidValue(f"scope {scope!r} must be one of {', '.join(SCOPES)}.")
    if scope == "local":
        return {
            f.name: best(scores[f.name], max(limits.floor(f), limits.rounded(f, f.size - round(share * f.size))))
            for f in families
        }
    groups: dict[object, list[Family]] = {}
    for family in families:
        groups.setdefault(form(family) if scope == "isomorphic" else None, []).append(family)
    result: Kept = {}
    for group in groups.values():
        result |= _together(group, scores, share, limits)
    return {f.name: result[f.name] for f in families}


def form(family: Family) -> tuple[object, ...]:
    """Return what makes families isomorphic: kind, and the role and rank of each slot."""
    return (family.kind, tuple(sorted((s.role, len(s.shape), s.axis, s.index.shape[1]) for s in family.slots)))


def _together(families: Sequence[Family], scores: Mapping[str, Tensor], share: float, limits: Limits) -> Kept:
    total = sum(f.size for f in families)
    quota = round(share * total)
    floors = {f.name: limits.floor(f) for f in families}
    # Within a family the best `floor` units are out of the competition.
    entries = []
    for number, family in enumerate(families):
        order = scores[family.name].argsort(descending=True, stable=True).cpu()
        losers = order[floors[family.name] :]
        values = scores[family.name].cpu()[losers].double()
        entries += [(float(v), -number, -int(u)) for v, u in zip(values, losers, strict=True)]
    entries.sort()
    gone: dict[int, int] = {}
    for _, number, _ in entries[:quota]:
        gone[-number] = gone.get(-number, 0) + 1
    return {
        f.name: best(scores[f.name], max(floors[f.name], limits.rounded(f, f.size - gone.get(number, 0))))
        for number, f in enumerate(families)
    }


def to_target(
    families: Sequence[Family],
    scores: Mapping[str, Tensor],
    cost: Callable[[Kept], float],
    target: float,
    limits: Limits,
    scope: str,
    *,
    what: str,
) -> Kept:
    """Return the units that stay so that `cost` of them is as close below `target` as single units allow.

    The share that goes is found by bisection (cost falls as the share rises); then units come back one by one, best
    score first, wherever the target still holds.

    Raises:
        Infeasible: even the floors cost more than the target.
    """
    smallest = {f.name: best(scores[f.name], limits.floor(f)) for f in families}
    least = cost(smallest)
    if least > target:
        raise Infeasible(
            f"{what} {target:,.6g} cannot be reached: with every family at its floor {least:,.6g} remain. Ask for "
            "less, lower `minimum` or `round_to`, or protect fewer layers."
        )
    low, high, kept = 0.0, 1.0, smallest
    everything = by_share(families, scores, 0.0, limits, scope)
    if cost(everything) <= target:
        return everything
    units = sum(f.size for f in families)
    for _ in range(int(np.ceil(np.log2(max(units, 2)))) + 2):
        middle = (low + high) / 2
        trial = by_share(families, scores, middle, limits, scope)
        if cost(trial) <= target:
            high, kept = middle, trial
        else:
            low = middle
    return _refilled(families, scores, kept, cost, target, limits)


def _refilled(
    families: Sequence[Family],
    scores: Mapping[str, Tensor],
    kept: Kept,
    cost: Callable[[Kept], float],
    target: float,
    limits: Limits,
) -> Kept:
    """Give units back, the best removed one of any family first, until none fits."""
    step = limits.round_to
    closed: set[str] = set()
    kept = dict(kept)
    while True:
        candidates = []
        for number, family in enumerate(families):
            missing = ~kept[family.name]
            count = step if family.size >= step else 1
            if family.name in closed or int(missing.sum()) < count:
                continue
            candidates.append((float(scores[family.name].cpu()[missing].max()), -number, family, count))
        if not candidates:
            return kept
        _, _, family, count = max(candidates, key=lambda c: c[:2])
        trial = dict(kept)
        trial[family.name] = best(scores[family.name], int(kept[family.name].sum()) + count)
        if cost(trial) <= target:
            kept = trial
        else:
            closed.add(family.name)
