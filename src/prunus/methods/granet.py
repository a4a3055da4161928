"""GraNet: gradual pruning with zero-cost neuroregeneration.

Source: Sparse Training via Boosting Pruning Plasticity with Neuroregeneration (Liu et al., NeurIPS 2021). A step of
the global cubic ramp, then an exchange at the new densities, in one update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue
from prunus.masks import Masks
from prunus.methods.base import BudgetChoice, given_masks, random_masks, select
from prunus.methods.regrow import Regrow, rewire
from prunus.schedule import Duration, ResolvedSchedule, Schedule
from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class GraNet(Regrow):
    """Start at sparsity `initial` (0: dense-to-sparse, 0.5: sparse-to-sparse), ramp to `sparsity`, regrow all along.

    The paper's code stops the ramp one update early and keeps one weight too few per update; here the target is
    met exactly at `ramp_end`.

    Attributes:
        initial: sparsity at the start, at random ERK positions.
        ramp_budget: who competes in the ramp: "global" (paper), "uniform-floor" (GraNet-uniform), "lamp".
        ramp_end: end of the ramp; exchanges go on to the end of training.
        every: interval of updates (paper: 1,000 of 62,500 steps on CIFAR).
    """

    initial: float = 0.5
    ramp_budget: BudgetChoice = "global"
    ramp_end: Duration = "0.5dur"
    fraction: float = 0.5
    fraction_end: float = 0.005
    every: Duration = "0.016dur"
    end: Duration = "1dur"

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check both schedules."""
        super().check(steps, steps_per_epoch)
        if check_fraction("initial", self.initial, one_allowed=False) > self.sparsity:
            raise InvalidValue(
                f"initial sparsity {self.initial:g} is above the final {self.sparsity:g}; the total only falls."
            )
        self.ramp(steps, steps_per_epoch)

    def ramp(self, steps: int, steps_per_epoch: int | None) -> ResolvedSchedule:
        """Return the cubic sparsity ramp in optimizer steps."""
        every, _ = self.window(steps, steps_per_epoch)
        wanted = Schedule(final=self.sparsity, initial=self.initial, end=self.ramp_end, every=every)
        return wanted.resolve(steps, steps_per_epoch)

    def start(self, s: Sparsifier) -> Masks:
        """Return random ERK masks at `initial`, or everything."""
        select(s, self.sparsity, budget_choice=self.ramp_budget)  # refuses impossible choices now, not in the ramp
        given = given_masks(s, self.sparsity)
        if given is not None:
            return given
        return random_masks(s, self.initial, self.budget) if self.initial > 0 else select(s, 0.0)

    def update_due(self, s: Sparsifier, step: int) -> bool:
        """Tell whether an update falls on `step`: every interval, and at the exact end of the ramp."""
        return step > 0 and (self.exchange_due(s, step) or step == self.ramp(s.steps, s.steps_per_epoch).end)

    def after(self, s: Sparsifier) -> None:
        """Prune along the ramp, then regenerate at the new densities."""
        if not self.update_due(s, s.step):
            return
        ramp = self.ramp(s.steps, s.steps_per_epoch)
        masks = s.masks
        if s.step <= ramp.end:
            masks = select(s, ramp.value(s.step), budget_choice=self.ramp_budget, among=masks)
        s.update(self.exchange(s, masks))

    def rewire_layer(
        self, mask: Tensor, drop: Tensor, grow: Tensor, fraction: float, alive: int, weight: Tensor
    ) -> Tensor:
        """Return the new mask of one layer; the exchanged count is rounded up."""
        return rewire(mask, drop, grow, math.ceil(fraction * alive - 1e-9))
