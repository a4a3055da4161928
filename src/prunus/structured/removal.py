"""What a cut takes away, read in one way from a plan or from kept units, and what compensation hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.graph.couple import Coupling, Family
from prunus.graph.plan import Plan

Keep = Plan | Mapping[str, Any]  # a plan, or per family which units stay


@dataclass(frozen=True)
class Compensated:
    """A model whose kept weights make up for the units that go.

    Attributes:
        model: a copy of full size: consumers are updated, removed slices are zero everywhere; `plan.apply` makes it
            small.
        plan: the cut.
        errors: the error that is left, as a share: per weight, of the energy of its outputs (OBSPA); per family, of the
            squared norm of the removed channels (reconstruction).
        skipped: families or weights that were cut without compensation, and why.
    """

    model: nn.Module
    plan: Plan
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def as_plan(coupling: Coupling, keep: Keep) -> Plan:
    """Return `keep` as a plan."""
    return keep if isinstance(keep, Plan) else Plan.from_keep(coupling, keep)


def gone(plan: Plan, tensor: str, axis: int, size: int) -> Tensor:
    """Return the removed positions of an axis, int64 in order."""
    kept = plan.keep.get(f"{tensor}:{axis}")
    left = torch.ones(size, dtype=torch.bool)
    left[torch.arange(size) if kept is None else torch.as_tensor(np.asarray(kept, dtype=np.int64))] = False
    return left.nonzero().flatten()


def kept_units(plan: Plan, family: Family) -> NDArray[np.bool_]:
    """Return which units of a family the plan keeps: those that have a position left somewhere; shape (size,)."""
    kept = np.zeros(family.size, dtype=bool)
    for slot in family.slots:
        stays = plan.keep.get(f"{slot.tensor}:{slot.axis}")
        kept |= True if stays is None else np.isin(slot.index, np.asarray(stays)).any(axis=1)
    return kept
