"""How much each coupled unit matters: element scores pooled over every slice that goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.evidence import Loss
from prunus.graph.couple import Family
from prunus.graph.edit import stored_tensors

POOLS = ("sum", "mean", "max", "l2")
NORMALISATIONS = ("none", "sum", "mean", "max")


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
    if pool not in POOLS:
        raise InvalidValue(f"pool {pool!r} must be one of {', '.join(POOLS)}.")
    if normalise not in NORMALISATIONS:
        raise InvalidValue(f"normalise {normalise!r} must be one of {', '.join(NORMALISATIONS)}.")
    total: Tensor | None = None
    count = 0
    for slot in family.slots:
        scores = elements.get(slot.tensor)
        if scores is None:
            continue
        along = (
            scores.detach().double().movedim(slot.axis, 0).flatten(1)
            if scores.ndim > 1
            else (scores.detach().double()[:, None])
        )
        count += along.shape[1] * slot.index.shape[1]
        index = torch.as_tensor(slot.index, device=along.device)
        if pool == "max":
            units = along.amax(1)[index].amax(1)
            total = units if total is None else torch.maximum(total, units)
        else:
            units = (along.square() if pool == "l2" else along).sum(1)[index].sum(1)
            total = units if total is None else total + units
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
    loss: Loss | None = None,
    seed: int = 0,
    train_mode: bool = False,
) -> dict[str, Tensor]:
    """Return the score of every weight that some family touches, by any of the element scores (`prunus ls scores`).

    Biases, norm parameters and tables that only ride along have none; weights of unknown layout (a bare parameter
    that multiplies activations) count by magnitude-like scores as axis-0 outputs.
    """
    from prunus.keep import read_data
    from prunus.parameters import prunable
    from prunus.scores.registry import SCORES
    from prunus.stats import gather

    info = SCORES.entry(score)
    touched = {s.tensor for f in families for s in f.slots if s.role in ("output", "input")}
    named = dict(model.named_parameters())
    include = [n for n in touched if n in named and named[n].ndim >= 2 and named[n].is_floating_point()]
    addresses = prunable(model, include=[_escaped(n) for n in include], empty_ok=True)
    wanted = {n: a for n, a in addresses.items() if n in touched}
    if not wanted:
        return {}
    device = next(iter(named.values())).device
    read = read_data(data, None, None, device)
    evidence = gather(
        model, wanted, list(info.needs), data=read or None, loss=loss, seed=seed, round=0, train=train_mode
    )
    function = info.load()
    return {n: function(**{need: evidence[n][need] for need in info.needs}) for n in wanted}


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")


def unit_scores(
    model: nn.Module,
    families: Sequence[Family],
    score: str = "magnitude",
    *,
    pool: str = "sum",
    normalise: str = "mean",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    train_mode: bool = False,
) -> dict[str, Tensor]:
    """Return the scores of the units of every family, shape (family.size,), higher = keep (see `pooled`)."""
    elements = element_scores(model, families, score, data=data, loss=loss, seed=seed, train_mode=train_mode)
    tensors = stored_tensors(model)
    result = {}
    for family in families:
        mine = elements
        if not any(s.tensor in elements for s in family.slots):
            # Families of tables and norms alone are ranked by what they hold.
            mine = {s.tensor: tensors[s.tensor].abs() for s in family.slots if tensors[s.tensor].is_floating_point()}
        result[family.name] = pooled(mine, family, pool=pool, normalise=normalise)
    return result
