"""LAMP pruning: magnitude normalised by the tail of its own layer, one global ranking.

Source: Layer-adaptive Sparsity for the Magnitude-based Pruning (Lee et al., ICLR 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from prunus.methods.base import BudgetChoice
from prunus.methods.gradual import Gradual
from prunus.schedule import Duration


@dataclass(frozen=True)
class LAMPPruning(Gradual):
    """Prune by LAMP scores at step 0 of fine-tuning (or gradually with `curve="cubic", end="0.67dur"`).

    The paper's iterative protocol (20 % of what is left, retrain, 20 times) is the procedure "lth-imp" with
    `budget="lamp", rewind="finetune"`.
    """

    budget: BudgetChoice = "lamp"
    curve: str = "oneshot"
    end: Duration = 0
