"""Global magnitude pruning with a minimum per layer against layer collapse.

Source: Is Complexity Required for Neural Network Pruning? (Gupta et al., 2022). The paper's code rescales layer
sparsities in a loop; here the same constraint is met exactly by keeping the best M of every layer first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunus.masks import Masks
from prunus.methods.base import BudgetChoice
from prunus.methods.gradual import Gradual
from prunus.schedule import Duration
from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class GlobalMP(Gradual):
    """One threshold on |w| over the whole net, at step 0 of fine-tuning (or gradually with `curve="cubic"`).

    Attributes:
        minimum_share: weights every layer keeps at least, as a share of ALL prunable weights (paper's code: 0.0005).
    """

    minimum_share: float = 0.0005
    budget: BudgetChoice = "global"
    curve: str = "oneshot"
    end: Duration = 0

    def _at(self, s: Sparsifier, sparsity: float, among: Masks) -> Masks:
        choice: dict[str, Any] = {"name": self.budget} if isinstance(self.budget, str) else dict(self.budget)
        if choice["name"] == "global":
            choice.setdefault("minimum_share", self.minimum_share)
        return Gradual(self.sparsity, score=self.score, budget=choice, unit=self.unit)._at(s, sparsity, among)
