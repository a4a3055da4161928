"""Random pruning: a fixed random mask with well-chosen layer ratios, trained from scratch.

Source: The Unreasonable Effectiveness of Random Pruning (Liu et al., ICLR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

from prunus.masks import Masks
from prunus.methods.base import BudgetChoice, Method, check_pattern, select, starting_masks
from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class Static(Method):
    """Choose a mask before the first step and keep it.

    Positions are drawn with exact counts (the reference code draws each entry on its own, so its density varies).
    With `score="magnitude"` on a trained model this is one-shot pruning followed by fine-tuning.

    Attributes:
        score: "random", or any score a training loop can compute ("magnitude"...).
        budget: how the kept weights are divided over layers.
        unit: what goes as one piece.
    """

    score: str = "random"
    budget: BudgetChoice = "erk"
    unit: str = "weight"

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the sparsity, and that a pattern agrees with it."""
        super().check(steps, steps_per_epoch)
        check_pattern(self.unit, self.sparsity)

    def start(self, s: Sparsifier) -> Masks:
        """Return the mask for the whole training (the given one, when masks were handed over)."""
        given = starting_masks(s, self.sparsity)
        if given is not None:
            return given
        return select(s, self.sparsity, score=self.score, budget_choice=self.budget, unit_choice=self.unit)
