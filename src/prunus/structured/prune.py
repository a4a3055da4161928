"""Structured pruning in one call: couple axes, score units, spend a budget, cut, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from prunus.errors import InvalidValue, NothingPrunable, did_you_mean
from prunus.evidence import Loss
from prunus.files import write_atomic
from prunus.graph.couple import Coupling, Family, couple
from prunus.graph.edit import stored_tensors
from prunus.graph.fit import EXACT
from prunus.graph.plan import Plan
from prunus.graph.record import arguments, record
from prunus.parameters import check_finite, unwrap
from prunus.structured.importance import unit_scores
from prunus.structured.report import StructuredReport, gain, sizes, timed
from prunus.structured.saved import pack_small
from prunus.structured.select import Kept, Limits, by_share, check_share, to_target


@dataclass(frozen=True)
class SmallModel:
    """What structured pruning returns.

    Attributes:
        model: the model, really smaller; an ordinary module of the user's own class.
        plan: the cut as data; `plan.apply(fresh)` repeats it, `plan.verify(model, x)` proves it on the dense model.
        report: dense against small, what was left whole and why.
    """

    model: nn.Module
    plan: Plan
    report: StructuredReport

    def save(self, path: Path | str) -> None:
        """Write plan and weights to one safetensors file; `prunus.load(path, FreshInstance())` rebuilds the model.

        Raises:
            StorageFailed: the file cannot be written; an older one there is unchanged.
        """
        write_atomic(Path(path), pack_small(self.model, self.plan))


def offered(coupling: Coupling, unit: str, protect: Sequence[str] = ()) -> tuple[list[Family], frozenset[str]]:
    """Return the families that a unit offers, and the names of those that `protect` (shell patterns) leaves whole.

    Raises:
        NothingPrunable: there is none; the message says what stands in the way.
        InvalidValue: a pattern matches no tensor of any family.
    """
    families = list(coupling.primary())
    if unit == "head":
        families = [f for f in families if f.kind == "head"]
    if not families:
        reasons = "; ".join(f"{n}: {r}" for n, r in list(coupling.unprunable.items())[:4]) or "no axis can be cut"
        raise NothingPrunable(f"no {unit} of this model can be removed. {reasons}.")
    protected = set()
    for pattern in protect:
        hit = {f.name for f in families if any(fnmatchcase(s.tensor, pattern) for s in f.slots)}
        if not hit:
            known = {s.tensor for f in families for s in f.slots}
            raise InvalidValue(f"pattern {pattern!r} matches no tensor that can be cut.{did_you_mean(pattern, known)}")
        protected |= hit
    return families, frozenset(protected)


# Where norm axes stay whole, half of the channels must still take at least this share of the half with them.
_ENOUGH = 0.8


def coupled(
    model: nn.Module, example: Any, unit: str, protect: Sequence[str], norms: str, share: float | None
) -> tuple[Coupling, list[Family], frozenset[str]]:
    """Return (coupling, families offered, names of protected ones); `norms` as for `couple`, or "auto".

    "auto" leaves axes of norms whole, which costs nothing at run time, unless that would leave so little to cut that
    removing `share` (default a half) of the channels removes less than 0.8 of that share of the arithmetic.
    """
    graph = record(model, example)
    if norms != "auto":
        coupling = couple(graph, norms=norms)
        return coupling, *offered(coupling, unit, protect)
    part = 0.5 if share is None or not 0 < share < 1 else share
    whole = couple(graph)
    try:
        families, protected = offered(whole, unit, protect)
    except (NothingPrunable, InvalidValue):
        coupling = couple(graph, norms="counted")
        return coupling, *offered(coupling, unit, protect)
    keep = {}
    for family in families:
        keep[family.name] = _mask(family.size, range(max(1, family.size - round(part * family.size))))
    if unit != "channel" or 1 - whole.macs(keep) / max(whole.macs(), 1) >= _ENOUGH * part:
        return whole, families, protected
    coupling = couple(graph, norms="counted")
    more, protected_more = offered(coupling, unit, protect)
    if len(more) <= len(families) and sum(f.size for f in more) <= sum(f.size for f in families):
        return whole, families, protected
    return coupling, more, protected_more


def prune_structured(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    example: Any,
    unit: str = "channel",
    score: str = "magnitude",
    pool: str = "sum",
    normalise: str = "mean",
    scope: str = "local",
    macs: float | int | None = None,
    params: float | int | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    minimum: int | float = 1,
    round_to: int = 1,
    protect: Sequence[str] | str = (),
    norms: str = "auto",
    seed: int = 0,
    train_mode: bool = False,
    inplace: bool = False,
    measure: bool = True,
    verify: bool = True,
) -> SmallModel:
    """Remove channels or heads; arguments, defaults and errors are those of `prunus.prune`."""
    given = {"sparsity": sparsity, "macs": macs, "params": params}
    if sum(v is not None for v in given.values()) != 1:
        raise InvalidValue(
            f"give exactly one of {', '.join(given)}; got {[k for k, v in given.items() if v is not None]}."
        )
    protect = (protect,) if isinstance(protect, str) else tuple(protect)
    start = time.perf_counter()
    bare = unwrap(model)
    check_finite(stored_tensors(bare) if not _meta(bare) else {}, "weight")
    coupling, families, protected = coupled(bare, example, unit, protect, norms, sparsity)
    limits = Limits(minimum, round_to, protected)
    scores = unit_scores(
        bare, families, score, pool=pool, normalise=normalise, data=data, loss=loss, seed=seed, train_mode=train_mode
    )

    def chosen(possible: Sequence[Family]) -> Kept:
        if sparsity is not None:
            return by_share(possible, scores, check_share("sparsity", sparsity), limits, scope)
        what, cost = ("macs", coupling.macs) if macs is not None else ("params", coupling.parameters)
        target = as_amount(what, given[what], cost({}))  # type: ignore[arg-type]
        return to_target(possible, scores, cost, target, limits, scope, what=what)

    plan = Plan.from_keep(coupling, chosen(families))
    if plan.blocked and sparsity is None:
        # What was blocked stays whole, so the others are chosen again to reach the target.
        left = [f for f in families if f.name not in plan.blocked]
        again = Plan.from_keep(coupling, chosen(left))
        plan = again.with_blocked(plan.blocked)
    difference = None
    if verify and not _meta(bare):
        difference, plan = proved(coupling, plan, bare, example, exact=norms != "anew")
    dense_parameters, dense_size = sizes(bare)
    small = plan.apply(bare, inplace=inplace)
    seconds = time.perf_counter() - start
    dense_ms = small_ms = ratio = None
    if measure and not _meta(bare):
        dense_ms, small_ms, ratio = timed(None if inplace else bare, small, _call_form(example))
    parameters, size = sizes(small)
    rows = _examples(example)
    keep = {name: _mask(coupling[name].size, kept) for name, kept in plan.families.items()}
    before, after = coupling.macs({}) // rows, coupling.macs(keep) // rows
    table: tuple[dict[str, Any], ...] = tuple(
        {"name": f.name, "kind": f.kind, "size": f.size, "kept": len(plan.families.get(f.name, range(f.size)))}
        for f in families
    )
    report = StructuredReport(
        unit=unit,
        units=sum(f.size for f in families),
        units_kept=sum(row["kept"] for row in table),
        parameters=dense_parameters,
        parameters_kept=parameters,
        macs=before,
        macs_kept=after,
        dense_bytes=dense_size,
        bytes=size,
        latency_ms=small_ms,
        dense_latency_ms=dense_ms,
        latency_ratio=ratio,
        difference=difference,
        families=table,
        blocked=dict(plan.blocked),
        unprunable=coupling.unprunable,
        without_rule=coupling.without_rule,
        notes=tuple(coupling.graph.notes),
        seconds=seconds,
        sentence=gain(before, after, ratio, dense_size, size),
    )
    return SmallModel(small, plan, report)


def proved(coupling: Coupling, plan: Plan, model: nn.Module, example: Any, *, exact: bool) -> tuple[float, Plan]:
    """Return (difference of removed and masked, plan) of a cut of `model`, see `rolled_back`."""
    return rolled_back(coupling, plan, lambda part: part.verify(model, example), exact=exact)


def rolled_back(
    coupling: Coupling, plan: Plan, verify: Callable[[Plan], float], *, exact: bool
) -> tuple[float, Plan]:
    """Return (difference of removed and masked, plan); families whose removal changes the outputs are rolled back.

    Halves of the families are tried until the guilty ones are found; each is named in `Plan.blocked`. `verify` returns
    the relative difference of one plan.
    """
    worst = verify(plan)
    if worst <= EXACT or not exact:
        return worst, plan
    guilty: list[str] = []

    def search(names: list[str]) -> None:
        part = Plan.from_keep(coupling, {n: _mask(coupling[n].size, plan.families[n]) for n in names})
        if verify(part) <= EXACT:
            return
        if len(names) == 1:
            guilty.extend(names)
            return
        search(names[: len(names) // 2])
        search(names[len(names) // 2 :])

    search(list(plan.families))
    innocent = [n for n in plan.families if n not in guilty]
    rest = Plan.from_keep(coupling, {n: _mask(coupling[n].size, plan.families[n]) for n in innocent})
    reason = f"removing it differs from masking it by {worst:.1e} relative"
    rest = rest.with_blocked(plan.blocked | dict.fromkeys(guilty, reason))
    remaining = verify(rest)
    if remaining > EXACT:
        every = plan.blocked | dict.fromkeys(plan.families, reason)
        return 0.0, Plan.from_keep(coupling, {}).with_blocked(every)
    return remaining, rest


def as_amount(name: str, value: float | int, whole: float) -> float:
    """Return a target: a share of `whole` when below 1, else the amount itself.

    Raises:
        InvalidValue: zero, negative, NaN, text, or more than there is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= max(whole, 1):
        raise InvalidValue(
            f"{name} {value!r} must be a share in (0, 1], or an amount up to {whole:,.6g}, which the model has now."
        )
    return value * whole if value <= 1 and not (isinstance(value, int) and whole > 1) else float(value)


def _mask(size: int, kept: Sequence[int]) -> Any:
    import numpy as np

    return np.isin(np.arange(size), np.asarray(kept, dtype=np.int64))


def _meta(model: nn.Module) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def _call_form(example: Any) -> Any:
    args, kwargs = arguments(example)
    return kwargs if kwargs and not args else args


def _examples(example: Any) -> int:
    args, kwargs = arguments(example)
    first = next((a for a in (*args, *kwargs.values()) if hasattr(a, "shape") and len(a.shape)), None)
    return max(1, int(first.shape[0])) if first is not None else 1
