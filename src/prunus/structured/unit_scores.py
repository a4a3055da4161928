"""Scores of whole units: what a sum over single weights cannot see. Pure functions of a family and the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.budget.lamp import lamp
from prunus.errors import InvalidValue, unknown
from prunus.graph.couple import Coupling, Family, Slot
from prunus.graph.edit import stored_tensors
from prunus.graph.ir import Graph, Value
from prunus.structured import obspa as brain_surgery
from prunus.structured.registry import EVERY_SCORE, UNIT_SCORES, UnitScoreInfo


def slices(tensor: Tensor, slot: Slot) -> Tensor:
    """Return what each unit takes from one tensor, (units, numbers per unit), float64."""
    along = tensor.detach().double().movedim(slot.axis, 0).reshape(tensor.shape[slot.axis], -1)
    return along[torch.as_tensor(slot.index, device=along.device)].flatten(1)


def weights_of(family: Family, tensors: Mapping[str, Tensor], roles: Sequence[str]) -> list[Tensor]:
    """Return the slices of every weight (two axes or more, floating point) that a family touches in one of `roles`."""
    return [
        slices(tensors[s.tensor], s)
        for s in family.slots
        if s.role in roles and len(s.shape) >= 2 and s.tensor in tensors and tensors[s.tensor].is_floating_point()
    ]


def bn_scale(family: Family, scales: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mean |gamma| of the norms on each unit, (units,); None for families without a norm.

    Channels with a small scale pass little on, most of all after training with an L1 penalty on the scales. Source: Liu
    et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017. That coupled norms are
    averaged is a choice here; the paper has one norm per channel.

    Args:
        family: the units.
        scales: name -> weight of a norm.
    """
    found = [slices(scales[s.tensor], s) for s in family.slots if s.tensor in scales]
    return torch.cat(found, 1).abs().mean(1) if found else None


def fpgm(family: Family, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the sum of Euclidean distances from each unit's filter to all others of the family, (units,).

    Filters near the geometric median of their layer can be stood in for by the others. Source: He et al., Filter
    Pruning via Geometric Median, CVPR 2019. Where several layers make a unit, their filters are joined to one vector,
    which is a choice here.

    Args:
        family: the units.
        tensors: name -> tensor.
    """
    makers = weights_of(family, tensors, ("output",))
    if not makers:
        return None
    points = torch.cat(makers, 1)
    distances = torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist")
    return distances.fill_diagonal_(0.0).sum(1)


def lamp_normalised(family: Family, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mean over tensors of LAMP of the norms of each unit's slices, (units,).

    In each tensor the strongest unit gets 1 and the scale of the tensor does not matter, so that no large tensor
    decides alone. Source: Lee et al., ICLR 2021, equation 2, there for single weights; for slices a reading of it.

    Args:
        family: the units.
        tensors: name -> tensor.
    """
    found = weights_of(family, tensors, ("output", "input"))
    return torch.stack([lamp(s.norm(dim=1)) for s in found]).mean(0) if found else None


def obspa(
    model: nn.Module, coupling: Coupling, families: Sequence[Family], data: Any, example: Any, seed: int
) -> dict[str, Tensor]:
    """Return what the removal of each unit costs its readers (see `prunus.structured.obspa.unit_scores`)."""
    names = [f.name for f in families]
    return brain_surgery.unit_scores(model, coupling, families=names, data=data, example=example, seed=seed)


def scales_of(graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of all norms in a graph, by name."""
    found = {}
    for node in graph.nodes:
        weight = node.args.get("weight") if "norm" in node.op else None
        if isinstance(weight, Value) and weight.stored and weight.name in tensors:
            found[weight.name] = tensors[weight.name]
    return found


def info_for(score: str, unit: str) -> UnitScoreInfo | None:
    """Return the row of a unit score; None for scores of single weights, which are pooled.

    Raises:
        UnknownName: no score is called so.
        InvalidValue: the score does not rank such units.
    """
    if score not in EVERY_SCORE:
        raise unknown("score", score, [n for e in EVERY_SCORE for n in (e.name, *e.aliases)])
    if score not in UNIT_SCORES:
        return None
    info = UNIT_SCORES.entry(score)
    if unit not in info.units:
        raise InvalidValue(f"score {info.name!r} ranks {' and '.join(info.units)} units, not unit {unit!r}.")
    return info


def whole_unit_scores(
    info: UnitScoreInfo,
    model: nn.Module,
    families: Sequence[Family],
    *,
    coupling: Coupling | None = None,
    data: Iterable[Any] | None = None,
    example: Any = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return family name -> (units,) float64 by one row of the catalogue; families it says nothing about are left out.

    Raises:
        InvalidValue: the score needs a graph and there is none, or it scores no family at all and has no fallback.
    """
    function = info.load()
    tensors = stored_tensors(model)
    if coupling is None and {"coupling", "scales"} & set(info.needs):
        raise InvalidValue(f"score {info.name!r} reads the graph of the network; this unit has none.")
    given: dict[str, Any] = {"tensors": tensors, "model": model, "coupling": coupling, "families": families}
    given |= {"data": data, "example": example, "seed": seed}
    if coupling is not None:
        given["scales"] = scales_of(coupling.graph, tensors)
    if "family" not in info.needs:
        return dict(function(**{need: given[need] for need in info.needs}))
    result = {}
    for family in families:
        found = function(**{need: family if need == "family" else given[need] for need in info.needs})
        if found is not None:
            result[family.name] = found.cpu()
    return result
