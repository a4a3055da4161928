"""Proof of a cut: removing equals masking, and families for which it does not are left whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from prunus.graph.couple import Coupling
from prunus.graph.fit import EXACT
from prunus.graph.plan import Plan


def proved(coupling: Coupling, plan: Plan, model: nn.Module, example: Any, *, exact: bool) -> tuple[float, Plan]:
    """Return (difference of removed and masked, plan) of a cut of `model`, see `rolled_back`."""
    return rolled_back(coupling, plan, lambda part: part.verify(model, example), exact=exact)


def rolled_back(
    coupling: Coupling, plan: Plan, verify: Callable[[Plan], float], *, exact: bool, tolerance: float = EXACT
) -> tuple[float, Plan]:
    """Return (difference of removed and masked, plan); families whose removal changes the outputs are rolled back.

    Halves of the families are tried until the guilty ones are found; each is named in `Plan.blocked`. `verify` returns
    the relative difference of one plan; up to `tolerance` it counts as none.
    """
    worst = verify(plan)
    if worst <= tolerance or not exact:
        return worst, plan
    guilty: list[str] = []

    def search(names: list[str]) -> None:
        part = Plan.from_keep(coupling, {n: stays(coupling[n].size, plan.families[n]) for n in names})
        if verify(part) <= tolerance:
            return
        if len(names) == 1:
            guilty.extend(names)
            return
        search(names[: len(names) // 2])
        search(names[len(names) // 2 :])

    search(list(plan.families))
    innocent = [n for n in plan.families if n not in guilty]
    rest = Plan.from_keep(coupling, {n: stays(coupling[n].size, plan.families[n]) for n in innocent})
    reason = f"removing it differs from masking it by {worst:.1e} relative"
    rest = rest.with_blocked(plan.blocked | dict.fromkeys(guilty, reason))
    remaining = verify(rest)
    if remaining > tolerance:
        every = plan.blocked | dict.fromkeys(plan.families, reason)
        return 0.0, Plan.from_keep(coupling, {}).with_blocked(every)
    return remaining, rest


def stays(size: int, kept: Sequence[int]) -> Any:
    """Return which of `size` units are among `kept`, bool (size,)."""
    return np.isin(np.arange(size), np.asarray(kept, dtype=np.int64))
