"""Budgets: objects that hold the choice of how kept entries are divided, and choose the units that stay."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.budget import allocate
from prunus.budget.lamp import lamp
from prunus.budget.select import keep_best, keep_best_rows, keep_count, keep_top, keep_whole_units
from prunus.errors import Infeasible, InvalidValue, NonFinite, did_you_mean
from prunus.masks import Masks
from prunus.parameters import Address
from prunus.units import NM, Unit, Weight


@dataclass(frozen=True)
class Problem:
    """What a budget decides on.

    Attributes:
        addresses: layout of every prunable tensor, in model order.
        scores: element scores of each tensor's shape, -inf where already pruned.
        keep: how many elements may stay over all tensors.
        unit: what goes as one piece.
        ratio_scores: element scores of other criteria, for budgets that take their layer ratios from them.
        distortion: output distortion of the model under given masks, for rate-distortion budgets.
    """

    addresses: Mapping[str, Address]
    scores: Mapping[str, Tensor]
    keep: int
    unit: Unit = field(default_factory=Weight)
    ratio_scores: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    distortion: Callable[[Mapping[str, Tensor]], float] | None = None

    @property
    def sizes(self) -> list[int]:
        """Elements per tensor."""
        return [a.size for a in self.addresses.values()]

    @property
    def alive(self) -> list[int]:
        """Elements per tensor that are not pruned yet."""
        return [int(torch.count_nonzero(self.scores[n] > -math.inf)) for n in self.addresses]

    @property
    def density(self) -> float:
        """Share of all elements that may stay."""
        return self.keep / sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Base of all budgets: divides the kept elements over tensors, then keeps the best units of each.

    Subclasses define `densities` (from shapes), or `counts`, or `choose` itself.
    """

    @property
    def needs_scores(self) -> tuple[str, ...]:
        """Names of other scores whose layer ratios the budget takes."""
        return ()

    @property
    def needs_distortion(self) -> bool:
        """Whether the budget must run the model."""
        return False

    def densities(self, problem: Problem) -> list[float]:
        """Return the wished density of each tensor."""
        raise NotImplementedError

    def counts(self, problem: Problem) -> dict[str, int]:
        """Return how many elements of each tensor stay; the sum is exactly `problem.keep`."""
        sizes = problem.sizes
        wanted = [d * n for d, n in zip(self.densities(problem), sizes, strict=True)]
        counts = allocate.fit_counts(wanted, problem.alive, problem.keep)
        return dict(zip(problem.addresses, counts, strict=True))

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        """Return the bool element mask of every tensor."""
        if isinstance(problem.unit, NM):
            # A group with fewer than N weights left keeps those; the pattern does not bring pruned ones back.
            scores = problem.scores
            return {
                n: problem.unit.choose(scores[n], a) & (scores[n] > -math.inf) for n, a in problem.addresses.items()
            }
        counts = self.counts(problem)
        if isinstance(problem.unit, Weight):
            return {n: keep_best(problem.scores[n], counts[n]) for n in problem.addresses}
        masks = {}
        for name, address in problem.addresses.items():
            pooled = problem.unit.pool(problem.scores[name], address)
            kept = keep_whole_units({name: pooled}, {name: problem.unit.sizes(address)}, counts[name])
            masks[name] = problem.unit.spread(kept[name], address)
        return masks


@dataclass(frozen=True, kw_only=True)
class Uniform(Budget):
    """The same density in every tensor (to within one element, so that the total is exact)."""

    def densities(self, problem: Problem) -> list[float]:
        """Return the total density for each tensor."""
        return allocate.uniform([a.shape for a in problem.addresses.values()], problem.density)


@dataclass(frozen=True, kw_only=True)
class UniformPlus(Budget):
    """First tensor dense, last at least `last` dense, the rest uniform (Gale et al., 2019)."""

    last: float = 0.2

    def __post_init__(self) -> None:
        allocate.check_fraction("last", self.last)

    def densities(self, problem: Problem) -> list[float]:
        """Return the densities of `allocate.uniform_plus`."""
        return allocate.uniform_plus([a.shape for a in problem.addresses.values()], problem.density, self.last)


