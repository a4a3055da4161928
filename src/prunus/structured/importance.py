"""How much each coupled unit matters: element scores pooled over every slice that goes with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.evidence import Loss
from prunus.graph.couple import Coupling, Family
from prunus.graph.edit import parameters_and_buffers, stored_tensors
from prunus.parameters import check_finite

POOLS = ("sum", "mean", "max", "l2")
NORMALISATIONS = ("none", "sum", "mean", "max")


def _check_choices(pool: str, normalise: str) -> None:
    if pool not in POOLS:
        raise InvalidValue(f"pool {pool!r} must be one of {', '.join(POOLS)}.")
    if normalise not in NORMALISATIONS:
        raise InvalidValue(f"normalise {normalise!r} must be one of {', '.join(NORMALISATIONS)}.")


def pooled(elements: Mapping[str, Tensor], family: Family, *, pool: str = "sum", normalise: str = "none") -> Tensor:
    """Return one score per unit of a family, shape (family.size,), float64.

    Args:
        elements: tensor name -> score of every element, of the tensor's shape; slots of other tensors do not count.
        family: the units.
        pool: over all elements that go with a unit: "sum", "mean", "max" or "l2" (root of the sum of squares).
        normalise: divide by the family's "sum", "mean" or "max", so that families can compete; "none" leaves them.

    Raises:
        InvalidValue: pool or normalise is unknown, or no slot of the family has scores.
    """
    _check_choices(pool, normalise)
    named = {s.tensor: elements[s.tensor] for s in family.slots if s.tensor in elements}
    profiles = {n: profile(t, {s.axis for s in family.slots if s.tensor == n}, pool) for n, t in named.items()}
    return _joined(profiles, family, pool, normalise)


def profile(scores: Tensor, axes: Collection[int], pool: str) -> dict[int, Tensor]:
    """Return for each axis of an element score one number per position, shape (scores.shape[axis],), float64.

    Args:
        scores: of every element.
        axes: which.
        pool: over the other axes: "max", "l2" (the sum of squares), "sum" or "mean" (both the sum).
    """
    scores = scores.detach()
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = scores.square() if pool == "l2" else scores
    if scores.ndim > 2 and axes and max(axes) < 2:
        # Kernels lie together in memory, so pooling them first leaves little for the strided axis.
        kernels = scores.flatten(2)
        if kernels.shape[2] == 1:
            scores = kernels[:, :, 0]
        else:
            scores = kernels.amax(2) if pool == "max" else kernels.sum(2)
    found = {}
    for axis in axes:
        others = [other for other in range(scores.ndim) if other != axis]
        # Summed in the tensors' own precision (torch sums pairwise), then over slots and positions in float64.
        along = (scores.amax(others) if pool == "max" else scores.sum(others)) if others else scores
        found[axis] = along.double()
    return found


def _joined(profiles: Mapping[str, Mapping[int, Tensor]], family: Family, pool: str, normalise: str) -> Tensor:
    """Return the scores of a family's units from the profiles of its tensors; see `pooled`."""
    total: Tensor | None = None
    count = 0
    for slot in family.slots:
        if slot.tensor not in profiles:
            continue
        count += math.prod(slot.shape) // slot.shape[slot.axis] * slot.index.shape[1]
        along = profiles[slot.tensor][slot.axis]
        positions = along[torch.as_tensor(slot.index, device=along.device)]
        units = positions.amax(1) if pool == "max" else positions.sum(1)
        if total is None:
            total = units
        else:
            total = torch.maximum(total, units) if pool == "max" else total + units
    if total is None:
        raise InvalidValue(f"no tensor of family {family.name!r} has scores.")
    if pool == "mean":
        total = total / count
    elif pool == "l2":
        total = total.sqrt()
    return normalised(total, normalise)


def normalised(scores: Tensor, how: str) -> Tensor:
    """Divide the scores of one family by their sum, mean or maximum; all-zero families stay zero."""
    if how == "none":
        return scores
    divisor = {"sum": scores.abs().sum(), "mean": scores.abs().mean(), "max": scores.abs().max()}[how]
    return scores / divisor if float(divisor) > 0 else scores


