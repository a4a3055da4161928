"""Who stays: coupled axes, their scores and a target, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.graph.couple import Coupling, Family
from prunus.graph.plan import Plan
from prunus.graph.record import arguments
from prunus.structured.select import Kept, Limits, by_share, check_share, to_target
from prunus.structured.small import examples_in
from prunus.structured.target import Target, costs_of
from prunus.structured.timing import ALL, Stopwatch, to_latency


@dataclass(frozen=True)
class Chooser:
    """Chooses the units that stay.

    Attributes:
        model: of full size.
        coupling: of this model.
        scores: family name -> score of each unit.
        target: what may remain.
        limits, scope: see `prunus.structured.select.by_share`.
        example: one input.
        on_stage: called with a sentence per timed candidate.
    """

    model: nn.Module
    coupling: Coupling
    scores: Mapping[str, Tensor]
    target: Target
    limits: Limits
    scope: str
    example: Any
    on_stage: Callable[[str], None] | None = None

    def __call__(self, families: Sequence[Family]) -> tuple[Kept, float | None, str]:
        """Return (units that stay, latency that was reached, why it is not the one asked for) of these families."""
        what = self.target.what
        if what == "sparsity":
            return self._by_share(families, check_share("sparsity", self.target.asked)), None, ""
        if self.target.timed:
            args, kwargs = arguments(self.example)
            call = kwargs if kwargs and not args else args
            found = to_latency(
                self.target,
                lambda share: self._by_share(families, min(share, ALL)),
                lambda kept: Plan.from_keep(self.coupling, kept).apply(self.model),
                Stopwatch(self.model, call),
                key=lambda kept: torch.cat([kept[f.name] for f in families]).numpy().tobytes(),
                on_stage=self.on_stage,
            )
            return found.choice, found.achieved, found.note
        costs = costs_of(self.model, self.coupling)
        rows = examples_in(self.example)
        costs["macs"] = lambda keep: self.coupling.macs(keep) / rows
        cost = costs[what]
        target = self.target.amount(cost({}))
        return to_target(families, self.scores, cost, target, self.limits, self.scope, what=what), None, ""

    def _by_share(self, families: Sequence[Family], share: float) -> Kept:
        return by_share(families, self.scores, share, self.limits, self.scope)
