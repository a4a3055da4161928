"""Structured pruning in one call: couple axes, score units, spend a budget, cut, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from prunus.errors import InvalidValue, NothingPrunable, Unsupported, did_you_mean, unknown
from prunus.evidence import Loss
from prunus.graph.couple import Coupling, Family, couple
from prunus.graph.ir import Graph
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.keep import read_data
from prunus.measure.forwarding import device_of
from prunus.parameters import check_finite, unwrap
from prunus.structured.chooser import Chooser
from prunus.structured.compensate import COMPENSATIONS, made_up
from prunus.structured.depth import prune_layers
from prunus.structured.experts import prune_experts
from prunus.structured.importance import unit_scores
from prunus.structured.proof import proved, rolled_back, stays
from prunus.structured.registry import UNIT_SCORES
from prunus.structured.report import sizes
from prunus.structured.select import Limits, check_share
from prunus.structured.small import Facts, SmallModel, examples_in, finished, without_numbers
from prunus.structured.target import read_target
from prunus.structured.unit_scores import info_for

__all__ = ["SmallModel", "coupled", "offered", "proved", "prune_structured", "rolled_back"]


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
_ENOUGH = 0.9


def coupled(
    graph: Graph, unit: str, protect: Sequence[str], norms: str, share: float | None
) -> tuple[Coupling, list[Family], frozenset[str]]:
    """Return (coupling, families offered, names of protected ones); `norms` as for `couple`, or "auto".

    "auto" leaves axes of norms whole, which costs nothing at run time, unless that would leave so little to cut that
    removing `share` (default a half) of the channels removes less than 0.9 of that share of the arithmetic.
    """
    if norms != "auto":
        coupling = couple(graph, norms=norms)
        return coupling, *offered(coupling, unit, protect)
    part = check_share("sparsity", share) if share else 0.5
    whole = couple(graph)
    try:
        families, protected = offered(whole, unit, protect)
    except (NothingPrunable, InvalidValue):
        coupling = couple(graph, norms="counted")
        return coupling, *offered(coupling, unit, protect)
    keep = {}
    for family in families:
        keep[family.name] = stays(family.size, range(max(1, family.size - round(part * family.size))))
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
    pool: str | None = None,
    normalise: str = "mean",
    scope: str = "local",
    macs: float | int | None = None,
    params: float | int | None = None,
    bytes: float | int | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    data: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    minimum: int | float = 1,
    round_to: int = 1,
    protect: Sequence[str] | str = (),
    norms: str = "auto",
    compensate: str | None = None,
    seed: int = 0,
    train_mode: bool = False,
    inplace: bool = False,
    measure: bool = True,
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> SmallModel:
    """Remove channels, heads, residual blocks or experts for real; see also `prunus.prune`.

    Args:
        model: untouched unless `inplace`.
        sparsity: share of units to remove, in [0, 1). Give exactly one of sparsity, macs, params, bytes, latency,
            latency_ms.
        example: one input; of residual blocks a batch of real ones.
        unit: "channel", "head" (only heads of attentions), "layer" (see `prunus.structured.depth`) or "expert" (see
            `prunus.structured.experts`).
        score: see `prunus ls scores`.
        pool: how scores of weights become one per unit: "sum" (default), "mean" (default for layers), "max" or "l2".
        normalise: how families are made comparable, see `prunus.structured.importance.pooled`; layers compete as they
            are.
        scope: "local", "global" or "isomorphic", see `prunus.structured.select.by_share`; layers form one family.
        macs, params, bytes: what may remain: a share in (0, 1], or an amount (macs of one example).
        latency, latency_ms: how long a call may take on this machine, as a share of the dense model's time or in
            milliseconds. Candidates are really cut and timed (see `prunus.structured.timing.to_latency`).
        data: batches for scores, and for compensation.
        calibration: other batches for `compensate="obspa"` and `score="obspa"`, such as images from elsewhere.
        loss: of scores that need one.
        minimum: fewest units that stay in a family: a count, or a share.
        round_to: kept units are a multiple of this.
        protect: shell patterns of tensors (for layers also of blocks) whose families stay whole.
        norms: what becomes of axes over which norms take statistics, see `prunus.graph.couple.couple`; "auto" leaves
            them whole unless too little could be cut then.
        compensate: "obspa" or "udfc" lets kept weights make up for channels and heads that go; "obspa" looks at the
            calibration batches, else at the data, else at noise of the example's shape, and measures batch norms anew
            unless it was noise.
        seed: of random scores and noise.
        train_mode: score in train mode.
        inplace: cut `model` itself.
        measure: time both models.
        verify: prove the cut; families whose removal changes the outputs are rolled back and named.
        on_stage: called with a sentence when a stage of the work begins, to show progress.

    Returns:
        `SmallModel` with `.model`, `.plan`, `.report`, `.save(path)`.

    Raises:
        InvalidValue: contradictory options, or values out of range.
        Infeasible: the target cannot be reached.
        NothingPrunable, NonFinite, UnknownName, Unsupported: as their names say.
    """
    target = read_target(
        sparsity=sparsity, macs=macs, params=params, bytes=bytes, latency=latency, latency_ms=latency_ms
    )
    protect = (protect,) if isinstance(protect, str) else tuple(protect)
    bare = unwrap(model)
    without = without_numbers(bare)
    check_finite({} if without else dict(bare.named_parameters()), "weight")
    if target.timed and without:
        raise Unsupported(f"{target.what} is measured, and the model holds no numbers; load its weights first.")
    info_for(score, unit)
    if compensate is not None and compensate not in COMPENSATIONS:
        raise unknown("compensation", compensate, COMPENSATIONS)
    data, calibration = (None if d is None else read_data(d, None, None, device_of(bare)) for d in (data, calibration))
    common: dict[str, Any] = {
        "example": example, "score": score, "pool": pool, "data": data, "loss": loss, "minimum": minimum,
        "round_to": round_to, "protect": protect, "seed": seed, "inplace": inplace, "measure": measure,
        "verify": verify, "on_stage": on_stage,
    }  # fmt: skip
    if unit in ("layer", "expert"):
        axes: dict[str, tuple[Any, Any]] = {"norms": (norms, "auto"), "compensate": (compensate, None)}
        axes |= {"calibration": (calibration, None)}
        if unit == "layer":
            axes |= {"train_mode": (train_mode, False), "normalise": (normalise, "mean"), "scope": (scope, "local")}
        for name, (value, default) in axes.items():
            if value != default:
                raise InvalidValue(f"{name} means nothing to unit {unit!r}; leave it out.")
        if unit == "layer":
            return prune_layers(bare, target, **common)
        return prune_experts(bare, target, normalise=normalise, scope=scope, train_mode=train_mode, **common)
    if calibration is not None and "obspa" not in (compensate, score.lower()):
        raise InvalidValue('calibration batches are for score="obspa" and compensate="obspa"; leave them out.')
    tell = on_stage or (lambda text: None)
    start = time.perf_counter()
    tell("reading the model and what its axes share")
    coupling, families, protected = coupled(record(bare, example), unit, protect, norms, sparsity)
    limits = Limits(minimum, round_to, protected)
    tell(f"scoring {sum(f.size for f in families):,} {unit}s in {len(families)} families by {score}")
    notes = list(coupling.graph.notes)
    looked_at = calibration if calibration is not None and score in UNIT_SCORES else data
    scores = unit_scores(
        bare, families, score, unit=unit, coupling=coupling, pool=pool, normalise=normalise, data=looked_at,
        example=example, loss=loss, seed=seed, train_mode=train_mode, notes=notes,
    )  # fmt: skip
    choose = Chooser(bare, coupling, scores, target, limits, scope, example, on_stage)
    plan, achieved, difference = Plan(), None, None
    blocked: dict[str, str] = {}
    while True:
        tell("choosing what stays")
        possible = [f for f in families if f.name not in blocked]
        kept, achieved, note = choose(possible)
        plan = Plan.from_keep(coupling, kept)
        if verify and not without:
            tell("proving that removing equals masking")
            difference, plan = proved(coupling, plan, bare, example, exact=norms != "anew")
        new = set(plan.blocked) - set(blocked)
        blocked |= plan.blocked
        # What was blocked stays whole, so the others are chosen again to reach the target.
        if not new or target.what == "sparsity" or len(blocked) == len(families):
            break
    plan = plan.with_blocked(blocked)
    notes += [note] if note else []
    before = sizes(bare)
    if compensate is not None:
        tell(f"letting what stays make up for what goes ({compensate})")
    full, made = made_up(
        compensate, bare, coupling, plan, data=data, calibration=calibration, example=example, seed=seed
    )
    if made and verify:
        difference = plan.verify(full, example)
    if inplace and full is not bare:
        bare.load_state_dict(full.state_dict())
        full = bare
    small = plan.apply(full, inplace=inplace)
    rows = examples_in(example)
    keep = {name: stays(coupling[name].size, kept) for name, kept in plan.families.items()}
    facts = Facts(
        unit=unit,
        target=target,
        families=tuple(
            {"name": f.name, "kind": f.kind, "size": f.size, "kept": len(plan.families.get(f.name, range(f.size)))}
            for f in families
        ),
        macs=(coupling.macs({}) // rows, coupling.macs(keep) // rows),
        difference=difference,
        seconds=time.perf_counter() - start,
        notes=notes,
        unprunable=coupling.unprunable,
        without_rule=coupling.without_rule,
        achieved=achieved,
        compensation=made,
    )
    return finished(None if inplace else bare, before, small, plan, example, facts, measure=measure)