def element_scores(
    model: nn.Module,
    families: Sequence[Family],
    score: str = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    example: Any = None,
    loss: Loss | None = None,
    seed: int = 0,
    train_mode: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the scores of every weight that some family touches, by any of the element scores (`prunus ls scores`).

    Scores are computed one tensor at a time, so that those of a large network are never held together. Biases, norm
    parameters and tables that only ride along have none; weights of unknown layout (a bare parameter that multiplies
    activations) count by magnitude-like scores as axis-0 outputs. `example`, one input tensor, serves as data where a
    score needs inputs without labels.
    """
    from prunus.keep import read_data
    from prunus.parameters import prunable
    from prunus.scores.registry import SCORES
    from prunus.stats import gather

    info = SCORES.entry(score)
    touched = {s.tensor for f in families for s in f.slots if s.role in ("output", "input")}
    named = parameters_and_buffers(model)[0]
    include = [n for n in touched if n in named and named[n].ndim >= 2 and named[n].is_floating_point()]
    addresses = prunable(model, include=[_escaped(n) for n in include], empty_ok=True)
    wanted = {n: a for n, a in addresses.items() if n in touched}
    if not wanted:
        return
    device = next(iter(named.values())).device
    unlabelled = info.data in ("example", "inputs") and isinstance(example, Tensor)
    read = read_data(data, None, example if unlabelled else None, device)
    evidence = gather(
        model, wanted, list(info.needs), data=read or None, loss=loss, seed=seed, round=0, train=train_mode
    )
    function = info.load()
    for name in wanted:
        yield name, function(**{need: evidence[name][need] for need in info.needs})


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")


def unit_scores(
    model: nn.Module,
    families: Sequence[Family],
    score: str = "magnitude",
    *,
    unit: str = "channel",
    coupling: Coupling | None = None,
    pool: str | None = None,
    normalise: str = "mean",
    data: Iterable[Any] | None = None,
    example: Any = None,
    loss: Loss | None = None,
    seed: int = 0,
    train_mode: bool = False,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Return the scores of the units of every family, shape (family.size,), higher = keep.

    Args:
        model: untouched.
        families: the units.
        score: one of `prunus ls scores`: a score of single weights is pooled over everything that goes with a unit (see
            `pooled`), a score of whole units is taken as it is.
        unit: what the units are, for scores that rank some only.
        coupling: where the families come from, for scores that read the graph.
        pool: how scores of weights are pooled (default "sum"); scores of whole units take none.
        normalise: see `pooled`; also for scores of whole units.
        data, loss, seed, train_mode: as in `prunus.prune`.
        example: one input, for scores that make do with noise of its shape.
        notes: gets a sentence when families had to be ranked by magnitude instead.

    Raises:
        UnknownName, InvalidValue: an unknown score, or one that does not rank such units or takes no pool.
        NonFinite: a score is NaN or infinite.
    """
    from prunus.structured.unit_scores import info_for, whole_unit_scores

    if any(p.is_meta for p in model.parameters()):
        raise InvalidValue("the model is on the meta device and holds no numbers to score; load its weights first.")
    _check_choices(pool or "sum", normalise)
    info = info_for(score, unit)
    if info is not None:
        if pool is not None:
            raise InvalidValue(f"score {info.name!r} ranks whole units, so there is nothing to pool; leave pool out.")
        whole = whole_unit_scores(info, model, families, coupling=coupling, data=data, example=example, seed=seed)
        check_finite(whole, "score")
        result = {n: normalised(s.double(), normalise) for n, s in whole.items()}
        rest = [f for f in families if f.name not in result]
        if rest and not info.fallback:
            raise InvalidValue(f"score {info.name!r} says nothing about {rest[0].name!r}; choose another score.")
        if rest and notes is not None:
            named = ", ".join(f.name for f in rest[:3]) + (", ..." if len(rest) > 3 else "")
            notes.append(f"score {info.name} says nothing about {len(rest)} families, ranked by magnitude: {named}")
        more = ranked(rest, element_scores(model, rest), stored_tensors(model), "sum", normalise) if rest else {}
        return {f.name: (result | more)[f.name] for f in families}
    elements = element_scores(
        model, families, score, data=data, example=example, loss=loss, seed=seed, train_mode=train_mode
    )
    return ranked(families, elements, stored_tensors(model), pool or "sum", normalise)


def ranked(
    families: Sequence[Family],
    elements: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    pool: str,
    normalise: str,
) -> dict[str, Tensor]:
    """Return the pooled element scores of every family; those of tables and norms alone go by what they hold.

    Args:
        families: the units.
        elements: names and scores of tensors; each is looked at once, as it comes.
        tensors: values of every tensor that families touch.
        pool, normalise: as for `pooled`.
    """
    _check_choices(pool, normalise)
    axes: dict[str, set[int]] = {}
    for family in families:
        for slot in family.slots:
            axes.setdefault(slot.tensor, set()).add(slot.axis)
    profiles = {name: profile(scores, axes[name], pool) for name, scores in elements if name in axes}
    result = {}
    for family in families:
        mine = profiles
        if not any(s.tensor in profiles for s in family.slots):
            mine = {
                s.tensor: profile(tensors[s.tensor].abs(), axes[s.tensor], pool)
                for s in family.slots
                if tensors[s.tensor].is_floating_point()
            }
        result[family.name] = _joined(mine, family, pool, normalise)
    return result
