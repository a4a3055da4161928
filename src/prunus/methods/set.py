"""SET: sparse evolutionary training.

Source: Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science (Mocanu et al., Nature Communications 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.budget.select import keep_best
from prunus.methods.regrow import Regrow
from prunus.schedule import Duration


@dataclass(frozen=True)
class SET(Regrow):
    """Once per epoch drop a constant share of the weights nearest zero and grow as many at random places.

    Attributes:
        sign_split: drop the smallest positive and the largest negative weights, each side its own share (paper);
            otherwise the smallest magnitudes of both signs together.
    """

    anneal: str = "constant"
    every: Duration = "1ep"
    end: Duration = "1dur"
    growth: str = "random"
    sign_split: bool = True

    def rewire_layer(
        self, mask: Tensor, drop: Tensor, grow: Tensor, fraction: float, alive: int, weight: Tensor
    ) -> Tensor:
        """Return the new mask of one layer."""
        if not self.sign_split:
            return super().rewire_layer(mask, drop, grow, fraction, alive, weight)
        kept = torch.zeros_like(mask)
        for side in (mask & (weight >= 0), mask & (weight < 0)):
            count = int(torch.count_nonzero(side))
            kept |= keep_best(drop.masked_fill(~side, -torch.inf), count - int(fraction * count + 1e-9)) & side
        count = alive - int(torch.count_nonzero(kept))
        return kept | keep_best(grow.masked_fill(kept, -torch.inf), count)
