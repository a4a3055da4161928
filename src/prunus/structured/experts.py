"""`unit="expert"`: experts of a mixture go, with their rows of the router."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from prunus.errors import Infeasible, InvalidValue, NothingPrunable, Unsupported, did_you_mean
from prunus.evidence import Loss
from prunus.graph.couple import Family
from prunus.graph.edit import stored_tensors
from prunus.graph.fit import EXACT
from prunus.graph.plan import Plan
from prunus.graph.record import arguments
from prunus.measure.cost import total_macs
from prunus.structured.importance import unit_scores
from prunus.structured.mixtures import Mixture, mixtures, plan_for
from prunus.structured.report import sizes
from prunus.structured.select import Kept, Limits, by_share, check_share, to_target
from prunus.structured.small import Facts, SmallModel, finished, without_numbers
from prunus.structured.target import Target
from prunus.structured.timing import ALL, Stopwatch, to_latency


def prune_experts(
    model: nn.Module,
    target: Target,
    *,
    example: Any,
    score: str = "magnitude",
    pool: str | None = None,
    normalise: str = "mean",
    scope: str = "local",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    minimum: int | float = 1,
    round_to: int = 1,
    protect: Sequence[str] = (),
    seed: int = 0,
    train_mode: bool = False,
    inplace: bool = False,
    measure: bool = True,
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> SmallModel:
    """Remove experts, lowest score first, until the target is met; never below the number that a token visits.

    The proof compares with the full model whose router gives the removed experts a logit of minus infinity.

    Args:
        model: untouched unless `inplace`.
        target: what may remain; not macs, which do not depend on how many experts there are to choose from.
        protect: shell patterns of tensors whose mixtures stay whole.
        example, score, pool, normalise, scope, data, loss, minimum, round_to, seed, train_mode, inplace, measure,
            verify, on_stage: as in `prunus.prune`.

    Raises:
        NothingPrunable: no mixture of experts was recognised; the message says why.
        Infeasible: the target needs fewer experts than a token visits.
        Unsupported: a target of macs, or a model on the meta device.
    """
    start = time.perf_counter()
    if without_numbers(model):
        raise Unsupported("how tokens are routed is found by running the model; load the weights first.")
    if target.what == "macs":
        raise Unsupported(
            "a token visits as many experts as before, whatever their number, so the arithmetic stays; ask for "
            "sparsity, params, bytes or latency."
        )
    layers, refused = mixtures(model, example)
    if not layers:
        reasons = "; ".join(f"{n or 'the model itself'}: {r}" for n, r in list(refused.items())[:4])
        raise NothingPrunable(
            "no mixture with stacked experts and a router was found (lists of expert modules are not cut). " + reasons
        )
    tensors = stored_tensors(model)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    families = [layer.family(shapes) for layer in layers]
    protected = _protected(families, protect)
    visits = {f.name: layer.chosen for f, layer in zip(families, layers, strict=True)}
    most = max(visits.values())
    asked_for = minimum if isinstance(minimum, int) else max(int(np.ceil(minimum * f.size)) for f in families)
    limits = Limits(minimum, round_to, protected)
    limits = replace(limits, minimum=max(asked_for, most))
    notes: list[str] = []
    scores = unit_scores(
        model, families, score, unit="expert", pool=pool, normalise=normalise, data=data, loss=loss, seed=seed,
        train_mode=train_mode, notes=notes,
    )  # fmt: skip
    parameters, size = sizes(model)
    by_name = {f.name: f for f in families}

    def plan_of(kept: Mapping[str, Any]) -> Plan:
        return plan_for(model, layers, {n: k.nonzero().flatten().tolist() for n, k in kept.items()})

    def cost(kept: Mapping[str, Any]) -> float:
        total = float(parameters if target.what == "params" else size)
        for name, stays in kept.items():
            for slot in by_name[name].slots:
                each = tensors[slot.tensor][0].numel()
                total -= (
                    int((~stays).sum()) * each * (1 if target.what == "params" else tensors[slot.tensor].element_size())
                )
        return total

    def chosen(share: float, possible: Sequence[Family]) -> Kept:
        return by_share(possible, scores, share, limits, scope)

    def choose(possible: Sequence[Family]) -> tuple[Kept, float | None]:
        if target.what == "sparsity":
            share = check_share("sparsity", target.asked)
            for f in families if scope == "local" else ():
                if f.name not in protected and f.size - round(share * f.size) < visits[f.name]:
                    raise Infeasible(
                        f"sparsity {share:g} would leave {f.size - round(share * f.size)} of {f.size} experts in "
                        f"{f.name!r}, where each token visits {visits[f.name]}; ask for at most "
                        f"{1 - visits[f.name] / f.size:.3g}."
                    )
            return chosen(share, possible), None
        if target.timed:
            found = to_latency(
                target,
                lambda share: chosen(min(share, ALL), possible),
                lambda kept: plan_of(kept).apply(model),
                Stopwatch(model, _call_form(example)),
                key=lambda kept: tuple(int(k.sum()) for k in kept.values()),
                on_stage=on_stage,
            )
            notes.extend([found.note] if found.note else [])
            return found.choice, found.achieved
        return to_target(possible, scores, cost, target.amount(cost({})), limits, scope, what=target.what), None

    kept, achieved = choose(families)
    plan = plan_of(kept)
    apart: float | None = None
    blocked: dict[str, str] = {}
    if verify:
        apart, blocked = _proved(model, layers, plan, example)
        if blocked:
            rest = {n: k for n, k in plan.families.items() if n not in blocked}
            plan = plan_for(model, layers, rest).with_blocked(blocked)
            apart = plan.verify(model, example) if rest else 0.0
    macs = _macs(model, example)
    small = plan.apply(model, inplace=inplace)
    table = tuple(
        {"name": f.name, "kind": f.kind, "size": f.size, "kept": len(plan.families.get(f.name, range(f.size)))}
        for f in families
    )
    facts = Facts(
        unit="expert",
        target=target,
        families=table,
        macs=(macs, _macs(small, example)),
        difference=apart,
        seconds=time.perf_counter() - start,
        notes=notes,
        unprunable=refused,
        achieved=achieved,
    )
    return finished(None if inplace else model, (parameters, size), small, plan, example, facts, measure=measure)


def _protected(families: Sequence[Family], patterns: Sequence[str]) -> frozenset[str]:
    result: set[str] = set()
    for pattern in patterns:
        hit = {f.name for f in families if any(fnmatchcase(s.tensor, pattern) for s in f.slots)}
        if not hit:
            known = {s.tensor for f in families for s in f.slots}
            raise InvalidValue(f"pattern {pattern!r} matches no tensor of experts.{did_you_mean(pattern, known)}")
        result |= hit
    return frozenset(result)


def _proved(model: nn.Module, layers: Sequence[Mixture], plan: Plan, example: Any) -> tuple[float, dict[str, str]]:
    """Return (difference of removed and masked, family name -> why it must stay whole)."""
    worst, why = _difference(model, plan, example)
    if worst <= EXACT:
        return worst, {}
    blocked = {}
    for name, kept in plan.families.items():
        alone, reason = _difference(model, plan_for(model, layers, {name: kept}), example)
        if alone > EXACT:
            blocked[name] = reason
    return worst, blocked or dict.fromkeys(plan.families, why)


def _difference(model: nn.Module, plan: Plan, example: Any) -> tuple[float, str]:
    try:
        apart = plan.verify(model, example)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return float("inf"), f"the model does not run without it ({type(error).__name__}: {error})"
    return apart, f"removing it differs from masking it by {apart:.1e} relative"


def _call_form(example: Any) -> Any:
    args, kwargs = arguments(example)
    return kwargs if kwargs and not args else args


def _macs(model: nn.Module, example: Any) -> int:
    """Return the multiply-accumulates of one example."""
    return total_macs(model, _call_form(example))
