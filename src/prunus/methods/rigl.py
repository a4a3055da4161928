"""RigL: rigging the lottery.

Source: Rigging the Lottery: Making All Tickets Winners (Evci et al., ICML 2020): drop the smallest magnitudes, grow
where the dense gradient is largest, with a cosine-annealed share, until three quarters of training.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunus.methods.regrow import Regrow


@dataclass(frozen=True)
class RigL(Regrow):
    """RigL with the paper's defaults: ERK, every 100 steps, share 0.3 annealed to 0 at 75 % of training."""
