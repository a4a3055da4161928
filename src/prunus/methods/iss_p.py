"""ISS-P: iterative soft shrinkage by percentage - unimportant weights shrink a little every step, and may return.

Source: Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution (Wang et al., ICCV 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_best
from prunus.errors import ScheduleTooShort
from prunus.masks import Masks
from prunus.methods.base import Method, check_no_holes
from prunus.parameters import Address
from prunus.schedule import Duration, steps_of
from prunus.sparsifier import Sparsifier
from prunus.units import NM, unit

LAYER_CAP = 0.995


def important(weight: Tensor, address: Address, ratio: float, pattern: NM | None) -> Tensor:
    """Mark the important weights of a layer: all but the ceil(ratio * n) smallest (at most 99.5 %), or N of every M."""
    if pattern is not None:
        return pattern.choose(weight.abs(), address)
    n = weight.numel()
    pruned = min(math.ceil(ratio * n - 1e-9), int(LAYER_CAP * n))
    return keep_best(weight.abs(), n - pruned)


def shrink(weight: Tensor, keep: Tensor, factor: float) -> Tensor:
    """Return S(w): w where important, factor * w elsewhere."""
    return torch.where(keep, weight, factor * weight)


@dataclass(frozen=True)
class ISSP(Method):
    """Every layer loses the same share. Until `search_end` the smallest weights are multiplied by `factor` after
    every step (all weights receive gradient, so they can return); then the current ones are cut and the mask stays.

    Train the search phase at constant learning rate, as the paper does, and fine-tune after it: the cut removes
    weights that are small, not zero. Weight decay in the search phase changes the meaning of `factor`.

    Attributes:
        factor: shrink factor alpha in [0, 1]; 0 is iterative hard thresholding, 1 is dense training (paper: 0.95).
        search_end: when the mask is frozen.
        unit: "weight", or a pattern such as "2:4" (kept:group), which then replaces `sparsity`.
    """

    factor: float = 0.95
    search_end: Duration = "0.55dur"
    unit: str = "weight"

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check sparsity and factor."""
        super().check(steps, steps_per_epoch)
        check_fraction("factor", self.factor)
        end = steps_of(self.search_end, total_steps=steps, steps_per_epoch=steps_per_epoch)
        if not 1 <= end <= steps:
            raise ScheduleTooShort(
                f"the search ends at step {end} ({self.search_end!r}), which a training of {steps} steps never reaches "
                "after a step; train longer, or set search_end between 1 step and '1dur'."
            )

    def _important(self, s: Sparsifier) -> dict[str, Tensor]:
        what = unit(self.unit)
        pattern = what if isinstance(what, NM) else None
        return {n: important(w, s.addresses[n], self.sparsity, pattern) for n, w in s.weights().items()}

    def start(self, s: Sparsifier) -> Masks:
        """Return everything kept: the search phase is dense."""
        check_no_holes(s)
        return Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in s.parameters.items()})

    def after(self, s: Sparsifier) -> None:
        """Shrink during the search; freeze the mask at its end."""
        end = s.in_steps(self.search_end)
        if s.step > end:
            return
        keep = self._important(s)
        if s.step == end:
            s.update(Masks(keep))
            return
        with torch.no_grad():
            for name, parameter in s.parameters.items():
                parameter.copy_(shrink(parameter, keep[name], self.factor))
