"""ITOP: in-time over-parameterisation - explore longer, with fewer and later exchanges, until the very end.

Source: Do We Actually Need Dense Over-Parameterization? (Liu et al., ICML 2021). Accuracy follows the exploration
rate R_s = |union of masks over time| / prunable weights, which is `Sparsifier.explored.density`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from prunus.methods.regrow import Regrow, rewire
from prunus.schedule import Duration


@dataclass(frozen=True)
class ITOP(Regrow):
    """RigL-ITOP (growth "gradient") or SET-ITOP (growth "random"): share 0.5 to 0.005, never stops.

    The paper's intervals are 4,000 (RigL) and 1,500 (SET) of 97,700 steps; the default is the former share.
    """

    fraction: float = 0.5
    fraction_end: float = 0.005
    every: Duration = "0.04dur"
    end: Duration = "1dur"

    def rewire_layer(
        self, mask: Tensor, drop: Tensor, grow: Tensor, fraction: float, alive: int, weight: Tensor
    ) -> Tensor:
        """Return the new mask of one layer; the exchanged count is rounded up."""
        return rewire(mask, drop, grow, math.ceil(fraction * alive - 1e-9))