@dataclass(frozen=True, kw_only=True)
class UniformFloor(Budget):
    """Uniform until the density falls to `last`; from there the last tensor stays at `last` and the others share.

    The rule of gradual uniform pruning in Liu et al., NeurIPS 2021: s' = 1 - (P (1 - s) - last P_last)/(P - P_last).
    """

    last: float = 0.2

    def __post_init__(self) -> None:
        allocate.check_fraction("last", self.last)

    def densities(self, problem: Problem) -> list[float]:
        """Return the density of each tensor."""
        sizes, density = problem.sizes, problem.density
        if density > self.last or len(sizes) == 1:
            return [density] * len(sizes)
        rest = (density * sum(sizes) - self.last * sizes[-1]) / sum(sizes[:-1])
        if rest < 0:
            raise Infeasible(f"keeping {self.last:g} of the last tensor exceeds the whole budget; lower `last`.")
        return [*[rest] * (len(sizes) - 1), self.last]


@dataclass(frozen=True, kw_only=True)
class ER(Budget):
    """Erdos-Renyi densities from outputs and inputs only (Mocanu et al., 2018)."""

    power: float = 1.0

    def densities(self, problem: Problem) -> list[float]:
        """Return the densities of `allocate.erdos_renyi` without kernel dims."""
        shapes = [a.shape for a in problem.addresses.values()]
        return allocate.erdos_renyi(shapes, problem.density, kernel=False, power=self.power)


@dataclass(frozen=True, kw_only=True)
class ERK(Budget):
    """Erdos-Renyi-kernel densities (Evci et al., ICML 2020)."""

    power: float = 1.0

    def densities(self, problem: Problem) -> list[float]:
        """Return the densities of `allocate.erdos_renyi`."""
        return allocate.erdos_renyi([a.shape for a in problem.addresses.values()], problem.density, power=self.power)


@dataclass(frozen=True, kw_only=True)
class ERKPlus(Budget):
    """ERK with the last tensor fixed at density `last` (Liu et al., ICLR 2022)."""

    last: float = 1.0

    def __post_init__(self) -> None:
        allocate.check_fraction("last", self.last)

    def densities(self, problem: Problem) -> list[float]:
        """Return the densities of `allocate.erdos_renyi_plus`."""
        return allocate.erdos_renyi_plus([a.shape for a in problem.addresses.values()], problem.density, self.last)


@dataclass(frozen=True, kw_only=True)
class SmartRatio(Budget):
    """Densities that fall towards the output, last tensor at `last` (Su et al., NeurIPS 2020)."""

    last: float = 0.3

    def __post_init__(self) -> None:
        allocate.check_fraction("last", self.last)

    def densities(self, problem: Problem) -> list[float]:
        """Return the densities of `allocate.smart_ratio`."""
        return allocate.smart_ratio([a.shape for a in problem.addresses.values()], problem.density, self.last)


