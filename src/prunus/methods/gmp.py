"""GMP: gradual magnitude pruning with the cubic ramp.

Source: To prune, or not to prune (Zhu & Gupta, ICLR workshop 2018): s_t = s_f + (s_i - s_f) (1 - p)^3, each layer
pruned by magnitude to s_t.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunus.methods.gradual import Gradual


@dataclass(frozen=True)
class GMP(Gradual):
    """Gradual magnitude pruning, per layer, cubic ramp over the first two thirds of training, nested masks.

    The per-layer counts differ from round(s_t * n_l) by at most one so that the total is exact. `budget="global"`,
    "lamp" or "uniform-floor" give the published variants.
    """