@dataclass(frozen=True, kw_only=True)
class Global(Budget):
    """One ranking over all tensors, with an optional minimum per tensor against layer collapse.

    With a minimum of M, the M best of every tensor (all of a smaller one) stay first and the rest of the budget
    goes to the best of the others: the exact maximum of kept score under the constraint. Source of the minimum
    threshold: Gupta et al., 2022 (global magnitude pruning with MT).

    Attributes:
        minimum: M, in elements per tensor.
        minimum_share: M as a share of ALL prunable elements of the net (0.0005 = 0.05 %); the larger one counts.
    """

    minimum: int = 0
    minimum_share: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.minimum, bool) or not isinstance(self.minimum, int) or self.minimum < 0:
            raise InvalidValue(f"minimum {self.minimum!r} must be a whole number of entries per tensor, from 0 up.")
        allocate.check_fraction("minimum_share", self.minimum_share)

    def _normalised(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(scores)

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        """Return the masks of one common ranking."""
        if isinstance(problem.unit, NM):
            return super().choose(problem)
        scores = self._normalised(problem.scores)
        floor = max(self.minimum, int(self.minimum_share * sum(problem.sizes) + 1e-9))
        if not isinstance(problem.unit, Weight):
            if floor:
                raise InvalidValue(f"a per-tensor minimum counts weights and cannot be used with unit {problem.unit}.")
            pooled = {n: problem.unit.pool(scores[n], a) for n, a in problem.addresses.items()}
            sizes = {n: problem.unit.sizes(a) for n, a in problem.addresses.items()}
            kept = keep_whole_units(pooled, sizes, problem.keep)
            return {n: problem.unit.spread(kept[n], a) for n, a in problem.addresses.items()}
        if not floor:
            return keep_top(scores, problem.keep)
        alive = problem.alive
        first = {n: min(floor, k) for n, k in zip(scores, alive, strict=True)}
        spent = sum(first.values())
        if spent > problem.keep:
            raise Infeasible(
                f"a minimum of {floor} entries in each of {len(first)} tensors needs {spent}, but the budget is "
                f"{problem.keep}; lower the minimum or the sparsity."
            )
        sure = {n: keep_best(s, first[n]) for n, s in scores.items()}
        others = {n: s.masked_fill(sure[n], -math.inf) for n, s in scores.items()}
        extra = keep_top(others, problem.keep - spent)
        return {n: sure[n] | extra[n] for n in scores}

    def counts(self, problem: Problem) -> dict[str, int]:
        """Return how many elements of each tensor the common ranking keeps."""
        return {n: int(torch.count_nonzero(m)) for n, m in self.choose(problem).items()}


@dataclass(frozen=True, kw_only=True)
class LAMP(Global):
    """One ranking of LAMP-normalised scores: layer-adaptive without a hyper-parameter (Lee et al., ICLR 2021)."""

    def _normalised(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, score in scores.items():
            if bool(((score < 0) & (score > -math.inf)).any()):
                raise InvalidValue(f"LAMP needs non-negative scores, but the score of {name!r} has negative ones.")
        return {n: lamp(s) for n, s in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Like(Budget):
    """The layer ratios that another score would give in one global ranking; its positions are thrown away.

    "SNIP ratio" and "GraSP ratio" of Liu et al., ICLR 2022.
    """

    score: str = "snip"

    @property
    def needs_scores(self) -> tuple[str, ...]:
        """The other score."""
        return (self.score,)

    def densities(self, problem: Problem) -> list[float]:
        """Return the kept share of each tensor under the other score."""
        if self.score not in problem.ratio_scores:
            raise InvalidValue(f"ratios like {self.score!r} need that score; use prunus.prune(..., data=...).")
        kept = keep_top(problem.ratio_scores[self.score], problem.keep)
        return [int(torch.count_nonzero(kept[n])) / a.size for n, a in problem.addresses.items()]


@dataclass(frozen=True, kw_only=True)
class RowWise(Budget):
    """Weights compete only inside their own output row; each row drops round-down(sparsity * length).

    The comparison group of Wanda (Sun et al., ICLR 2024). The total is therefore the sum of row counts, which may
    exceed the asked count by less than one entry per row.
    """

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        """Return masks with equal counts in all rows of a tensor (N:M groups already lie inside rows)."""
        if isinstance(problem.unit, NM):
            return super().choose(problem)
        if not isinstance(problem.unit, Weight):
            raise InvalidValue(f"row-wise competition is between single weights, not units of {problem.unit}.")
        sparsity = 1.0 - problem.density
        masks = {}
        for name, address in problem.addresses.items():
            rows = address.rows(problem.scores[name])
            k = rows.shape[1] - int(sparsity * rows.shape[1] + 1e-9)
            masks[name] = address.unrows(keep_best_rows(rows, k)) & (problem.scores[name] > -math.inf)
        return masks

    def counts(self, problem: Problem) -> dict[str, int]:
        """Return how many elements of each tensor stay."""
        return {n: int(torch.count_nonzero(m)) for n, m in self.choose(problem).items()}


@dataclass(frozen=True, kw_only=True)
class Family(Budget):
    """A budget of its own for each module family; tensors compete only inside their family.

    Attributes:
        sparsities: shell pattern of parameter names -> sparsity; the first pattern that fits decides; tensors that
            none fits stay dense. Named sparsities stand in for the common one. Empty: families are the last words of
            module paths ("q_proj", "fc1", "input-hidden"...), all at the common density.
        within: the budget inside a family (or its name).
    """

    sparsities: Mapping[str, float] = field(default_factory=dict)
    within: Budget = field(default_factory=Global)

    def __post_init__(self) -> None:
        object.__setattr__(self, "within", budget(self.within))
        for pattern, sparsity in self.sparsities.items():
            allocate.check_fraction(f"sparsity of {pattern!r}", sparsity)

    @property
    def needs_scores(self) -> tuple[str, ...]:
        """What the budget inside a family needs."""
        return self.within.needs_scores

    @property
    def needs_distortion(self) -> bool:
        """What the budget inside a family needs."""
        return self.within.needs_distortion

    def _groups(self, problem: Problem) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name, address in problem.addresses.items():
            if self.sparsities:
                fits = [p for p in self.sparsities if fnmatch.fnmatchcase(name, p)]
                groups.setdefault(fits[0] if fits else "", []).append(name)
            else:
                groups.setdefault(address.family, []).append(name)
        for pattern in self.sparsities:
            if pattern not in groups:
                hint = did_you_mean(pattern, problem.addresses)
                raise InvalidValue(f"family pattern {pattern!r} matches no prunable tensor of its own.{hint}")
        return groups

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        """Return the masks of all families."""
        if isinstance(problem.unit, NM):
            return super().choose(problem)
        masks: dict[str, Tensor] = {}
        groups = self._groups(problem)
        for names, keep in zip(groups.values(), self._shares(problem, groups), strict=True):
            part = replace(
                problem,
                addresses={n: problem.addresses[n] for n in names},
                scores={n: problem.scores[n] for n in names},
                keep=keep,
                ratio_scores={s: {n: scores[n] for n in names} for s, scores in problem.ratio_scores.items()},
            )
            masks |= self.within.choose(part)
        return {n: masks[n] for n in problem.addresses}

    def _shares(self, problem: Problem, groups: Mapping[str, list[str]]) -> list[int]:
        """Return how many elements each family keeps."""
        sizes = [sum(problem.addresses[n].size for n in names) for names in groups.values()]
        left = dict(zip(problem.addresses, problem.alive, strict=True))
        alive = [sum(left[n] for n in names) for names in groups.values()]
        if not self.sparsities:
            return allocate.fit_counts([problem.density * n for n in sizes], alive, problem.keep)
        wanted = [keep_count(n, self.sparsities[family]) if family else n for family, n in zip(groups, sizes)]
        return [min(k, most) for k, most in zip(wanted, alive, strict=True)]

    def counts(self, problem: Problem) -> dict[str, int]:
        """Return how many elements of each tensor stay."""
        return {n: int(torch.count_nonzero(m)) for n, m in self.choose(problem).items()}


def budget(spec: Budget | str | Mapping[str, Any]) -> Budget:
    """Return the budget that `spec` names: a `Budget`, "erk", or {"name": "global", "minimum": 10}.

    Raises:
        UnknownName: unknown budget, or an option it does not have.
        InvalidValue: a mapping without a name.
    """
    from prunus.budget.registry import BUDGETS

    if isinstance(spec, Budget):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise InvalidValue(f"budget {spec!r} has no name; write {{'name': 'global', ...}}.")
    made = BUDGETS.build(options.pop("name"), **options)
    if not isinstance(made, Budget):
        raise InvalidValue(f"{spec!r} does not name a budget.")
    return made


def decide(problem: Problem, chosen: Budget) -> Masks:
    """Return the masks that `chosen` gives for `problem`: the sentence "score, budget, keep" in one call.

    Raises:
        NonFinite: a score is NaN or +inf.
        Infeasible: fewer entries are alive than the budget would keep.
    """
    for name, score in problem.scores.items():
        bad = int((torch.isnan(score) | torch.isposinf(score)).sum())
        if bad:
            raise NonFinite(f"the score of {name!r} has {bad} NaN or infinite values, so it cannot be ranked.")
    alive = sum(problem.alive)
    if problem.keep > alive and not isinstance(problem.unit, NM):
        raise Infeasible(
            f"cannot keep {problem.keep} entries: {alive} are left after earlier pruning; ask for more sparsity."
        )
    return Masks(chosen.choose(problem))
